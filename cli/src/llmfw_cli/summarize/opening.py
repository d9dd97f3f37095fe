"""Opening both engines on one model, and making the samples ready for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfw.engine.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from llmfw.errors import UsageError
from llmfw.models import prepare_model
from llmfw.weights import ModelSource, resolve_model
from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.options import ServingOptions
from llmfw_cli.session import open_session
from llmfw_cli.summarize.data import Sample
from llmfw_cli.summarize.engines import Engine, Ours, Theirs
from llmfw_cli.summarize.measure import Task
from llmfw_cli.summarize.options import DataOptions, RunOptions
from llmfw_cli.summarize.prompts import CHAT, PLAIN, Prompts


@dataclass(frozen=True)
class Opened:
    """The engines that run, and what they share.

    Args:
        engines: Ours first.
        tokenizer: The model's.
        longest: Tokens that a prompt, its summary and one more may have; None: no limit is known.
        about: What runs, for the report.
    """

    engines: list[Engine]
    tokenizer: Tokenizer
    longest: int | None
    about: dict[str, Any]


def open_engines(
    stack: ExitStack,
    model: str,
    serving: ServingOptions,
    engine: EngineOptions,
    run: RunOptions,
) -> Opened:
    """Load what the options ask for; the model is shut down with the stack.

    Raises:
        UsageError: If transformers is to run and cannot read the model.
        LlmfwError: Any other of the errors of loading.
    """
    engines: list[Engine] = []
    if run.runs_llmfw:
        session = stack.enter_context(open_session(model, serving, engine))
        about, config, source = session.about(), session.config, session.llm.loaded.source
        assert session.llm.tokenizer is not None
        tokenizer, longest = session.llm.tokenizer, session.llm.max_model_len
        engines.append(Ours(session.llm, run.output_len, run.num_beams))
    else:
        prepared = prepare_model(model, **serving.arguments())
        config, source, longest = prepared.model_config, prepared.source, None
        named = engine.tokenizer
        tokenizer = load_tokenizer(source.model_dir) if named is None else find_tokenizer(named)
        dtype = str(config.dtype).removeprefix("torch.")
        about = {"model": source.name, "dtype": dtype, "device": str(config.device)}
    if run.runs_hf:
        folder = _transformers_dir(run.hf_model_dir, source)
        engines.append(Theirs(folder, config.dtype, config.device, run.output_len, run.num_beams))
    return Opened(engines, tokenizer, longest, about)


def _transformers_dir(named: str | None, source: ModelSource) -> Path:
    """The directory that transformers loads."""
    if named is not None:
        return resolve_model(named).model_dir
    if source.kind in ("checkpoint", "engine"):
        raise UsageError(
            f"{source.name} is converted, and transformers cannot read it",
            hint="name what it was converted from: --hf-model-dir DIR; or leave transformers out: "
            "--test-llmfw",
        )
    return source.model_dir


def tasks_of(
    samples: list[Sample], opened: Opened, run: RunOptions, data: DataOptions
) -> Iterator[Task]:
    """The samples as token ids, each as often as the options ask for.

    Raises:
        UsageError: If prompts and summaries do not fit into the model.
    """
    longest = run.max_input_length
    if opened.longest is not None:
        longest = min(longest, opened.longest - run.output_len)
        if longest < 2:
            raise UsageError(
                f"summaries of {run.output_len} tokens leave no room for an article",
                hint="lower --output-len, or raise --max-model-len",
            )
    template = data.prompt_template or (CHAT if data.chat else PLAIN)
    prompts = Prompts(opened.tokenizer, longest, template, chat=data.chat)
    count = data.prompts_per_article
    for number, sample in enumerate(samples):
        summary = opened.tokenizer.encode(f" {sample.summary}", add_special_tokens=False)
        for cut in range(count):
            prompt = prompts.ids(sample.article, 1 - cut / (2 * count))
            scored = [*prompt, *summary][: _most_scored(opened.longest)]
            yield Task(prompt, sample.summary, scored, number)


def _most_scored(longest: int | None) -> int | None:
    """Tokens of a text to be scored: the engine wants room for one more."""
    return None if longest is None else longest - 1
