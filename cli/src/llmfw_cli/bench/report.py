"""Measurements as tables for people and as one JSON object for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmfw_cli.bench.measure import Figures, rounded
from llmfw_cli.output import note, write_json, write_table

if TYPE_CHECKING:
    from llmfw_cli.bench.startup import Start


def report_figures(
    figures: Mapping[str, Sequence[Figures]], about: Mapping[str, Any], *, as_json: bool
) -> None:
    """Workloads by engine, and the ratios where there are two engines."""
    ratios = ratios_of(figures)
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
    for of_engine in figures.values():
        for each in of_engine:
            for kind, values in each.percentiles.items():
                shown = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
                note(f"{each.workload}: {kind} ms: {shown}")
    for name, ratio in ratios.items():
        note(f"{name}: {ratio:.2f} x transformers")
    note_facts(about)


def report_points(
    kind: str, points: Sequence[Any], about: Mapping[str, Any], *, as_json: bool
) -> None:
    """Dataclasses of one kind, one a row."""
    rows = [asdict(point) for point in points]
    if as_json:
        write_json({**about, kind: rounded(rows)})
        return
    write_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])
    note_facts(about)


def report_starts(starts: Sequence[Start], about: Mapping[str, Any], *, as_json: bool) -> None:
    """Phases as rows, kinds of start as columns."""
    if as_json:
        write_json({**about, "startup": rounded([asdict(each) for each in starts])})
        return
    names = list(dict.fromkeys(name for each in starts for name in each.phases))
    rows = [[name, *(f"{each.phases.get(name, 0.0):.3f}" for each in starts)] for name in names]
    rows.append(["total", *(f"{each.total_s:.3f}" for each in starts)])
    write_table(["seconds", *(f"page cache {each.page_cache}" for each in starts)], rows)
    for each in starts:
        if each.weights_gb_per_s is not None and each.file_gb_per_s is not None:
            there = "unknown" if each.resident is None else f"{each.resident:.0%}"
            note(
                f"page cache {each.page_cache} ({there} of the files in memory before): weights "
                f"{each.weights_gb_per_s:.2f} GB/s, a plain read {each.file_gb_per_s:.2f} GB/s"
            )
    note_facts(about)


def ratios_of(figures: Mapping[str, Sequence[Figures]]) -> dict[str, float]:
    """Ours over theirs, of the three workloads of `compare`."""
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


def note_facts(about: Mapping[str, Any]) -> None:
    """What was measured and where, one fact a line; nested facts in one line."""
    for name, value in about.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {each}" for key, each in value.items())
        note(f"{name}: {value}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
