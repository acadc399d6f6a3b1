"""What tables say about seeds: mean, standard deviation, and the interval of a paired difference."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
    """The value that Student's t with `freedom` degrees of freedom stays below with `probability` in [0.5, 1).

    With t = √f · tan θ the density of θ is proportional to (cos θ)^(f − 1), which is summed here.
    """
    edges = np.linspace(0, np.pi / 2, 1_000_001)
    below = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1))
    theta = np.interp(2 * probability - 1, np.concatenate([[0.0], below]) / below[-1], edges)
    return math.sqrt(freedom) * math.tan(theta)
