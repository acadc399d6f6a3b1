"""Figure 6 (d): how well confidence agrees with accuracy, and what Monte-Carlo samples buy.

All counts of samples come from one pass over the draws: of 100 draws, predictions by 20 samples are five means over 20
draws each, and by 5 samples twenty means over 5. So small counts, which scatter most, come with their scatter. Of
counts that do not divide the largest one, the last draws go unused.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from metaperturb.analyses import begun
from metaperturb.config import option
from metaperturb.data.batches import DeviceImages, normalize
from metaperturb.errors import UserError
from metaperturb.evaluation import metrics, reliability_bins
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
    """
    settings = {"counts": sorted(set(sampling.counts)), "batch_size": sampling.batch_size, "seed": sampling.seed}
    about = begun(path, run, "calibration", settings, {"counts": [], "reliability": {}})
    if about["counts"]:
        return about
    counts = settings["counts"] if run.stochastic else [1]
    images = DeviceImages(run.test, next(run.model.parameters()).device)
    labels = torch.tensor(run.test.labels)
    # Of each count, what its repetitions gave, and the log of the sum of the samples since its last mean.
    state = {"about": about, "found": {count: [] for count in counts}, "totals": {}, "seconds": []}
    partial = path.with_suffix(".partial.pt")
    if partial.exists() and (saved := load_tensors(partial))["about"] == about:
        state = saved
    found, totals, seconds = state["found"], state["totals"], state["seconds"]
    progress, last = StepProgress(f"Monte-Carlo samples of {run.dir.name}", counts[-1], len(seconds)), time.monotonic()
    for done in range(len(seconds) + 1, counts[-1] + 1):
        began = time.monotonic()
        seed_torch(sampling.seed, 0, "calibration", done - 1)
        log_p = _sample(run, images, sampling.batch_size)
        seconds.append(time.monotonic() - began)
        for count in counts:
            totals[count] = log_p if (done - 1) % count == 0 else torch.logaddexp(totals[count], log_p)
            if done % count == 0:
                mean = totals[count] - math.log(count)
                found[count].append(metrics(mean, labels))
        progress.update(done)
        if time.monotonic() - last > SAVE_SECONDS and done < counts[-1]:
            save_tensors(state, partial)
            last = time.monotonic()
    progress.close()
    each = median(seconds[1:] or seconds)  # the first one starts things up
    confidence, prediction = mean.exp().max(dim=1)
    count, *sums = (column.tolist() for column in reliability_bins(confidence, prediction == labels))
    bins = [[total / n if n else None for total, n in zip(of, count, strict=True)] for of in sums]
    content = about | {
        "counts": [
            {"samples": n, **{key: [one[key] for one in found[n]] for key in found[n][0]}, "seconds": n * each}
            for n in counts
        ],
        "reliability": {"samples": counts[-1], "count": [*map(int, count)], "confidence": bins[0], "accuracy": bins[1]},
        "seconds_per_sample": each,
        **provenance(images.device),
    }
    save_json(content, path)
    partial.unlink(missing_ok=True)
    return content


@torch.no_grad()
def _sample(run: TrainedRun, images: DeviceImages, batch_size: int) -> Tensor:
    """Log-probabilities `[N, K]` of all test images, by one draw of the noise, on the CPU."""
    chunks = torch.arange(len(run.test), device=images.device).split(batch_size)
    with autocast(images.device, run.config.precision):
        log_p = torch.cat([run.model(normalize(images.take(chunk)[0])) for chunk in chunks]).float().log_softmax(dim=1)
    if not torch.isfinite(log_p).all():  # waits for the device, so that the time is that of the work
        raise UserError(f"{run.dir}: the network returns numbers that are not finite")
    return log_p.cpu()
