"""`LlmfwLM`: the class that lm-eval drives.

It does what lm-eval's own class for transformers (`HFLM`) does: the same tokens, truncated on the
same side, the same scores and the same ends of a text. Batches are the engine's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llmfw import LLM, RequestOutput, SamplingParams
from llmfw.engine.tokenizer import Tokenizer
from llmfw.errors import RequestError, UsageError
from llmfw_cli.lm_eval.chat import render

_AT_ONCE = 256
"""Prompts given to the engine at a time: enough to keep it busy, few enough to show progress."""

TokenPair = tuple[list[int], list[int]]
"""Context and continuation, as token ids."""


class LlmfwLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no type hints
    """A model of llmfw for lm-eval.

    Args:
        model: A directory, a GGUF file, a hub id or an alias, as `LLM` takes it.
        pretrained: The same under the name that lm-eval's other models use.
        max_length: Most tokens of context and continuation; by default as many as the engine
            takes, which is two fewer than the model has positions.
        max_gen_toks: Most tokens of an answer whose task does not say.
        add_bos_token: Whether texts get the tokenizer's special tokens; None: as it is set up.
        prefix_token_id: What stands before a text without context; by default the BOS token, else
            the end-of-sequence token.
        batch_size, max_batch_size: Accepted and not used: the engine batches by its own settings.
        device: As `LLM` takes it. Without a GPU lm-eval's default, "cuda:0", means the CPU, as it
            does to `HFLM`.
        **settings: Of `LLM`: dtype, max_model_len, kernels, ...; several plugin_modules or
            extensions are separated by `;`.

    Raises:
        UsageError: For no model or two, or a setting that `LLM` does not know.
        LlmfwError: Any other of the errors of loading.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        pretrained: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__()
        name = model or pretrained
        if name is None or (model and pretrained):
            raise UsageError(
                "lm-eval's model_args must name one model", hint="model_args model=smollm2,..."
            )
        for key in ("plugin_modules", "extensions"):
            if isinstance(settings.get(key), str):
                settings[key] = settings[key].split(";")
        if device == "cuda:0" and not torch.cuda.is_available():
            device = "auto"
        self.llm = LLM(name, device=device, **settings)
        assert self.llm.tokenizer is not None  # it was not told to skip it
        self.tokenizer: Tokenizer = self.llm.tokenizer
        self._name = name
        self._add_bos = add_bos_token
        self._prefix = prefix_token_id
        self._max_gen_toks = max_gen_toks
        # A prompt to be scored holds the last token too, and the engine wants room for one more.
        longest = self.llm.max_model_len - 2
        if max_length is not None and not 1 < max_length <= longest:
            raise UsageError(
                f"max_length={max_length} does not fit", hint=f"it must be in 2 to {longest}"
            )
        self.max_length = max_length or longest

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        if self.tokenizer.eos_token_id is None:
            raise UsageError(
                "the tokenizer names no end-of-sequence token",
                hint="add eos_token to tokenizer_config.json",
            )
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        if self._prefix is not None:
            return self._prefix
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of an answer whose task does not say."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells its caches of requests apart by."""
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """The ids of a text; special tokens are not added to one that begins with BOS."""
        if add_special_tokens is None:
            begun = string.startswith(
                self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            )
            add_special_tokens = False if begun else self._add_bos
        if add_special_tokens is None:
            return self.tokenizer.encode(string)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        answers = self._score([(each[1], each[2]) for each in requests], quiet=disable_tqdm)
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log probability of each text whole, in windows as long as the model takes."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._score([pair for each in windows for pair in each], quiet=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in each) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (request.args[0],), total)
        return totals

    def _windows(self, text: str) -> Iterator[TokenPair]:
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, rolling)

    def _score(self, pairs: Sequence[TokenPair], *, quiet: bool) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether it is the greedy one."""
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        for context, continuation in pairs:
            prompt = [*context, *continuation][-(self.max_length + 1) :]
            first = len(prompt) - len(continuation)
            if first < 1 or not continuation:
                raise RequestError(
                    f"a continuation of {len(continuation)} tokens cannot be scored",
                    hint=f"it must have 1 to {self.max_length}; max_length says how many",
                )
            prompts.append(prompt)
            params.append(_scoring(first))
        outputs = self._run(prompts, params, "Running loglikelihood requests", quiet=quiet)
        return [
            _score_of(output, len(continuation))
            for output, (_, continuation) in zip(outputs, pairs, strict=True)
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Complete each text up to one of its stop strings, which is not part of the answer."""
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        stops: list[list[str]] = []
        for request in requests:
            context, asked = request.args
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
            until = handle_stop_sequences(kwargs.pop("until", None), eos=None)
            prompt, sampling = self._completion(context, kwargs, until)
            prompts.append(prompt)
            params.append(sampling)
            stops.append(until)
        outputs = self._run(prompts, params, "Running generate_until requests", quiet=disable_tqdm)
        texts = []
        for request, output, until in zip(requests, outputs, stops, strict=True):
            text = postprocess_generated_text(output.text, until, think_end_token=None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _completion(
        self, context: str, kwargs: dict[str, Any], until: Sequence[str]
    ) -> tuple[list[int], SamplingParams]:
        """The prompt, its end kept where it is too long, and how it is completed."""
        most = kwargs.pop("max_gen_toks")
        room = self.max_length - most
        if room < 1:
            raise UsageError(
                f"max_gen_toks={most} leaves no room for a prompt in max_length={self.max_length}",
                hint="lower it in gen_kwargs",
            )
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        if "max_length" in kwargs:
            most = kwargs.pop("max_length") - len(prompt)
        if not kwargs.pop("do_sample", False):
            kwargs["temperature"] = 0.0
        tokens = (self.tokenizer.token_id(text) for text in until)
        return prompt, SamplingParams(
            max_tokens=most,
            stop=[text for text in until if text],
            # A stop string that is a special token never shows in the text.
            stop_token_ids=[token for token in (*tokens, self.eot_token_id) if token is not None],
            **kwargs,
        )

    def _run(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        title: str,
        *,
        quiet: bool,
    ) -> list[RequestOutput]:
        """The outputs in order; prompts that begin alike run together, to share the cache."""
        order = sorted(range(len(prompts)), key=prompts.__getitem__)
        outputs: dict[int, RequestOutput] = {}
        with tqdm(total=len(prompts), desc=title, disable=quiet) as bar:
            for part in _parts(order, _AT_ONCE):
                made = self.llm.generate([prompts[n] for n in part], [params[n] for n in part])
                outputs.update(zip(part, made, strict=True))
                bar.update(len(part))
        failed = next((each.error for each in outputs.values() if each.error is not None), None)
        if failed is not None:
            raise failed
        return [outputs[number] for number in range(len(prompts))]

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt that the chat template makes; without a system message where it has none."""
        return render(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that is applied, for lm-eval's records; None: none.

        Raises:
            UsageError: If it is asked for by a name that the checkpoint does not have.
        """
        if chat_template is False or chat_template is None:
            return None
        name = "default" if chat_template is True else chat_template
        templates = self.tokenizer.chat_templates
        if name not in templates:
            raise UsageError(
                f"the checkpoint has no chat template {name!r}",
                hint=f"it has: {', '.join(sorted(templates)) or 'none'}",
            )
        return templates[name]


def _scoring(first: int) -> SamplingParams:
    """Parameters for the log probabilities of a prompt's tokens from `first` on."""
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        prompt_logprobs_start=first,
        detokenize=False,
        repetition_penalty=1.0,
    )


def _score_of(output: RequestOutput, count: int) -> tuple[float, bool]:
    assert output.prompt_logprobs is not None
    total, greedy = 0.0, True
    scored = zip(output.prompt_token_ids[-count:], output.prompt_logprobs[-count:], strict=True)
    for token, entry in scored:
        assert entry is not None
        total += entry[token].logprob
        greedy = greedy and entry[token].rank == 1
    return total, greedy


def _parts(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
