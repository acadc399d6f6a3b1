"""Test accuracy, negative log-likelihood and calibration error of a (stochastic) classifier.

Predictions are averages of softmax over Monte-Carlo samples of the noise (Algorithm 2, line 10).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metaperturb.data.batches import DeviceImages, normalize
from metaperturb.errors import NotFinite
from metaperturb.modes import eval_mode
from metaperturb.prediction import log_prediction

METRICS = ("accuracy", "nll", "ece")
ECE_BINS = 15  # equal-width bins of confidence; the number customary since Guo et al. 2017


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: DeviceImages,
    samples: int,
    batch_size: int,
    tell: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Evaluate on every image of the data set; the model's mode is restored afterwards.

    Args:
        model: images `[B, 3, S, S]` → logits `[B, K]`.
        images: the test set.
        samples: Monte-Carlo samples; 1 for a deterministic model.
        batch_size: images a forward pass, at most.
        tell: called with the share of the work that is done, after each forward pass.

    Returns:
        `accuracy` and `ece` in [0, 1], `nll` in nats, `samples`. `NotFinite` is raised where the model's output is not.
    """
    log_probabilities, labels = [], []
    with eval_mode(model):
        chunks = torch.arange(len(images.arrays), device=images.device).split(batch_size)
        for i, chunk in enumerate(chunks):
            x, y = images.take(chunk)
            log_p = log_prediction(model, normalize(x), samples, lambda s, before=i: tell((before + s) / len(chunks)))
            log_probabilities.append(log_p)
            labels.append(y)
    log_p = torch.cat(log_probabilities)
    bad = (~torch.isfinite(log_p).all(dim=1)).sum().item()
    if bad:
        raise NotFinite(f"the network's output is not finite for {bad} of {len(log_p)} images")
    return {**metrics(log_p, torch.cat(labels)), "samples": samples}


def metrics(log_probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """`accuracy`, `nll` (mean, nats) and `ece` from log-probabilities `[N, K]` and labels `[N]`."""
    confidence, prediction = log_probabilities.exp().max(dim=1)
    correct = (prediction == labels).double()
    nll = -log_probabilities.gather(1, labels[:, None]).mean(dtype=torch.float64)
    return {
        "accuracy": correct.mean().item(),
        "nll": nll.item(),
        "ece": expected_calibration_error(confidence, correct),
    }


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = ECE_BINS) -> float:
    """Naeini et al. 2015: mean over equal-width bins, weighted by their share, of |accuracy − confidence|."""
    _, confidences, hits = reliability_bins(confidence, correct, bins)
    return ((hits - confidences).abs().sum() / len(confidence)).item()


def reliability_bins(confidence: Tensor, correct: Tensor, bins: int = ECE_BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Of each equal-width bin of `confidence` `[N]`: its count, its sum of confidences, and of `correct` `[N]`."""
    confidence = confidence.double()
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)  # bins are (a, b]
    zeros = confidence.new_zeros(bins)
    columns = (torch.ones_like(confidence), confidence, correct.double())
    return tuple(zeros.index_add(0, index, values) for values in columns)
