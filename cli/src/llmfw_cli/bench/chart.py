"""A chart of decode time against batch size, beside the floor, from JSON of measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmfw.errors import UsageError

_NEEDED = ("batch", "step_ms", "floor_ms")


def series_in(document: Any, name: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every list of decode steps in a document of any shape, named by where it stands.

    A decode step is an object with "batch", "step_ms" and "floor_ms", as `llmfw bench decode
    --json` prints them; steps of several contexts make a series each.
    """
    if isinstance(document, Mapping):
        for key, value in document.items():
            yield from series_in(value, f"{name} {key}".strip())
    elif isinstance(document, list):
        points = [each for each in document if _is_point(each)]
        contexts = sorted({point.get("context", 0) for point in points})
        for context in contexts:
            chosen = [point for point in points if point.get("context", 0) == context]
            label = f"{name}, context {context}" if len(contexts) > 1 else name
            if len({point["batch"] for point in chosen}) > 1:
                yield label, sorted(chosen, key=lambda point: point["batch"])


def _is_point(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(field), (int, float)) for field in _NEEDED
    )


def draw(series: Sequence[tuple[str, list[dict[str, Any]]]], title: str, target: Path) -> None:
    """Draw milliseconds a step over the batch size, both logarithmic; the floor is dashed.

    Args:
        series: From `series_in`.
        title: Over the chart.
        target: A file whose ending says the format: .png, .svg, .pdf.

    Raises:
        UsageError: If there is nothing to draw, matplotlib is missing, or it cannot write there.
    """
    if not series:
        raise UsageError(
            "nothing to draw: no two batch sizes of one context were measured",
            hint="measure e.g. --batch 1,8,64",
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise UsageError("charts need matplotlib", hint='pip install "llmfw-cli[chart]"') from exc
    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(series):
        batches = [point["batch"] for point in points]
        axes.plot(batches, [p["step_ms"] for p in points], "o-", color=f"C{number}", label=name)
        axes.plot(
            batches,
            [p["floor_ms"] for p in points],
            "--",
            color=f"C{number}",
            alpha=0.6,
            label=f"{name}, floor",
        )
    ticks = sorted({point["batch"] for _, points in series for point in points})
    axes.set(xscale="log", yscale="log", xlabel="requests of a batch", ylabel="ms a decode step")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks(_round_values(series))
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    try:
        figure.savefig(target, dpi=120, metadata={"Software": None} if _is_png(target) else None)
    except (OSError, ValueError) as exc:
        raise UsageError(f"{target} cannot be written: {exc}") from exc


def _is_png(target: Path) -> bool:
    return target.suffix.lower() == ".png"


def _round_values(series: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[float]:
    """1, 2 and 5 times powers of ten that cover all values."""
    values = [p[field] for _, points in series for p in points for field in _NEEDED[1:]]
    low, high = min(values), max(values)
    ticks = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
    return [tick for tick in ticks if low / 2 <= tick <= high * 2]
