"""`llmfw bench`: how fast a model answers, and how that compares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.groups import OptionGroup, takes_groups
from llmfw_cli.options import CommonOptions, JsonOption, ModelOption, ServingOptions
from llmfw_cli.output import note, write_json, write_table
from llmfw_cli.session import open_session

if TYPE_CHECKING:
    from llmfw_cli.bench.measure import Figures, Runner

app = typer.Typer(help="Measure a model's speed.", no_args_is_help=True)

LOAD = "Load"


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
        int, typer.Option(help="Seed of the prompts' random tokens.", rich_help_panel=LOAD)
    ] = 0


@app.command()
@takes_groups
def latency(
    common: CommonOptions,
    model: ModelOption,
    serving: ServingOptions,
    prompt_len: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt.", rich_help_panel=LOAD)
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to make.", rich_help_panel=LOAD)
    ] = 128,
    json: JsonOption = False,
    *,
    repeat: RepeatOptions,
    engine: EngineOptions,
) -> None:
    """One prompt at a time: the time to the first token, and tokens a second after it."""
    from llmfw_cli.bench.measure import Ours, measure

    with open_session(model, serving, engine) as session:
        vocab = session.vocab_size
        figures = measure(
            Ours(session.llm),
            _one_prompts(prompt_len, new_tokens, vocab, repeat),
            warmups=repeat.warmups,
        )
        _report({"llmfw": [figures]}, session.about(), json)


@app.command()
@takes_groups
def throughput(
    common: CommonOptions,
    model: ModelOption,
    serving: ServingOptions,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts given at once.", rich_help_panel=LOAD)
    ] = 16,
    shortest: Annotated[
        int, typer.Option(min=1, help="Tokens of the shortest prompt.", rich_help_panel=LOAD)
    ] = 128,
    longest: Annotated[
        int, typer.Option(min=1, help="Tokens of the longest prompt.", rich_help_panel=LOAD)
    ] = 248,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to make for each.", rich_help_panel=LOAD)
    ] = 128,
    json: JsonOption = False,
    *,
    repeat: RepeatOptions,
    engine: EngineOptions,
) -> None:
    """Many prompts at once: new tokens a second over all of them."""
    from llmfw.errors import UsageError
    from llmfw_cli.bench.measure import Ours, measure
    from llmfw_cli.bench.workload import many_prompts

    if shortest > longest:
        raise UsageError("--shortest is greater than --longest", hint="swap them")
    with open_session(model, serving, engine) as session:
        workloads = [
            many_prompts(num_prompts, shortest, longest, new_tokens, session.vocab_size, seed)
            for seed in _seeds(repeat)
        ]
        figures = measure(Ours(session.llm), workloads, warmups=repeat.warmups)
        _report({"llmfw": [figures]}, session.about(), json)


@app.command()
@takes_groups
def compare(
    common: CommonOptions,
    model: ModelOption,
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
    from llmfw_cli.bench.machine import read_bandwidth
    from llmfw_cli.bench.measure import Ours
    from llmfw_cli.bench.peer import Transformers

    with open_session(model, serving, engine) as session:
        bandwidth = read_bandwidth(session.config.device)
        peer = Transformers(
            session.llm.loaded.source.model_dir, session.config.dtype, session.config.device
        )
        ours, theirs = _three([Ours(session.llm), peer], session.vocab_size, repeat)
        about = {**session.about(), "read_bandwidth_gb_per_s": round(bandwidth / 1e9, 2)}
        decode = ours[0].decode_tokens_per_s or 0.0
        about["decode_share_of_bandwidth"] = round(decode * session.weight_bytes / bandwidth, 3)
    _report({"llmfw": ours, "transformers": theirs}, about, json)


def _three(runners: Sequence[Runner], vocab: int, repeat: RepeatOptions) -> Iterator[list[Figures]]:
    """The three workloads of `compare` by each runner, in turn."""
    from llmfw_cli.bench.measure import measure_in_turn
    from llmfw_cli.bench.workload import many_prompts

    rows = []
    for workloads in (
        _one_prompts(128, 128, vocab, repeat),
        _one_prompts(1024, 1, vocab, repeat),
        [many_prompts(16, 128, 248, 128, vocab, seed) for seed in _seeds(repeat)],
    ):
        note(f"measuring {workloads[0].name}")
        rows.append(measure_in_turn(runners, workloads, warmups=repeat.warmups))
    return map(list, zip(*rows, strict=True))


def _one_prompts(length: int, new_tokens: int, vocab: int, repeat: RepeatOptions) -> list[Any]:
    from llmfw_cli.bench.workload import one_prompt

    return [one_prompt(length, new_tokens, vocab, seed) for seed in _seeds(repeat)]


def _seeds(repeat: RepeatOptions) -> range:
    """A seed for each run, so that no run meets the prefix cache of another."""
    first = repeat.load_seed * 1000
    return range(first, first + repeat.warmups + repeat.runs)


def _report(figures: dict[str, list[Figures]], about: dict[str, Any], as_json: bool) -> None:
    """Print the figures, and the ratios where there are two engines."""
    ratios = _ratios(figures)
    if as_json:
        measured = {name: [each.as_json() for each in rows] for name, rows in figures.items()}
        write_json({**about, "measured": measured, **({"ratios": ratios} if ratios else {})})
        return
    heads = ("engine", "workload", "first token s", "prefill tok/s", "decode tok/s", "tok/s")
    rows = [
        [
            name,
            each.workload,
            f"{each.first_token_s:.3f}",
            _number(each.prefill_tokens_per_s),
            _number(each.decode_tokens_per_s),
            _number(each.tokens_per_s),
        ]
        for name, of_engine in figures.items()
        for each in of_engine
    ]
    write_table(heads, rows)
    for name, ratio in ratios.items():
        note(f"{name}: {ratio:.2f} x transformers")
    for name, value in about.items():
        if not isinstance(value, dict):
            note(f"{name}: {value}")


def _ratios(figures: dict[str, list[Figures]]) -> dict[str, float]:
    if len(figures) != 2:
        return {}
    ours, theirs = figures.values()
    return {
        "decode": round(
            (ours[0].decode_tokens_per_s or 0) / (theirs[0].decode_tokens_per_s or 1), 3
        ),
        "prefill": round(theirs[1].first_token_s / ours[1].first_token_s, 3),
        "concurrent": round(ours[2].tokens_per_s / theirs[2].tokens_per_s, 3),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
