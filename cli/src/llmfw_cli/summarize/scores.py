"""ROUGE (Lin, 2004) through `rouge-score`, Google's implementation, which papers report."""

from __future__ import annotations

from collections.abc import Sequence

from llmfw.errors import UsageError

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
Scores = dict[str, float]


class Rouge:
    """The scorer: F-measures in points from 0 to 100, with Porter's stemmer.

    Raises:
        UsageError: If `rouge-score` is not installed.
    """

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as exc:
            raise UsageError(
                f"rouge-score cannot be imported: {exc}",
                hint='pip install "llmfw-cli[summarize]"',
            ) from exc
        self._scorer = RougeScorer(list(KINDS), use_stemmer=True)

    def __call__(self, reference: str, text: str) -> Scores:
        """Scores of a text against its reference, by kind."""
        found = self._scorer.score(reference, text)
        return {kind: 100.0 * float(found[kind].fmeasure) for kind in KINDS}


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """The mean of each kind."""
    return {kind: sum(each[kind] for each in scores) / len(scores) for kind in KINDS}
