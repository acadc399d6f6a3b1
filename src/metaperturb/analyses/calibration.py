"""Figure 6 (d): how well confidence agrees with accuracy, and what Monte-Carlo samples buy.

All counts of samples come from one pass over the draws: of 100 draws, predictions by 20 samples are five means over 20
draws each, and by 5 samples twenty means over 5. So small counts, which scatter most, come with their scatter. Of
counts that do not divide the largest one, the last draws go unused.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, pstdev
from typing import Any

import torch
from torch import Tensor

from metaperturb.analyses.records import begun, check_comparable
from metaperturb.config import option
from metaperturb.data.batches import DeviceImages, normalize
from metaperturb.errors import UserError
from metaperturb.evaluation import ECE_BINS, metrics, reliability_bins
from metaperturb.provenance import provenance
from metaperturb.randomness import seed_torch
from metaperturb.runs import StepProgress
from metaperturb.storage import load_tensors, save_json, save_tensors
from metaperturb.trained import TrainedRun
from metaperturb.training import autocast

SAVE_SECONDS = 30  # between two partial results


@dataclass(frozen=True)
class Sampling:
    """Which predictions are examined."""

    counts: list[int] = option([1, 5, 20, 100], "Monte-Carlo samples of a prediction; the largest is shown", low=1)
    batch_size: int = option(500, "images a forward pass", low=1)
    seed: int = option(0, "of the noise")

    def __post_init__(self) -> None:
        if not self.counts:
            raise UserError("counts: none is given")


def measure_calibration(run: TrainedRun, sampling: Sampling, path: Path) -> dict[str, Any]:
    """Examine a run's network on every test image (of its `eval_split`), and write what was found to `path`.

    Every half minute what is known is written beside `path`; called again after it was cut off, it goes on from there,
    to the same numbers (`seconds` aside).

    Returns:
        the content of `path`, read from there if the file exists: what it is about; `counts`, each of `samples`, lists
        over the repetitions of `accuracy`, `ece` in [0, 1] and `nll` in nats, and `seconds` of one prediction of all
        images; `reliability` of the largest count, lists over the bins of `count`, `confidence` and `accuracy` (means;
        None where a bin is empty); `seconds_per_sample`; versions and hardware.

    Raises:
        UserError: `path` holds other results, or the network returns what is not finite.
    """
    counts = sorted(set(sampling.counts)) if run.stochastic else [1]
    settings = {"counts": sorted(set(sampling.counts)), "batch_size": sampling.batch_size, "seed": sampling.seed}
    parts = {"counts": [], "reliability": {}}
    content = begun(path, run, "calibration", settings, parts)
    if content["counts"]:
        return content
    about = {key: value for key, value in content.items() if key not in parts}
    images = DeviceImages(run.test, next(run.model.parameters()).device)
    labels = images.take(torch.arange(len(run.test), device=images.device))[1]
    examined: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    totals: dict[int, Tensor] = {}  # of each count, the log of the sum of the samples since its last mean
    seconds: list[float] = []  # of each sample
    partial = path.with_suffix(".partial.pt")
    if partial.exists() and (state := load_tensors(partial))["about"] == about:
        examined, seconds = state["examined"], state["seconds"]
        totals = {count: total.to(images.device) for count, total in state["totals"].items()}
    progress = StepProgress(f"Monte-Carlo samples of {run.dir.name}", counts[-1], len(seconds))
    saved = time.monotonic()
    for done in range(len(seconds) + 1, counts[-1] + 1):
        began = time.monotonic()
        seed_torch(sampling.seed, 0, "calibration", done - 1)
        log_p = _sample(run, images, sampling.batch_size)
        seconds.append(time.monotonic() - began)
        for count in counts:
            totals[count] = log_p if (done - 1) % count == 0 else torch.logaddexp(totals[count], log_p)
            if done % count == 0:
                mean = totals[count] - math.log(count)
                examined[count].append(metrics(mean, labels))
        progress.update(done)
        if time.monotonic() - saved > SAVE_SECONDS and done < counts[-1]:
            save_tensors({"about": about, "examined": examined, "seconds": seconds, "totals": totals}, partial)
            saved = time.monotonic()
    progress.close()
    each = median(seconds[1:] or seconds)  # the first one starts things up
    confidence, prediction = mean.exp().max(dim=1)
    bins = bin_means(*(column.tolist() for column in reliability_bins(confidence, prediction == labels)))
    content = {
        **about,
        "counts": [{"samples": count, **_columns(examined[count]), "seconds": count * each} for count in counts],
        "reliability": {"samples": counts[-1], **bins},
        "seconds_per_sample": each,
        **provenance(images.device),
    }
    save_json(content, path)
    partial.unlink(missing_ok=True)
    return content


@torch.no_grad()
def _sample(run: TrainedRun, images: DeviceImages, batch_size: int) -> Tensor:
    """Log-probabilities `[N, K]` of all test images, by one draw of the noise."""
    chunks = torch.arange(len(run.test), device=images.device).split(batch_size)
    with autocast(images.device, run.config.precision):
        log_p = torch.cat([run.model(normalize(images.take(chunk)[0])) for chunk in chunks]).float().log_softmax(dim=1)
    if not torch.isfinite(log_p).all():  # waits for the device, so that the time is that of the work
        raise UserError(f"{run.dir}: the network returns numbers that are not finite")
    return log_p


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def bin_means(count: Sequence[float], confidence: Sequence[float], correct: Sequence[float]) -> dict[str, list]:
    """Counts and means from sums over bins; None where a bin is empty."""
    return {
        "count": [int(n) for n in count],
        "confidence": [c / n if n else None for n, c in zip(count, confidence, strict=True)],
        "accuracy": [c / n if n else None for n, c in zip(count, correct, strict=True)],
    }


def calibration_curves(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Numbers as `plots.plot_reliability` and `plots.plot_samples` draw them.

    Args:
        results: name in the picture → of each of its runs (seeds) what `measure_calibration` returned.

    Returns:
        name → `samples`, the largest count, with its `ece` `[seeds]` and `reliability` (bins pooled over seeds);
        `counts`, each of `samples` and, `[seeds]` each, `accuracy`, `nll`, `ece` (means over repetitions),
        `accuracy_scatter`, `ece_scatter` (standard deviations over repetitions, 0 of a single one), `seconds`.

    Raises:
        UserError: the results are of different images or settings.
    """
    check_comparable(results)
    return {name: _curves(runs) for name, runs in results.items()}


def _curves(runs: list[dict[str, Any]]) -> dict[str, Any]:
    counts = []
    for of_runs in zip(*(run["counts"] for run in runs), strict=True):
        means = {key: [sum(c[key]) / len(c[key]) for c in of_runs] for key in ("accuracy", "nll", "ece")}
        scatter = {f"{key}_scatter": [pstdev(c[key]) for c in of_runs] for key in ("accuracy", "ece")}
        seconds = [c["seconds"] for c in of_runs]
        counts.append({"samples": of_runs[0]["samples"], **means, **scatter, "seconds": seconds})
    bins = [run["reliability"] for run in runs]
    sums = [
        [sum(b["count"][k] * (1 if key == "count" else b[key][k] or 0) for b in bins) for k in range(ECE_BINS)]
        for key in ("count", "confidence", "accuracy")
    ]
    return {
        "samples": counts[-1]["samples"],
        "ece": counts[-1]["ece"],
        "reliability": bin_means(*sums),
        "counts": counts,
    }
