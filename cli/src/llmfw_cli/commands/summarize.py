"""`llmfw summarize`: summaries by llmfw and by transformers, scored, timed and compared."""

from __future__ import annotations

from contextlib import ExitStack

import typer

from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption, ModelOption, ServingOptions
from llmfw_cli.output import note, progress, write_json
from llmfw_cli.summarize.options import CheckOptions, DataOptions, RunOptions

DIFFERENCE = 1


@takes_groups
def summarize(
    common: CommonOptions,
    model: ModelOption,
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
    from llmfw_cli.summarize.opening import open_engines, tasks_of
    from llmfw_cli.summarize.report import (
        Threshold,
        as_json,
        compare,
        show,
        show_tests,
        write_files,
    )
    from llmfw_cli.summarize.scores import Rouge
    from llmfw_cli.summarize.statistics import Verdict, require_several

    if check.check_accuracy and not (run.runs_llmfw and run.runs_hf):
        raise _needs_both()
    threshold = Threshold(check.alpha, check.rouge_margin, check.ppl_margin)
    rouge = Rouge()
    samples = data.samples(run.max_ite * run.batch_size)
    if check.check_accuracy:
        require_several(len(samples))
    with ExitStack() as stack:
        opened = open_engines(stack, model, serving, engine, run)
        tasks = list(tasks_of(samples, opened, run, data))
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
    about = {
        **opened.about,
        "data": data.data,
        "articles": len(samples),
        "samples": len(tasks),
    }
    tests = {}
    if len(runs) == 2 and (check.check_accuracy or len(samples) > 1):
        tests = compare(runs[0], runs[1], threshold, [task.article for task in tasks])
    report = as_json(about, runs, tests)
    if run.output_dir is not None:
        write_files(run.output_dir, [samples[task.article] for task in tasks], runs, report)
    if json:
        write_json(report)
    else:
        show(about, runs, len(tasks))
        if tests:
            show_tests(tests)
    if check.check_accuracy and any(
        test.verdict is not Verdict.EQUIVALENT for test in tests.values()
    ):
        note("llmfw is not shown to be as good as transformers: see the verdicts")
        if not any(test.verdict is Verdict.DIFFERENT for test in tests.values()):
            note("to tell, give more articles, or raise --prompts-per-article (8 suit bfloat16)")
        raise typer.Exit(DIFFERENCE)


def _needs_both() -> Exception:
    from llmfw.errors import UsageError

    return UsageError(
        "--check-accuracy compares llmfw with transformers, and only one of them is to run",
        hint="leave --test-llmfw and --test-hf out, or give both",
    )
