"""Figures that the pages show are those of the committed JSON that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
README = DOCS.parent / "README.md"


def measured(name: str) -> Any:
    return json.loads((DOCS / "benchmarks" / f"{name}.json").read_text("utf-8"))


def rows_after(page: Path, mark: str) -> list[list[str]]:
    """The cells of the first table after a piece of text, its head left out."""
    text = page.read_text("utf-8")
    table = re.search(r"(?:^\|.*\n)+", text[text.index(mark) :], re.MULTILINE)
    assert table is not None, mark
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[0].splitlines()[2:]]


def shows(cell: str, value: float) -> bool:
    """Whether a cell is the value, rounded to as many decimals as it has."""
    decimals = len(cell.partition(".")[2])
    return float(cell.replace(",", "")) == pytest.approx(value, abs=0.5001 * 10**-decimals)


def test_whole_workloads_on_a_gpu() -> None:
    found = measured("workloads-h100")
    rows = rows_after(DOCS / "benchmarks.md", "| workload | S | S floor |")
    assert len(rows) == 7
    for label, *cells in rows:
        work, _, what = label.partition(":")
        for shape, (ours, floor) in {"S": cells[:2], "L": cells[3:5]}.items():
            point = found[shape][work]
            if work == "Wb":
                batch = int(re.findall(r"batch (\d+)", what)[0])
                (point,) = (each for each in point if each["batch"] == batch)
            if "first token" in what:
                assert shows(ours, point["first_ms"]), label
            elif work == "W3":
                assert shows(ours, point["tokens_per_s"]), label
            else:
                assert shows(ours, point["step_ms"]), label
                assert shows(floor, point["floor_ms"]), label


def test_the_readmes_figures_are_those_of_the_benchmarks() -> None:
    table = rows_after(DOCS / "benchmarks.md", "| workload | S | S floor |")
    shown = {tuple(cells[at : at + 3]) for _, *cells in table for at in (0, 3)}
    rows = rows_after(README, "## How fast it is")
    assert rows
    assert [label for label, *cells in rows if tuple(cells) not in shown] == []


def test_memory_bound_kernels() -> None:
    found, page = measured("memory-bound-h100"), DOCS / "design" / "kernels-cupy.md"
    mark = "## Memory-bound kernels past the L2"
    read, copy = round(found["read_gb_per_s"]), round(found["copy_gb_per_s"])
    head = page.read_text("utf-8").split(mark)[1].split("|")[0]
    assert f"{read:,} GB/s" in head
    assert f"{copy:,}" in head
    times = [(kernel["us"], kernel["of_floor"]) for kernel in found["kernels"]]
    for label, _, us, fraction in rows_after(page, mark):
        assert any(shows(us, time) and shows(fraction, part) for time, part in times), label


def test_whole_models_of_other_families_on_a_gpu() -> None:
    found = measured("families-h100")
    rows = rows_after(DOCS / "families.md", "## Whole models on a GPU")
    assert len(rows) == 12
    for name, batch, *cells, share in rows:
        shape = name.lower().replace("mamba-2 ", "mamba2-")
        (point,) = (each for each in found[shape]["Wf"] if each["batch"] == int(batch))
        for cell, fact in zip(cells, ("step_ms", "floor_ms", "tokens_per_s"), strict=True):
            assert shows(cell, point[fact]), (name, batch, fact)
        assert shows(share.removesuffix(" %"), 100 * point["of_floor"]), (name, batch)
