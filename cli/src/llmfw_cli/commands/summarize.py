"""`llmfw summarize`: summaries by llmfw and by transformers, scored, timed and compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.completions import complete_model
from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import MODEL, CommonOptions, JsonOption, ServingOptions
from llmfw_cli.output import note, progress, write_json
from llmfw_cli.session import open_session
from llmfw_cli.summarize.options import CheckOptions, DataOptions, RunOptions

if TYPE_CHECKING:
    from pathlib import Path

    from llmfw.engine.tokenizer import Tokenizer
    from llmfw.weights import ModelSource
    from llmfw_cli.summarize.data import Sample
    from llmfw_cli.summarize.engines import Engine
    from llmfw_cli.summarize.measure import Task

DIFFERENCE = 1


@takes_groups
def summarize(
    common: CommonOptions,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            "--engine-dir",
            "--engine_dir",
            envvar="LLMFW_MODEL",
            help="Directory, GGUF file, hub id, alias, converted checkpoint or engine.",
            autocompletion=complete_model,
            rich_help_panel=MODEL,
        ),
    ],
    serving: ServingOptions,
    run: RunOptions,
    data: DataOptions,
    check: CheckOptions,
    json: JsonOption = False,
    *,
    engine: EngineOptions,
) -> None:
    """Summarise articles with llmfw and with transformers, and compare.

    ROUGE against reference summaries, latency and tokens/s, and with --eval-ppl perplexity, for
    both. Both get the same tokens, in the same dtype, in one process. With --check-accuracy the
    exit code is 1 unless the differences are shown to be within the margins (docs/evaluation.md).
    """
    from llmfw_cli.summarize.measure import run_engines
    from llmfw_cli.summarize.report import (
        Threshold,
        as_json,
        compare,
        show,
        show_tests,
        write_files,
    )
    from llmfw_cli.summarize.scores import Rouge
    from llmfw_cli.summarize.statistics import Verdict

    both = run.test_llmfw == run.test_hf
    if check.check_accuracy and not both:
        raise _needs_both()
    rouge = Rouge()
    samples = data.samples(run.max_ite * run.batch_size)
    with ExitStack() as stack:
        opened = _open(stack, model, serving, engine, run)
        tasks = list(_tasks(samples, opened, run, data))
        bar = stack.enter_context(progress("summarizing"))
        runs = run_engines(
            opened.engines,
            tasks,
            opened.tokenizer,
            rouge,
            batch_size=run.batch_size,
            perplexity=run.eval_ppl,
            progress=bar,
        )
    about = {**opened.about, "data": data.data, "samples": len(samples)}
    tests = {}
    if len(runs) == 2 and (check.check_accuracy or len(samples) > 1):
        threshold = Threshold(check.alpha, check.rouge_margin, check.ppl_margin)
        tests = compare(runs[0], runs[1], threshold)
    report = as_json(about, runs, tests)
    if run.output_dir is not None:
        write_files(run.output_dir, samples, runs, report)
    if json:
        write_json(report)
    else:
        show(about, runs, len(samples))
        if tests:
            show_tests(tests)
    if check.check_accuracy and any(
        test.verdict is not Verdict.EQUIVALENT for test in tests.values()
    ):
        note("llmfw is not shown to be as good as transformers: see the verdicts")
        raise typer.Exit(DIFFERENCE)


def _needs_both() -> Exception:
    from llmfw.errors import UsageError

    return UsageError(
        "--check-accuracy compares llmfw with transformers, and only one of them is to run",
        hint="leave --test-llmfw and --test-hf out, or give both",
    )


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


def _open(
    stack: ExitStack,
    model: str,
    serving: ServingOptions,
    engine: EngineOptions,
    run: RunOptions,
) -> Opened:
    from llmfw.engine.tokenizer import load_tokenizer
    from llmfw_cli.summarize.engines import Ours, Theirs

    engines: list[Engine] = []
    if run.test_llmfw or not run.test_hf:
        session = stack.enter_context(open_session(model, serving, engine))
        about, config, source = session.about(), session.config, session.llm.loaded.source
        assert session.llm.tokenizer is not None
        tokenizer, longest = session.llm.tokenizer, session.llm.max_model_len
        engines.append(Ours(session.llm, run.output_len, run.num_beams))
    else:
        from llmfw.models import prepare_model

        prepared = prepare_model(model, **serving.arguments())
        config, source, longest = prepared.model_config, prepared.source, None
        tokenizer = load_tokenizer(engine.tokenizer or source.model_dir)
        dtype = str(config.dtype).removeprefix("torch.")
        about = {"model": source.name, "dtype": dtype, "device": str(config.device)}
    if run.test_hf or not run.test_llmfw:
        folder = _transformers_dir(run.hf_model_dir, source)
        engines.append(Theirs(folder, config.dtype, config.device, run.output_len, run.num_beams))
    return Opened(engines, tokenizer, longest, about)


def _transformers_dir(named: str | None, source: ModelSource) -> Path:
    """The directory that transformers loads."""
    from llmfw.errors import UsageError
    from llmfw.weights import resolve_model

    if named is not None:
        return resolve_model(named).model_dir
    if source.kind in ("checkpoint", "engine"):
        raise UsageError(
            f"{source.name} is converted, and transformers cannot read it",
            hint="name what it was converted from: --hf-model-dir DIR; or leave transformers out: "
            "--test-llmfw",
        )
    return source.model_dir


def _tasks(
    samples: list[Sample], opened: Opened, run: RunOptions, data: DataOptions
) -> Iterator[Task]:
    from llmfw.errors import UsageError
    from llmfw_cli.summarize.measure import Task
    from llmfw_cli.summarize.prompts import CHAT, PLAIN, Prompts

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
    for sample in samples:
        prompt = prompts.ids(sample.article)
        summary = opened.tokenizer.encode(f" {sample.summary}", add_special_tokens=False)
        yield Task(prompt, sample.summary, [*prompt, *summary][: _most_scored(opened.longest)])


def _most_scored(longest: int | None) -> int | None:
    """Tokens of a text to be scored: the engine wants room for one more."""
    return None if longest is None else longest - 1
