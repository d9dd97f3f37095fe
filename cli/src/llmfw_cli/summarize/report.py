"""What a run found: figures side by side, the test of their differences, and files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmfw.errors import UsageError
from llmfw_cli.output import note, write, write_facts, write_table
from llmfw_cli.summarize.data import Sample
from llmfw_cli.summarize.measure import EngineRun
from llmfw_cli.summarize.scores import KINDS
from llmfw_cli.summarize.statistics import Equivalence, Verdict, equivalence, means

LOSS = "log perplexity"


@dataclass(frozen=True)
class Threshold:
    """What counts as no difference.

    Args:
        alpha: The chance to call engines equivalent that are not.
        rouge: Points of 100 that the mean ROUGE may differ by.
        perplexity: Part that the perplexity may differ by: 0.01 is one in a hundred.
    """

    alpha: float
    rouge: float
    perplexity: float

    def __post_init__(self) -> None:
        """Refuse what is out of range, before anything runs.

        Raises:
            UsageError: If a margin or alpha cannot be.
        """
        if not 0 < self.alpha < 0.5:
            raise UsageError(f"--alpha {self.alpha:g} cannot be", hint="between 0 and 0.5")
        for name, value in (("rouge", self.rouge), ("ppl", self.perplexity)):
            if not 0 < value < math.inf:
                raise UsageError(f"--{name}-margin {value:g} cannot be", hint="above 0")


def compare(
    ours: EngineRun, theirs: EngineRun, threshold: Threshold, articles: Sequence[int] | None = None
) -> dict[str, Equivalence]:
    """The test of every kind of ROUGE, and of the perplexity where it was measured.

    Perplexity is tested as its logarithm, sample by sample: nats a token. Prompts of one article
    are no independent samples: their differences are averaged first, so that articles count.

    Args:
        ours: Our run.
        theirs: The other's, of the same samples.
        threshold: What counts as no difference.
        articles: The article that each sample was made of; None: each has its own.

    Raises:
        UsageError: For fewer than two samples, or a threshold out of range.
    """
    pairs = list(zip(ours.summaries, theirs.summaries, strict=True))
    alpha = threshold.alpha
    groups = range(len(pairs)) if articles is None else articles
    tests = {
        kind: equivalence(
            means([mine.rouge[kind] - other.rouge[kind] for mine, other in pairs], groups),
            margin=threshold.rouge,
            alpha=alpha,
        )
        for kind in KINDS
    }
    if ours.log_likelihoods:
        differences = [a - b for a, b in zip(ours.losses, theirs.losses, strict=True)]
        margin = math.log1p(threshold.perplexity)
        tests[LOSS] = equivalence(means(differences, groups), margin=margin, alpha=alpha)
    return tests


def agreement(ours: EngineRun, theirs: EngineRun) -> int:
    """How many summaries have the same tokens."""
    pairs = zip(ours.summaries, theirs.summaries, strict=True)
    return sum(mine.token_ids == other.token_ids for mine, other in pairs)


def as_json(
    about: Mapping[str, Any],
    runs: Sequence[EngineRun],
    tests: Mapping[str, Equivalence],
) -> dict[str, Any]:
    """All figures as one JSON object."""
    value: dict[str, Any] = {**about, "engines": {run.name: run.as_json() for run in runs}}
    if len(runs) == 2:
        value["same_summaries"] = agreement(*runs)
        value["differences"] = {name: asdict(test) for name, test in tests.items()}
    return value


def show(about: Mapping[str, Any], runs: Sequence[EngineRun], count: int) -> None:
    """Print the figures, an engine a column."""
    write_facts({name: value for name, value in about.items() if not isinstance(value, dict)})
    write("\n")
    figures = [run.as_json() for run in runs]
    rows = [[kind, *(f"{each['rouge'][kind]:.2f}" for each in figures)] for kind in KINDS]
    if figures[0]["perplexity"] is not None:
        rows.append(["perplexity", *(f"{each['perplexity']:.4f}" for each in figures)])
    rows += [
        ["new tokens", *(str(each["new_tokens"]) for each in figures)],
        ["latency s", *(f"{each['latency_s']:.3f}" for each in figures)],
        ["total s", *(f"{each['total_s']:.2f}" for each in figures)],
        ["tokens/s", *(f"{each['tokens_per_s']:.1f}" for each in figures)],
    ]
    write_table(("", *(run.name for run in runs)), rows)
    if len(runs) == 2:
        write(f"\nsame summaries: {agreement(*runs)} of {count}\n")


def show_tests(tests: Mapping[str, Equivalence]) -> None:
    """Print the test of each difference."""
    first = next(iter(tests.values()))
    interval = f"{100 * (1 - 2 * first.alpha):g}% interval"
    rows = [
        [
            name,
            f"{test.mean:+.5f}",
            f"[{test.low:+.5f}, {test.high:+.5f}]",
            f"{test.margin:.5g}",
            _verdict(test),
        ]
        for name, test in tests.items()
    ]
    write("\n")
    write_table(("llmfw - hf", "mean", interval, "margin", "verdict"), rows)


def _verdict(test: Equivalence) -> str:
    if test.verdict is Verdict.NOT_SHOWN and test.enough is not None:
        return f"not shown with {test.count} articles; about {test.enough} would tell"
    return str(test.verdict)


def write_files(
    folder: Path, samples: Sequence[Sample], runs: Sequence[EngineRun], report: Mapping[str, Any]
) -> None:
    """Write summaries.jsonl, a line a sample, and report.json.

    Raises:
        UsageError: If the folder cannot be written.
    """
    lines = []
    for number, sample in enumerate(samples):
        row: dict[str, Any] = {"article": sample.article, "reference": sample.summary}
        for run in runs:
            row[run.name] = asdict(run.summaries[number])
            if run.log_likelihoods:
                row[run.name]["log_likelihood"] = run.log_likelihoods[number]
                row[run.name]["scored_tokens"] = run.scored_tokens[number]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summaries.jsonl").write_text("".join(lines), "utf-8")
        text = json.dumps(report, ensure_ascii=False, indent=2, default=str)
        (folder / "report.json").write_text(text + "\n", "utf-8")
    except OSError as exc:
        raise UsageError(
            f"--output-dir {folder} cannot be written: {exc}", hint="name another"
        ) from exc
    note(f"summaries and report are in {folder}")
