"""Are two engines as good as each other? A test on paired differences that has to be earned.

That no difference was found says little when few samples were looked at. So the test is one of
equivalence: two one-sided t tests (D. J. Schuirmann, J. Pharmacokin. Biopharm. 15, 1987) of the
hypothesis that the mean difference is a margin or more. It is rejected, and the engines are
equivalent, where the 1 - 2 * alpha confidence interval of the mean lies inside the margin. Where
several measures must all be equivalent, the chance to be wrong stays at most alpha.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from llmfw.errors import UsageError


class Verdict(StrEnum):
    """What the test found."""

    EQUIVALENT = "equivalent"
    DIFFERENT = "different"
    NOT_SHOWN = "not shown"


@dataclass(frozen=True)
class Equivalence:
    """The test of one measure.

    Args:
        count: Samples.
        mean: Of the differences, ours minus theirs.
        low, high: The 1 - 2 * alpha confidence interval of the mean.
        margin: What the mean may differ by, in the measure's own unit.
        alpha: The chance to call engines equivalent that differ by the margin.
        verdict: Equivalent: the interval lies inside the margin. Different: it does not, and leaves
            zero out. Not shown: the samples are too few, or too unlike, to tell.
        enough: About how many samples would tell, where that is what is missing.
    """

    count: int
    mean: float
    low: float
    high: float
    margin: float
    alpha: float
    verdict: Verdict
    enough: int | None = None


def equivalence(differences: Sequence[float], *, margin: float, alpha: float) -> Equivalence:
    """Test the differences of pairs for equivalence.

    Args:
        differences: Ours minus theirs, one a sample.
        margin: What their mean may be, above 0.
        alpha: In (0, 0.5).

    Raises:
        UsageError: For fewer than two samples, or a margin or alpha out of range.
    """
    require_several(len(differences))
    if not margin > 0 or not 0 < alpha < 0.5:
        raise UsageError(
            f"margin {margin:g} or alpha {alpha:g} cannot be",
            hint="a margin is above 0, alpha between 0 and 0.5",
        )
    count = len(differences)
    if not all(math.isfinite(each) for each in differences):
        nan = math.nan
        return Equivalence(count, nan, nan, nan, margin, alpha, Verdict.DIFFERENT)
    mean = statistics.fmean(differences)
    spread = statistics.stdev(differences)
    half = _t_quantile(count - 1, 1 - alpha) * spread / math.sqrt(count)
    low, high = mean - half, mean + half
    enough = None
    if -margin < low and high < margin:
        verdict = Verdict.EQUIVALENT
    elif low > 0 or high < 0:
        verdict = Verdict.DIFFERENT
    else:
        verdict = Verdict.NOT_SHOWN
        enough = _enough(spread, margin - abs(mean), alpha)
    return Equivalence(count, mean, low, high, margin, alpha, verdict, enough)


def require_several(count: int) -> None:
    """Refuse fewer samples than have a scatter.

    Raises:
        UsageError: For fewer than two.
    """
    if count < 2:
        what = "one sample says" if count == 1 else "no samples say"
        raise UsageError(f"{what} nothing of accuracy", hint="raise --max-ite")


def means(values: Sequence[float], groups: Sequence[int]) -> list[float]:
    """The mean of each group's values.

    Args:
        values: One a sample.
        groups: The group of each.
    """
    members: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    return [statistics.fmean(each) for each in members.values()]


def _enough(spread: float, room: float, alpha: float) -> int | None:
    """About how many samples make half the interval as narrow as `room`."""
    if room <= 0:
        return None
    return math.ceil((statistics.NormalDist().inv_cdf(1 - alpha) * spread / room) ** 2) + 1


def _t_quantile(freedom: int, probability: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))
