"""Accuracy, NLL and ECE by hand, and that evaluation counts every image and averages probabilities."""

import itertools
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from metaperturb.data.arrays import from_memory
from metaperturb.data.batches import DeviceImages
from metaperturb.evaluation import evaluate, expected_calibration_error


def data_set(count, num_classes=3, labels=None):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    labels = rng.integers(0, num_classes, count) if labels is None else labels
    return DeviceImages(from_memory("made-test", images, labels, "0123456789"[:num_classes]), torch.device("cpu"))


class Recorder(nn.Module):
    """Logits are a fixed function of the image; remembers how it was called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm2d(3)
        self.batches, self.modes, self.range = [], set(), []

    def forward(self, x):
        self.batches.append(len(x))
        self.range += [x.min().item(), x.max().item()]
        logits = 5 * self.fc(self.norm(x).mean(dim=(2, 3)))
        self.modes.add((self.training, self.norm.training, logits.requires_grad))
        return logits


def ece_by_loop(confidence, correct, bins):
    """Naeini et al. 2015, bin by bin."""
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


@pytest.mark.parametrize(
    ("confidence", "correct", "bins", "expected"),
    [
        ([1.0, 1.0], [0, 0], 15, 1.0),
        ([0.8, 0.8, 0.8, 0.8, 0.8], [1, 1, 1, 1, 0], 15, 0.0),
        ([0.25, 0.75], [1, 0], 2, 0.75),  # two bins: (0.75 + 0.75) / 2; one bin would give 0
        ([0.61, 0.69, 0.95], [1, 0, 1], 10, (2 / 3) * abs(0.5 - 0.65) + (1 / 3) * 0.05),
        ([0.5, 0.51], [0, 1], 2, (0.5 + 0.49) / 2),  # 0.5 belongs to the lower bin
        ([0.0, 1.0 + 1e-7], [0, 1], 15, 0.0),  # a sum of float32 probabilities may exceed 1
    ],
)
def test_calibration_error_by_hand(confidence, correct, bins, expected):
    value = expected_calibration_error(torch.tensor(confidence).double(), torch.tensor(correct).double(), bins)
    assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (90, 100), (7, 1), (1, 3)])
def test_every_image_counts(count, batch_size):
    data, model = data_set(count), Recorder().eval()
    result = evaluate(model, data, samples=1, batch_size=batch_size)
    assert sum(model.batches) == count and max(model.batches) <= batch_size
    assert model.batches[:-1] == [batch_size] * (len(model.batches) - 1)
    with torch.no_grad():
        x = torch.from_numpy(data.arrays.images.astype(np.float32)) / 127.5 - 1
        p = (5 * model.fc(x.mean(dim=(2, 3)) / (1 + 1e-5) ** 0.5)).softmax(dim=1).double().numpy()
    labels = data.arrays.labels
    assert result["accuracy"] == pytest.approx((p.argmax(axis=1) == labels).mean())
    assert result["nll"] == pytest.approx(-np.log(p[np.arange(count), labels]).mean(), rel=1e-4)
    ece = ece_by_loop(p.max(axis=1).tolist(), (p.argmax(axis=1) == labels).tolist(), 15)
    assert result["ece"] == pytest.approx(ece, abs=1e-4) and result["samples"] == 1


@pytest.mark.parametrize(
    "logits",
    [
        torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 8.0]]),
        torch.tensor([[200.0, 0.0], [300.0, 0.0]]),  # in float32 exp(−200) is 0
        # Summed in bfloat16, predictions would stop to count once their sum is some hundred times each.
        torch.randn(100, 10, generator=torch.Generator().manual_seed(0)).bfloat16(),
    ],
)
@pytest.mark.parametrize("batch_size", [2, 4])
def test_samples_are_averaged_as_probabilities(logits, batch_size):
    model, rows, labels, classes = nn.Module(), itertools.cycle(logits), np.array([0, 0, 0, 1]), logits.shape[1]
    model.forward = Mock(side_effect=lambda x: next(rows).expand(len(x), -1))
    with torch.autocast("cpu", torch.bfloat16, enabled=logits.dtype == torch.bfloat16):
        result = evaluate(model, data_set(4, classes, labels), samples=len(logits), batch_size=batch_size)
    p = np.exp(logits.double().numpy())
    mean = (p / p.sum(axis=1, keepdims=True)).mean(axis=0)
    accuracy = (labels == mean.argmax()).mean()
    assert model.forward.call_count == len(logits) * 4 // batch_size and result["samples"] == len(logits)
    assert result["nll"] == pytest.approx(-np.log(mean[labels]).mean(), rel=1e-5)
    assert result["accuracy"] == accuracy
    assert result["ece"] == pytest.approx(abs(accuracy - mean.max()), abs=1e-5)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("training", "frozen"), [(True, False), (True, True), (False, False)])
def test_evaluation_mode_without_gradients_and_the_mode_restored(training, frozen, fails):
    model = Recorder().train(training)
    model.norm.train(training and not frozen)
    statistics = model.norm.running_mean.clone()
    if fails:
        model.fc.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(model, data_set(5), samples=2, batch_size=3)
    else:
        evaluate(model, data_set(5), samples=2, batch_size=3)
        assert model.modes == {(False, False, False)}
        assert -1 <= min(model.range) < -0.9 and 0.9 < max(model.range) <= 1
    assert model.training == training and model.norm.training == (training and not frozen)
    assert torch.equal(model.norm.running_mean, statistics) and torch.is_grad_enabled()
