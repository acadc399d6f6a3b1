"""Adversarial training: its examples against their definition, what making them leaves alone, and what it is for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaperturb import models
from metaperturb.config import MetaTestConfig
from metaperturb.methods import create
from metaperturb.methods.adversarial import AdversarialTraining
from metaperturb.trained import load_run


def example(seed=0, **options):
    torch.manual_seed(seed)
    method = AdversarialTraining(**{"eps": 8 / 255, "steps": 7, "step_size": 2 / 255, **options})
    model = models.create("resnet8", 10, 12).train()
    method.prepare(model, None)
    x = torch.randint(0, 256, (16, 3, 12, 12)) / 127.5 - 1
    return method, model, x, torch.arange(16) % 10


def test_the_defaults_are_the_originals():
    method = create(MetaTestConfig(method="adversarial"))
    assert (method.eps, method.steps, method.step_size) == (2 * 8 / 255, 7, 2 * 2 / 255)  # of images in [-1, 1]


@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 0.3, 1.0])
def test_examples_stay_in_the_ball_and_the_range(eps):
    method, _, x, y = example(eps=eps, step_size=eps / 3)
    before = x.clone()
    adversarial, labels = method.batch(x, y)
    assert labels is y and torch.equal(x, before) and not adversarial.requires_grad
    assert (adversarial - x).abs().max() <= 2 * eps + 1e-6 and adversarial.abs().max() <= 1
    assert (adversarial != x).float().mean() > 0.5


def test_examples_by_hand():
    """A linear network: every step adds step_size · sign(w_k − …) of a gradient worked out on paper."""
    method, _, x, y = example(eps=0.1, steps=3, step_size=0.02)
    torch.manual_seed(1)
    linear = nn.Linear(3 * 12 * 12, 10)
    method.prepare(nn.Sequential(nn.Flatten(), linear), None)
    torch.manual_seed(2)
    adversarial, _ = method.batch(x, y)
    torch.manual_seed(2)
    expected = (x + torch.empty_like(x).uniform_(-0.2, 0.2)).clamp(-1, 1)
    weight = linear.weight.detach()
    for _ in range(3):
        p = linear(expected.flatten(1)).detach().softmax(1)
        gradient = (p - F.one_hot(y, 10)) @ weight  # of the loss of each image
        expected = expected + 0.04 * gradient.sign().view_as(x)
        expected = torch.min(torch.max(expected, x - 0.2), x + 0.2).clamp(-1, 1)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-6)


def test_the_network_is_attacked_as_it_trains_and_left_as_it_was():
    method, model, x, y = example()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    trained_on = []
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, args, out: trained_on.append(out.detach().mean(dim=(0, 2, 3))))
    method.batch(x, y)
    assert len(trained_on) == 7
    assert all(mean.abs().max() < 1e-4 for mean in trained_on)  # statistics of the batch: mean 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_bfloat16_examples():
    method, model, x, y = example(precision="bfloat16")
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    adversarial, _ = method.batch(x, y)
    assert set(seen) == {torch.bfloat16} and adversarial.dtype == torch.float32
    assert (adversarial - x).abs().max() <= 2 * 8 / 255 + 1e-6
    assert F.cross_entropy(model(adversarial), y) > F.cross_entropy(model(x), y)


def test_it_makes_robust(trained_runs):
    """By an attack of its own, that neither training nor the analyses know: the sign of one gradient at the image."""
    accuracy = {}
    for name in ("base", "adversarial"):
        run = load_run(trained_runs[name])
        x = torch.from_numpy(run.test.images.copy()) / 127.5 - 1
        y = torch.from_numpy(run.test.labels.copy())
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(run.model(x), y), x)
        attacked = (x + 2 * 0.12 * gradient.sign()).clamp(-1, 1)
        accuracy[name] = (run.model(attacked).argmax(1) == y).float().mean().item()
        assert run.result["metrics"]["accuracy"] > 0.85
    assert accuracy["adversarial"] > accuracy["base"] + 0.15
