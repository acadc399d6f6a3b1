"""What tables say about seeds: mean, standard deviation, and the interval of a paired difference."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Summary:
    """Values over seeds. `std` is the unbiased sample standard deviation; None for a single seed, `mean` for none."""

    mean: float | None
    std: float | None
    n: int

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "")


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over `n` seeds that both have; `low` and `high` bound it, None for a single pair."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + (f" [{self.low:+.2f}, {self.high:+.2f}]" if self.low is not None else "")


def summarize(values: Sequence[float]) -> Summary:
    """
    >>> str(summarize([1.0, 2.0, 3.0]))
    '2.00 ± 1.00'
    """
    mean = statistics.fmean(values) if values else None
    return Summary(mean, statistics.stdev(values) if len(values) > 1 else None, len(values))


def evidence(accuracies: Mapping[int, float], diverged: int) -> dict[str, float | int | None]:
    """What a choice records of a candidate: mean and deviation, or how many seeds diverged, which rules it out."""
    summary = summarize([*accuracies.values()])
    return {"diverged": diverged} if diverged else {"mean": summary.mean, "std": summary.std, "seeds": summary.n}


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Student's t interval of mean(ours − baseline) over the seeds that both have; None if they share none.

    Pairing takes out what seeds have in common: initial weights and the order of the data.
    """
    seeds = sorted(ours.keys() & baseline.keys())
    if not seeds:
        return None
    gaps = summarize([ours[seed] - baseline[seed] for seed in seeds])
    if gaps.std is None:
        return Difference(gaps.mean, None, None, 1)
    half = t_quantile((1 + LEVEL) / 2, gaps.n - 1) * gaps.std / math.sqrt(gaps.n)
    return Difference(gaps.mean, gaps.mean - half, gaps.mean + half, gaps.n)


def t_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t with `freedom` degrees of freedom stays below with `probability` in [0.5, 1)."""
    low, high = 0.0, math.pi / 2  # of the angle whose tangent it is, but for a factor
    for _ in range(100):  # bisection, to the last bit
        middle = (low + high) / 2
        below = t_cdf(math.sqrt(freedom) * math.tan(middle), freedom) < probability
        low, high = (middle, high) if below else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def t_cdf(t: float, freedom: int) -> float:
    """P(T ≤ t) for t ≥ 0 and whole degrees of freedom: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle, odd = math.atan2(t, math.sqrt(freedom)), freedom % 2
    cosine, sine = math.cos(angle), math.sin(angle)
    term = total = (cosine if odd else 1.0) * (freedom > 1)
    for k in range(1 + odd, freedom - 1, 2):
        term *= k / (k + 1) * cosine**2
        total += term
    central = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + central) / 2
