"""`LLM`: a model, its tokenizer and an engine behind a few methods."""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from llmfw.config import text_config
from llmfw.engine.engine import LLMEngine
from llmfw.engine.executor import InProcessExecutor
from llmfw.engine.generation import Generation
from llmfw.engine.intake import Arrival
from llmfw.engine.model_runner import ModelRunner
from llmfw.engine.prompts import Prompt, as_batch, failed_output, token_ids_of
from llmfw.engine.settings import EngineSettings, completed_by
from llmfw.engine.stats import EngineStats
from llmfw.engine.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from llmfw.errors import RequestError, UsageError
from llmfw.models import LoadedModel, load_model
from llmfw.ops.device import as_current
from llmfw.phases import Phases
from llmfw.request import Request, RequestOutput
from llmfw.sampling_params import SamplingParams, unknown_name

Message = Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model ready to answer.

    Args:
        model: A directory (Hugging Face's, a converted checkpoint or an engine), a GGUF file, a hub
            id or an alias.
        tokenizer: A directory with the tokenizer, a model whose tokenizer it is (as `model`), or a
            `Tokenizer`; the model's own when left out.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda" or "cuda:N".
        skip_tokenizer_init: Load no tokenizer: prompts and answers are token ids.
        plugin: The distribution whose plugin serves the model, where several could.
        plugin_modules: Files or modules that register models, imported first.
        fallback: Whether an installed fallback may serve a model that no plugin names.
        extensions: Names of installed extensions to use.
        kernels: "auto", "reference", or a comma list that picks kernels by name.
        attention_backend: "auto", "vanilla" (torch alone) or another backend's name.
        max_model_len: Most tokens of a sequence, prompt and output; the model's own when left out.
        block_size: Tokens of a cache block.
        kv_cache_memory: Bytes, a string such as "4GiB", or a fraction of the free memory.
        enable_prefix_caching: Whether prompts that begin alike share cache and work.
        enable_chunked_prefill: Whether a long prompt is computed over several steps.
        max_num_seqs: Most sequences in flight; 64 on a CPU, 256 on a GPU when left out.
        max_num_batched_tokens: Most tokens of a step; 2,048 on a CPU, 8,192 on a GPU.
        generation_config: "auto" takes sampling defaults from the checkpoint, "none" does not. Its
            end-of-sequence tokens count either way.
        load_format: "auto" reads the checkpoint, "dummy" makes random weights from its config.
        seed: Where requests without a seed get theirs from, and dummy weights.
        progress: Called with (tensors done, tensors in all, name) while weights load.
        cuda_graphs: Whether decode steps are captured on a GPU and replayed.
        overlap_scheduling: Whether a step is prepared while the one before it runs; None: on a GPU.
        **unknown: Refused, with the nearest name.

    Attributes:
        loaded: The model and where it came from.
        tokenizer: None where it was skipped.
        startup_seconds: Seconds by phase of the start: resolve, build, weights, tokenizer, kernels
            (compiling and tuning, on a GPU), cache, graphs.

    Raises:
        UsageError: For an unknown keyword or a setting out of range.
        DeviceError: If the device has too little memory, with what to lower.
        LlmfwError: Any other of the errors of loading (`llmfw.models.load_model`).
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        skip_tokenizer_init: bool = False,
        plugin: str | None = None,
        plugin_modules: Sequence[str] = (),
        fallback: bool = True,
        extensions: Sequence[str] = (),
        kernels: str = "auto",
        attention_backend: str = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        kv_cache_memory: int | float | str | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        generation_config: str = "auto",
        load_format: str = "auto",
        seed: int = 0,
        progress: Callable[[int, int, str], None] | None = None,
        cuda_graphs: bool = True,
        overlap_scheduling: bool | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise unknown_name(next(iter(unknown)), _KEYWORDS, "LLM")
        if generation_config not in ("auto", "none"):
            raise UsageError(
                f"generation_config={generation_config!r} is not known", hint="known: auto, none"
            )
        if skip_tokenizer_init and tokenizer is not None:
            raise UsageError(
                "tokenizer is given and skip_tokenizer_init is set", hint="leave one of them out"
            )
        settings = EngineSettings(
            block_size=block_size,
            max_model_len=max_model_len,
            kv_cache_memory=kv_cache_memory,
            enable_prefix_caching=enable_prefix_caching,
            enable_chunked_prefill=enable_chunked_prefill,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            seed=seed,
            cuda_graphs=cuda_graphs,
            pipeline_depth=None if overlap_scheduling is None else int(overlap_scheduling),
        )
        phases = Phases()
        self.startup_seconds: dict[str, float] = phases.seconds
        self.loaded: LoadedModel = load_model(
            model,
            dtype=dtype,
            device=device,
            plugin=plugin,
            plugin_modules=plugin_modules,
            fallback=fallback,
            extensions=extensions,
            kernels=kernels,
            attn_backend=attention_backend,
            max_model_len=max_model_len,
            block_size=block_size,
            load_format=load_format,
            seed=seed,
            progress=progress,
            phases=phases,
        )
        self.tokenizer: Tokenizer | None = None
        if not skip_tokenizer_init:
            with phases.measure("tokenizer"):
                self.tokenizer = _tokenizer(tokenizer, self.loaded)
        self._sampling_defaults = (
            self.loaded.generation_config if generation_config == "auto" else {}
        )
        self._engine = _start_engine(self.loaded, settings, self.tokenizer, phases)
        self._finalizer = weakref.finalize(self, _close, self._engine)
        self._finalizer.atexit = False  # the engine closes itself then

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt and output."""
        return self._engine.facts.max_model_len

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What a request without parameters gets."""
        return SamplingParams.from_generation_config(self._sampling_defaults)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a string is not meant as a list of strings
        self, prompts: Prompt, sampling_params: Params = None
    ) -> RequestOutput: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], sampling_params: Params = None
    ) -> list[RequestOutput]: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None
    ) -> RequestOutput | list[RequestOutput]:
        """Complete one prompt or many and wait for all.

        Args:
            prompts: A string or a list of token ids, or a list of these.
            sampling_params: For all, or one for each; the checkpoint's defaults when left out.

        Returns:
            A `RequestOutput` for one prompt, a list of them in the same order for a list.

        Raises:
            RequestError: If a single prompt cannot be served. In a list its output carries the
            error
                with finish_reason "error", and the others finish.
            EngineError: If the engine stopped.
        """
        batch, single = as_batch(prompts)
        generations = self._submit_all(batch, self._each(sampling_params, len(batch)))
        try:
            outputs = [
                handle.result() if isinstance(handle, Generation) else handle
                for handle in generations
            ]
        except BaseException:
            for handle in generations:
                if isinstance(handle, Generation):
                    handle.abort()
            raise
        if not single:
            return outputs
        if outputs[0].error is not None:
            raise outputs[0].error
        return outputs[0]

    @overload
    def chat(
        self, messages: Sequence[Message], sampling_params: Params = None, **template: Any
    ) -> RequestOutput: ...

    @overload
    def chat(
        self, messages: Sequence[Sequence[Message]], sampling_params: Params = None, **template: Any
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        **template: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer a conversation, or a list of them, through the checkpoint's chat template.

        Args:
            messages: Mappings with "role" and "content"; or a list of such lists.
            sampling_params: As in `generate`.
            **template: `chat_template`, `add_generation_prompt`, `tools` and variables of the
                template, as `chat_token_ids` takes them.

        Returns and raises what `generate` does.
        """
        many = (
            bool(messages)
            and not isinstance(messages[0], Mapping)
            and not isinstance(messages, str)
        )
        conversations: Sequence[Any] = messages if many else [messages]
        prompts: list[Prompt] = [self.chat_token_ids(each, **template) for each in conversations]
        return (
            self.generate(prompts, sampling_params)
            if many
            else self.generate(prompts[0], sampling_params)
        )

    def chat_token_ids(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_variables: Any,
    ) -> list[int]:
        """The token ids of a conversation; the template writes the special tokens itself."""
        tokenizer = self._need_tokenizer("chat")
        text = tokenizer.apply_chat_template(
            messages,
            chat_template_text=chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **template_variables,
        )
        return tokenizer.encode(text, add_special_tokens=False)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, giving an output whenever there is more text.

        `outputs[i].text` is all text so far, `outputs[i].text_diff` what is new. Leaving the loop
        early aborts the request.

        Raises:
            RequestError: If the prompt cannot be served.
            EngineError: If the engine stopped.
        """
        generation = self._submit(
            prompt, sampling_params, streaming=True
        )  # now, not at the first `next`
        return _checked(generation)

    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        request_id: str | None = None,
    ) -> Generation:
        """Queue one prompt and return at once.

        Args:
            prompt: A string or a list of token ids.
            sampling_params: The checkpoint's defaults when left out.
            streaming: Whether to wake the reader for every token and not only at the end.
            request_id: A name for `abort`; made up when left out.

        Returns:
            A handle: `await` it or call `result()` for the whole output; `async for` or `for` over
            it for outputs as they come (with streaming=False: the last alone).

        Raises:
            RequestError: If the prompt cannot be served.
        """
        return self._submit(prompt, sampling_params, request_id, streaming=streaming)

    def abort(self, request: str | Generation) -> None:
        """End a request as it stands; its finish_reason becomes "abort"."""
        self._engine.abort(request if isinstance(request, str) else request.request_id)

    def stats(self) -> EngineStats:
        """Queue, cache use, prefix hits, preemptions and tokens so far."""
        return self._engine.stats()

    def shutdown(self) -> None:
        """Stop the engine; may be called twice. Leaving a `with` block does it."""
        self._finalizer.detach()
        self._engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def _each(self, params: Params, count: int) -> Sequence[SamplingParams | None]:
        if params is None or isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, (list, tuple)):
            raise _not_sampling(params)
        if len(params) != count:
            raise UsageError(
                f"{len(params)} sampling_params for {count} prompts",
                hint="give one for all, or one for each",
            )
        return params

    def _submit_all(
        self, batch: Sequence[Any], params: Sequence[SamplingParams | None]
    ) -> list[Generation | RequestOutput]:
        """Queue all; those that fill a step at once, for the engine's thread takes turns with this.

        Started one by one, the first would be computed alone and slowly.
        """
        handles: list[Generation | RequestOutput] = []
        ready: list[Arrival] = []
        tokens, most = 0, self._engine.settings.max_num_batched_tokens or 0
        for prompt, each in zip(batch, params, strict=True):
            try:
                arrival = self._engine.take(self._request(prompt, each))
            except RequestError as exc:
                handles.append(failed_output(self._engine.new_request_id(), prompt, exc))
                continue
            handles.append(arrival.generation)
            ready.append(arrival)
            tokens += len(arrival.generation.request.prompt_token_ids)
            if tokens >= most:
                self._engine.start(ready)
                ready, tokens = [], 0
        if ready:
            self._engine.start(ready)
        return handles

    def _submit(
        self,
        prompt: Any,
        params: SamplingParams | None,
        request_id: str | None = None,
        *,
        streaming: bool = False,
    ) -> Generation:
        request = self._request(prompt, params, request_id)
        return self._engine.add_request(request, streaming=streaming)

    def _request(
        self, prompt: Any, params: SamplingParams | None, request_id: str | None = None
    ) -> Request:
        arrival = time.perf_counter()
        if params is not None and not isinstance(params, SamplingParams):
            raise _not_sampling(params)
        sampling = (
            params.resolved(self._sampling_defaults) if params else self.default_sampling_params
        )
        text, ids = token_ids_of(prompt, self.tokenizer)
        name = request_id if request_id is not None else self._engine.new_request_id()
        return Request(name, ids, sampling, prompt=text, arrival=arrival)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                f"{what} needs a tokenizer, but skip_tokenizer_init is set",
                hint="give token ids to generate, or leave skip_tokenizer_init off",
            )
        return self.tokenizer


_KEYWORDS = [
    name
    for name, parameter in inspect.signature(LLM.__init__).parameters.items()
    if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
]


def _not_sampling(params: object) -> UsageError:
    return UsageError(
        f"sampling_params is a {type(params).__name__}",
        hint="give SamplingParams(temperature=0.7, ...)",
    )


def _close(engine: LLMEngine) -> None:
    engine.shutdown(wait=False)


def _checked(generation: Generation) -> Iterator[RequestOutput]:
    for output in generation:
        if output.error is not None:
            raise output.error
        yield output


def _tokenizer(given: str | Path | Tokenizer | None, loaded: LoadedModel) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    if given is None:
        return load_tokenizer(loaded.source.model_dir)
    return find_tokenizer(given)


def _start_engine(
    loaded: LoadedModel, settings: EngineSettings, tokenizer: Tokenizer | None, phases: Phases
) -> LLMEngine:
    config = loaded.model_config
    settled = completed_by(loaded.engine, settings).on(config.device.type)
    with as_current(config.device):
        runner = ModelRunner(
            loaded.model,
            settled,
            config.device,
            attn_backend=config.attn_backend,
            max_model_len=config.max_model_len,
            phases=phases,
        )
    return LLMEngine(
        InProcessExecutor(runner),
        settled,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(loaded, tokenizer),
        vocab_size=getattr(loaded.model, "vocab_size", None),
    )


def _eos_ids(loaded: LoadedModel, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Those of generation_config and config; the tokenizer's where neither names one."""
    found: set[int] = set()
    config = text_config(loaded.model_config.pretrained_config)
    for value in (
        loaded.generation_config.get("eos_token_id"),
        getattr(config, "eos_token_id", None),
    ):
        if value is not None:
            found |= {value} if isinstance(value, int) else set(value)
    if not found and tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(found)
