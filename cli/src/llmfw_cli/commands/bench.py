"""`llmfw bench`: how fast a model answers, and how that compares."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.bench.subject import SubjectOptions
from llmfw_cli.commands.bench_files import chart, make_checkpoint, startup
from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.groups import OptionGroup, takes_groups
from llmfw_cli.options import CommonOptions, JsonOption, ServingOptions
from llmfw_cli.output import note

if TYPE_CHECKING:
    from llmfw_cli.bench.measure import Figures, Runner
    from llmfw_cli.bench.steps import StepBench
    from llmfw_cli.bench.workload import Workload
    from llmfw_cli.session import Session

app = typer.Typer(help="Measure a model's speed.", no_args_is_help=True)
app.command()(startup)
app.command("make-checkpoint")(make_checkpoint)
app.command()(chart)

LOAD = "Load"
LENGTHS = "A number, A..B (uniform) or normal(MEAN,STD)."

PromptLen = Annotated[
    str, typer.Option(help=f"Tokens of a prompt. {LENGTHS}", rich_help_panel=LOAD)
]
NewTokens = Annotated[
    str, typer.Option(help=f"Tokens to make for each prompt. {LENGTHS}", rich_help_panel=LOAD)
]


@dataclass(frozen=True)
class RepeatOptions(OptionGroup):
    """How often a measurement is repeated."""

    runs: Annotated[
        int, typer.Option(min=1, help="Timed runs; the median counts.", rich_help_panel=LOAD)
    ] = 3
    warmups: Annotated[
        int, typer.Option(min=0, help="Runs before them that do not count.", rich_help_panel=LOAD)
    ] = 1
    load_seed: Annotated[
        int,
        typer.Option(help="Seed of the prompts' lengths and random tokens.", rich_help_panel=LOAD),
    ] = 0

    @property
    def seeds(self) -> range:
        """A seed for each run, so that no run meets the prefix cache of another."""
        first = self.load_seed * 1000
        return range(first, first + self.warmups + self.runs)


@app.command()
@takes_groups
def latency(
    common: CommonOptions,
    subject: SubjectOptions,
    serving: ServingOptions,
    prompt_len: PromptLen = "128",
    new_tokens: NewTokens = "128",
    json: JsonOption = False,
    *,
    repeat: RepeatOptions,
    engine: EngineOptions,
) -> None:
    """One prompt at a time: the time to the first token, and tokens a second after it."""
    _measure(1, prompt_len, new_tokens, subject, serving, engine, repeat, json)


@app.command()
@takes_groups
def throughput(
    common: CommonOptions,
    subject: SubjectOptions,
    serving: ServingOptions,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts given at once.", rich_help_panel=LOAD)
    ] = 16,
    prompt_len: PromptLen = "128..248",
    new_tokens: NewTokens = "128",
    json: JsonOption = False,
    *,
    repeat: RepeatOptions,
    engine: EngineOptions,
) -> None:
    """Many prompts at once: new tokens a second over all of them, and percentiles of requests.

    Beside them stands the least time of such a load: operations of the prompts at the rate of a
    large matrix product, then a step for each token of the longest request, reading weights, keys,
    values and state at the memory's bandwidth, both rates measured in the same run.
    End-of-sequence tokens are ignored; where a request makes another number of tokens than asked
    for there is an error and no figure.
    """
    _measure(num_prompts, prompt_len, new_tokens, subject, serving, engine, repeat, json)


@app.command()
@takes_groups
def compare(
    common: CommonOptions,
    subject: SubjectOptions,
    serving: ServingOptions,
    json: JsonOption = False,
    *,
    repeat: RepeatOptions,
    engine: EngineOptions,
) -> None:
    """Against transformers' generate: the same checkpoint, dtype, threads, prompts and process.

    Decode at batch 1 (prompt 128, 128 new), prefill of 1,024 tokens, and 16 prompts of 128 to 248
    tokens with 128 new ones each; also which share of the memory's measured bandwidth decoding
    reaches.
    """
    from llmfw_cli.bench.measure import Ours, measure_in_turn
    from llmfw_cli.bench.peer import Transformers
    from llmfw_cli.bench.report import report_figures

    with subject.opened(serving, engine) as session:
        config, source = session.config, session.llm.loaded.source
        peer = Transformers(source.model_dir, config.dtype, config.device)
        runners: list[Runner] = [Ours(session.llm), peer]
        rows = []
        for count, prompt, new in ((1, "128", "128"), (1, "1024", "1"), (16, "128..248", "128")):
            workloads = _workloads(count, prompt, new, session.vocab_size, repeat)
            note(f"measuring {workloads[0].name}")
            rows.append(measure_in_turn(runners, workloads, warmups=repeat.warmups))
        ours, theirs = map(list, zip(*rows, strict=True))
        about = {**_about(session), **_of_bandwidth(session, ours[0])}
    report_figures({"llmfw": ours, "transformers": theirs}, about, as_json=json)


@app.command()
@takes_groups
def decode(
    common: CommonOptions,
    subject: SubjectOptions,
    serving: ServingOptions,
    batch: Annotated[
        str, typer.Option(help="Requests of a step, a comma list.", rich_help_panel=LOAD)
    ] = "1,8,32",
    context: Annotated[
        str, typer.Option(help="Tokens of each prompt, a comma list.", rich_help_panel=LOAD)
    ] = "128,1024",
    new_tokens: Annotated[
        int,
        typer.Option(
            min=4,
            help="Tokens of each request; the steps that count are those in which all decode.",
            rich_help_panel=LOAD,
        ),
    ] = 64,
    chart_file: Annotated[
        Path | None,
        typer.Option(
            "--chart", help="Draw time against batch size into this file.", rich_help_panel=LOAD
        ),
    ] = None,
    json: JsonOption = False,
    *,
    repeat: RepeatOptions,
    engine: EngineOptions,
) -> None:
    """Milliseconds a decode step by batch and context, each beside its bandwidth floor.

    The floor is the time of reading what the step needs (weights, keys and values, state) at the
    memory's bandwidth, measured in the same run.
    """
    from llmfw_cli.bench.chart import draw
    from llmfw_cli.bench.lengths import parse_numbers
    from llmfw_cli.bench.machine import read_bandwidth
    from llmfw_cli.bench.report import report_points

    batches, contexts = parse_numbers(batch, "--batch"), parse_numbers(context, "--context")
    with subject.opened(serving, _room_for(max(batches), engine)) as session:
        _require_room(max(contexts), new_tokens, session)
        bandwidth = read_bandwidth(session.config.device)
        bench = _step_bench(session, repeat)
        points = list(bench.decode(batches, contexts, new_tokens, bandwidth))
        about = {**_about(session), "read_gb_per_s": round(bandwidth / 1e9, 2)}
    report_points("decode", points, about, as_json=json)
    if chart_file is not None:
        of_context = {
            f"context {length}": [vars(point) for point in points if point.context == length]
            for length in contexts
        }
        draw(list(of_context.items()), str(about["model"]), chart_file)
        note(f"drawn into {chart_file}")


@app.command()
@takes_groups
def prefill(
    common: CommonOptions,
    subject: SubjectOptions,
    serving: ServingOptions,
    prompt_len: Annotated[
        str, typer.Option(help="Tokens of each prompt, a comma list.", rich_help_panel=LOAD)
    ] = "128,512,1024",
    batch: Annotated[
        int, typer.Option(min=1, help="Prompts given at once.", rich_help_panel=LOAD)
    ] = 1,
    json: JsonOption = False,
    *,
    repeat: RepeatOptions,
    engine: EngineOptions,
) -> None:
    """Prompt tokens a second by prompt length, and the share of the machine's matrix rate.

    Operations are those of all matrix products and of causal attention; the rate beside them is
    that of a large square product in the same dtype, measured in the same run.
    """
    from llmfw_cli.bench.lengths import parse_numbers
    from llmfw_cli.bench.machine import matrix_rate
    from llmfw_cli.bench.report import report_points

    lengths = parse_numbers(prompt_len, "--prompt-len")
    with subject.opened(serving, _room_for(batch, engine)) as session:
        rate = matrix_rate(session.config.device, session.config.dtype)
        points = list(_step_bench(session, repeat).prefill(batch, lengths, rate))
        about = {**_about(session), "matrix_tflops": round(rate / 1e12, 4)}
    report_points("prefill", points, about, as_json=json)


def _measure(
    count: int,
    prompt: str,
    new: str,
    subject: SubjectOptions,
    serving: ServingOptions,
    engine: EngineOptions,
    repeat: RepeatOptions,
    as_json: bool,
) -> None:
    from llmfw_cli.bench.lengths import parse_lengths
    from llmfw_cli.bench.measure import Ours, measure
    from llmfw_cli.bench.report import report_figures

    parse_lengths(prompt), parse_lengths(new)  # a mistake shows before the model is loaded
    with subject.opened(serving, engine) as session:
        workloads = _workloads(count, prompt, new, session.vocab_size, repeat)
        figures = measure(Ours(session.llm), workloads, warmups=repeat.warmups)
        about = {**_about(session), **_of_bandwidth(session, figures)}
        if count > 1:
            about |= _of_floor(session, figures, workloads[repeat.warmups :])
    report_figures({"llmfw": [figures]}, about, as_json=as_json)


def _workloads(
    count: int, prompt: str, new: str, vocab: int, repeat: RepeatOptions
) -> list[Workload]:
    from llmfw_cli.bench.lengths import parse_lengths
    from llmfw_cli.bench.workload import draw_workload

    lengths = parse_lengths(prompt), parse_lengths(new)
    return [draw_workload(count, *lengths, vocab, seed) for seed in repeat.seeds]


def _room_for(batch: int, engine: EngineOptions) -> EngineOptions:
    """As many sequences in flight as the largest batch, where the user does not say."""
    from llmfw.errors import UsageError

    if engine.max_num_seqs is None:
        return replace(engine, max_num_seqs=max(8, batch))
    if engine.max_num_seqs < batch:
        raise UsageError(
            f"a batch of {batch}, but --max-num-seqs is {engine.max_num_seqs}",
            hint="raise --max-num-seqs or leave it out",
        )
    return engine


def _require_room(context: int, new_tokens: int, session: Session) -> None:
    """Refuse contexts that the model has no positions for, before anything is measured."""
    from llmfw.errors import UsageError

    longest = session.llm.loaded.model_config.max_model_len
    if longest is not None and context + new_tokens > longest:
        raise UsageError(
            f"a context of {context} and {new_tokens} new tokens, but sequences have at most "
            f"{longest}",
            hint=f"give --context, here at most {longest - new_tokens}, or fewer --new-tokens"
            if longest > new_tokens
            else "give a smaller --context and fewer --new-tokens",
        )


def _step_bench(session: Session, repeat: RepeatOptions) -> StepBench:
    from llmfw_cli.bench.steps import StepBench

    return StepBench(
        session.llm,
        session.vocab_size,
        runs=repeat.runs,
        warmups=repeat.warmups,
        seed=repeat.load_seed,
    )


def _about(session: Session) -> dict[str, Any]:
    from llmfw_cli.bench.machine import hardware

    return {**session.about(), "hardware": hardware(session.config.device)}


def _of_bandwidth(session: Session, figures: Figures) -> dict[str, Any]:
    """Which share of the memory's bandwidth decoding reached; of one prompt at a time only."""
    from llmfw_cli.bench.costs import ModelCosts
    from llmfw_cli.bench.machine import read_bandwidth

    if figures.decode_tokens_per_s is None:
        return {}
    bandwidth = read_bandwidth(session.config.device)
    context = figures.prompt_tokens + figures.new_tokens / 2
    nbytes = ModelCosts(session.llm.loaded.model).decode_bytes(1, context)
    return {
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "decode_gb_a_token": round(nbytes / 1e9, 4),
        "decode_of_floor": round(figures.decode_tokens_per_s * nbytes / bandwidth, 3),
    }


def _of_floor(session: Session, figures: Figures, timed: list[Workload]) -> dict[str, Any]:
    """The least time of such workloads at the machine's measured rates, and its share of ours."""
    from llmfw_cli.bench.costs import ModelCosts
    from llmfw_cli.bench.machine import matrix_rate, read_bandwidth

    config, costs = session.config, ModelCosts(session.llm.loaded.model)
    bandwidth, rate = read_bandwidth(config.device), matrix_rate(config.device, config.dtype)
    floor = statistics.median(costs.workload_seconds(each, bandwidth, rate) for each in timed)
    return {
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "matrix_tflops": round(rate / 1e12, 4),
        "floor_s": float(f"{floor:.4g}"),
        "of_floor": round(floor / figures.total_s, 3),
    }
