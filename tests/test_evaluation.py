"""Accuracy, NLL and ECE by hand, and that evaluation counts every image and averages probabilities."""

import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from metaperturb import MetaPerturb, attach, models, prediction
from metaperturb.data.arrays import ImageArrays
from metaperturb.data.batches import DeviceImages
from metaperturb.evaluation import evaluate, expected_calibration_error


def data_set(count, num_classes=3, seed=0, size=8, labels=None):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    labels = rng.integers(0, num_classes, count) if labels is None else labels
    names = tuple(map(str, range(num_classes)))
    arrays = ImageArrays(images, np.asarray(labels, dtype=np.int64), names, "0" * 8, "made-test")
    return DeviceImages(arrays, torch.device("cpu"))


class Recorder(nn.Module):
    """Logits are a fixed function of the image; remembers how it was called."""

    def __init__(self, num_classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, num_classes)
        self.norm = nn.BatchNorm2d(3)
        self.batches, self.modes, self.gradients, self.lowest, self.highest = [], [], [], 1.0, -1.0

    def forward(self, x):
        self.batches.append(len(x))
        self.modes.append((self.training, self.norm.training))
        self.lowest, self.highest = min(self.lowest, x.min().item()), max(self.highest, x.max().item())
        logits = 5 * self.fc(self.norm(x).mean(dim=(2, 3)))
        self.gradients.append(logits.requires_grad)
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


# --- calibration error


@pytest.mark.parametrize(
    ("confidence", "correct", "bins", "expected"),
    [
        ([1.0, 1.0], [1, 1], 15, 0.0),
        ([1.0, 1.0], [0, 0], 15, 1.0),
        ([0.8, 0.8, 0.8, 0.8, 0.8], [1, 1, 1, 1, 0], 15, 0.0),
        ([0.9, 0.9], [1, 0], 10, 0.4),
        ([0.25, 0.75], [1, 0], 2, 0.75),  # two bins: (0.75 + 0.75) / 2; one bin would give 0
        ([0.95, 0.95, 0.55, 0.55], [1, 1, 0, 1], 10, 0.5 * 0.05 + 0.5 * 0.05),
        ([0.61, 0.69, 0.95], [1, 0, 1], 10, (2 / 3) * abs(0.5 - 0.65) + (1 / 3) * 0.05),
        ([0.5, 0.51], [0, 1], 2, (0.5 + 0.49) / 2),  # 0.5 belongs to the lower bin
        ([0.0, 1.0 + 1e-7], [0, 1], 15, 0.0),  # a sum of float32 probabilities may exceed 1
    ],
)
def test_calibration_error_by_hand(confidence, correct, bins, expected):
    value = expected_calibration_error(
        torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct).double(), bins
    )
    assert value == pytest.approx(expected, abs=1e-6)


def test_calibration_error_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator, dtype=torch.float64)
    correct = (torch.rand(500, generator=generator) < 0.6).double()
    for bins in (1, 7, 15, 100):
        value = expected_calibration_error(confidence, correct, bins)
        assert value == pytest.approx(ece_by_loop(confidence.tolist(), correct.tolist(), bins), abs=1e-12)


# --- evaluate


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (5, 100), (7, 1), (1, 3)])
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
    assert result["ece"] == pytest.approx(ece, abs=1e-4)
    assert result["samples"] == 1


class Alternating(nn.Module):
    """Logits of a fixed list, one after the other."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = torch.as_tensor(logits), 0

    def forward(self, x):
        logits = self.logits[self.calls % len(self.logits)]
        self.calls += 1
        return logits.expand(len(x), -1)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_samples_are_averaged_as_probabilities(batch_size):
    logits = [[0.0, 0.0], [3.0, 0.0], [0.0, 8.0]]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mean = p.mean(axis=0)
    model = Alternating(logits)
    result = evaluate(model, data_set(4, 2, labels=[0, 0, 0, 1]), samples=3, batch_size=batch_size)
    assert model.calls == 3 * 4 // batch_size
    assert result["samples"] == 3
    assert result["nll"] == pytest.approx(-(3 * np.log(mean[0]) + np.log(mean[1])) / 4, rel=1e-5)
    # neither the mean of the log-probabilities nor that of the logits
    assert abs(result["nll"] + (3 * np.log(p[:, 0]).mean() + np.log(p[:, 1]).mean()) / 4) > 0.1
    assert result["accuracy"] == (0.25 if mean[1] > mean[0] else 0.75)
    hits = 0.25 if mean[1] > mean[0] else 0.75
    assert result["ece"] == pytest.approx(abs(hits - mean.max()), abs=1e-5)


def test_a_network_that_computes_in_bfloat16_is_averaged_as_exactly():
    """Summed in bfloat16, a hundred predictions would stop to count once their sum is some hundred times each."""
    logits = torch.randn(100, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = Alternating(logits)
    labels = [0, 1, 2, 3, 4]
    with torch.autocast("cpu", torch.bfloat16):
        result = evaluate(model, data_set(5, 10, labels=labels), samples=100, batch_size=5)
    p = np.exp(logits.double().numpy())
    mean = (p / p.sum(axis=1, keepdims=True)).mean(axis=0)
    assert result["nll"] == pytest.approx(-np.log(mean[labels]).mean(), rel=1e-5)
    assert result["ece"] == pytest.approx(abs((mean.argmax() in labels) / 5 - mean.max()), abs=1e-5)


def test_averaging_keeps_tiny_probabilities():
    """In float32 exp(−200) is 0: averaging of plain probabilities would report an infinite NLL."""
    model = Alternating([[200.0, 0.0], [300.0, 0.0]])
    result = evaluate(model, data_set(2, 2, labels=[1, 1]), samples=2, batch_size=2)
    assert result["nll"] == pytest.approx(200 + math.log(2), rel=1e-6)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_mode_without_gradients_and_the_mode_restored(training, frozen, fails):
    model = Recorder().train(training)
    model.norm.train(training and not frozen)
    statistics = model.norm.running_mean.clone()
    data = data_set(5)
    if fails:
        model.fc.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(model, data, samples=2, batch_size=3)
    else:
        evaluate(model, data, samples=2, batch_size=3)
        assert model.modes == [(False, False)] * 4 and model.gradients == [False] * 4
        assert -1 <= model.lowest < -0.9 and 0.9 < model.highest <= 1
    assert model.training == training and model.norm.training == (training and not frozen)
    assert torch.equal(model.norm.running_mean, statistics)
    assert torch.is_grad_enabled()


# --- several draws at once


class Custom(nn.Module):
    """Two convolutions and a linear layer, put together by `join(self, x)`."""

    def __init__(self, join):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.fc, self.join = nn.Linear(4, 5), join

    def forward(self, x):
        return self.fc(self.join(self, x).mean(dim=(2, 3)))


def untracked():
    net = Custom(lambda net, x: net.norm(net.three(net.one(x))))
    net.norm = nn.BatchNorm2d(4, track_running_stats=False)
    return net


NETWORKS = {
    "resnet20": (lambda: models.create("resnet20", 5, 32), None, True),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=5), None, True),
    "googlenet": (lambda: torchvision.models.GoogLeNet(5, init_weights=False, aux_logits=False), None, True),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), None, True),
    "one after the other": (lambda: Custom(lambda net, x: net.three(net.one(x))), ["one", "three"], True),
    "branches": (lambda: Custom(lambda net, x: torch.cat([net.one(x), net.two(x)], dim=3)), ["one", "two"], False),
    "sum of branches": (lambda: Custom(lambda net, x: net.one(x) + net.two(x)), ["one", "two"], False),
    "meets what is before": (lambda: Custom(lambda net, x: torch.cat([net.one(x), net.two(x)], 3)), ["one"], False),
    "reshapes by the images": (lambda: Custom(lambda net, x: net.one(x).view(len(x), 4, -1, 1)), ["one"], False),
    "averages over draws": (
        lambda: Custom(lambda net, x: net.one(x).unflatten(0, (-1, len(x))).mean(0)),
        ["one"],
        False,
    ),
    "statistics of the batch": (untracked, ["one"], False),
    "means of the batch": (lambda: Custom(lambda net, x: net.one(x - 0.5 * x.mean(dim=0))), ["one"], False),
}


@pytest.mark.parametrize(
    ("name", "count"), [*((name, 3) for name in NETWORKS), *((name, 1) for name in [*NETWORKS][4:])]
)
def test_draws_share_what_comes_before_the_first_site_where_the_network_allows(name, count):
    torch.manual_seed(0)
    make, sites, expected = NETWORKS[name]
    model = attach(make(), MetaPerturb(), 32, sites, verbose=False)
    with torch.no_grad():
        model.metaperturb.phi.flat.mul_(30)
        for _ in range(3):
            model(torch.randn(8, 3, 32, 32))
    model.eval()
    x, state = torch.randn(count, 3, 32, 32), torch.get_rng_state()
    assert prediction.bears_draws(model, x) == prediction.bears_draws(model, x) == expected
    assert torch.equal(torch.get_rng_state(), state)
    sizes = []
    next(m for m in model.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(
        lambda _, args: sizes.append(len(args[0]))
    )
    found = prediction.log_prediction(model, x, samples=4)
    assert sizes == [count if expected else 4 * count]
    torch.set_rng_state(state)
    with torch.no_grad():
        p = model(x.repeat(4, 1, 1, 1)).softmax(dim=1).view(4, count, -1)
    assert torch.allclose(found.exp(), p.mean(dim=0), atol=1e-5)
    assert p.std(dim=0).max() > 1e-5


def test_what_was_found_holds_for_the_network_as_it_was_then():
    model = attach(models.create("resnet8", 3, 8), MetaPerturb(), 8, verbose=False).eval()
    fc, x = model.fc, torch.randn(2, 3, 8, 8)
    model.fc = nn.Linear(fc.in_features, 3)
    nn.init.zeros_(model.fc.weight)
    assert not prediction.bears_draws(model, x)  # all outputs are equal, which says nothing
    nn.init.normal_(model.fc.weight)
    assert prediction.bears_draws(model, x)
    for name, value in (("strength", 0.0), ("deterministic", True)):
        before = getattr(model.metaperturb, name)
        setattr(model.metaperturb, name, value)
        assert prediction.log_prediction(model, x, 3).shape == (2, 3)
        setattr(model.metaperturb, name, before)
    model.compile(backend="eager")
    assert prediction.log_prediction(model, x, 3).shape == (2, 3)


def test_many_draws_of_many_images_go_in_parts(monkeypatch):
    torch.manual_seed(0)
    model = attach(models.create("resnet8", 3, 8), MetaPerturb(), 8, verbose=False).eval()
    with torch.no_grad():
        model.metaperturb.phi.flat.mul_(30)
    x, sizes, told = torch.randn(7, 3, 8, 8), [], []
    monkeypatch.setitem(prediction.PIXELS, "cpu", 40 * 64)
    expected = torch.stack([prediction.log_prediction(model, x, 50) for _ in range(9)]).exp()
    model.fc.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    found = prediction.log_prediction(model, x, 50, told.append).exp()
    assert sizes == [40, 40, 20] * 3 + [20, 20, 10] and told[-1] == 1 and told == sorted(set(told))
    assert len(told) == len(sizes)
    deviation = (found - expected.mean(dim=0)) / expected.std(dim=0)
    assert 0.3 < deviation.abs().mean() < 3
