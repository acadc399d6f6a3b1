"""Robustness: that the attack is a real one, on networks trained here. test_analyses.py: that its results are kept."""

import dataclasses
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from image_files import refusal
from test_analyses import ATTACK as SMALL
from torch import nn

from metaperturb.analyses import robustness
from metaperturb.analyses.robustness import Attack, AttackedModel, measure_robustness
from metaperturb.data.batches import normalize

pytest.importorskip("foolbox", reason="foolbox is not installed (./run.sh test installs it)")

CPU = torch.device("cpu")
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
MIDDLE = {"linf": 0.06, "l2": 0.8, "l1": 7.0}  # where a part of the images withstands


def accuracy(run, tmp_path, norm, eps, **options):
    radii = {key: (eps,) if key == norm else () for key in ORDERS}
    options = {"images": 60, "draws": 3, "samples": 8, "steps": 10, **options}
    result = measure_robustness(run, Attack(**radii, **options), tmp_path / f"{len(list(tmp_path.iterdir()))}.json")
    (point,) = result["points"]
    return point["accuracy"]


# --- the attacked network


class Noisy(nn.Module):
    """Logits of a linear network whose input is perturbed by Gaussian noise; `noise` is what was drawn last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 36, 4).double()

    def forward(self, x):
        self.noise = torch.randn_like(x)
        return self.layer((x + self.noise).flatten(1))


@pytest.mark.parametrize("draws", [1, 5])
def test_the_steps_are_those_of_the_mean_prediction(draws):
    """−log((1/E) Σ_e p_e(y)) has the gradient −Σ_e ∇p_e(y) / Σ_e p_e(y), with ∇p_e of softmax worked out by hand."""
    network, x, y = Noisy(), torch.rand(3, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 3, 1])
    margins, steps = robustness.ascent(AttackedModel(network, draws), x, y)
    noise, weight = network.noise.view(draws, *x.shape), network.layer.weight.detach()
    for i in range(3):
        p = network.layer((2 * x[i] - 1 + noise[:, i]).flatten(1)).detach().softmax(1)  # pixels in [-1, 1]
        gradient = (p[:, y[i], None] * (weight[y[i]] - p @ weight)).sum(0)
        torch.testing.assert_close(F.normalize(steps[i].flatten(), dim=0), -F.normalize(gradient, dim=0))
        own, *others = p.mean(0).roll(-int(y[i]))
        assert margins[i] == pytest.approx(math.log(max(others) / own))


def test_predictions_are_means_over_all_samples():
    network = Noisy()
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    model, probabilities = AttackedModel(network, 3, 8), []
    network.register_forward_hook(lambda module, args, out: probabilities.extend(out.softmax(1).split(2)))
    predicted = model.predict(x)
    assert len(probabilities) == 8  # in groups of 3, 3 and 2
    torch.testing.assert_close(predicted.exp(), torch.stack(probabilities).mean(0))


def test_normalization_is_inside_and_exact():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    seen = []
    AttackedModel(network(lambda x: seen.append(x) or x.mean(dim=(2, 3))), 1)(pixels.float() / 255)
    assert torch.equal(seen[0], normalize(pixels))


def network(function):
    """One that answers by a function."""
    made = nn.Module()
    made.forward, made.weight = function, nn.Parameter(torch.zeros(1))
    return made


# --- the attack


def test_without_a_perturbation_it_is_clean_accuracy(trained, tmp_path):
    for norm in ORDERS:
        clean = accuracy(trained["base"], tmp_path, norm, 0.0, images=None)
        assert clean == trained["base"].result["metrics"]["accuracy"]
    drawn = [accuracy(trained["metaperturb"], tmp_path, norm, 0.0, images=None, samples=20) for norm in ORDERS]
    assert len(set(drawn)) == 1  # the same noise
    assert drawn[0] == pytest.approx(trained["metaperturb"].result["metrics"]["accuracy"], abs=0.03)


@pytest.mark.parametrize("norm", ORDERS)
def test_more_steps_leave_less(trained, tmp_path, norm):
    values = [accuracy(trained["base"], tmp_path, norm, MIDDLE[norm], steps=steps) for steps in (1, 3, 12)]
    assert values == sorted(values, reverse=True)  # exactly: the worst iterate is kept, and the iterates are the same
    far = {"step_size": 2.0}  # steps twice as long as the radius jump about
    jumping = [accuracy(trained["base"], tmp_path, norm, MIDDLE[norm], steps=steps, **far) for steps in (1, 2, 3, 4)]
    assert jumping == sorted(jumping, reverse=True)
    assert values[-1] <= values[0] - 0.1
    noisy = [accuracy(trained["metaperturb"], tmp_path, norm, MIDDLE[norm], steps=steps) for steps in (1, 6)]
    assert noisy[1] <= noisy[0] + 0.02


@pytest.mark.parametrize("method", ["base", "metaperturb"])
def test_large_balls_leave_no_more_than_chance(trained, tmp_path, method):
    for norm, eps in (("linf", 0.5), ("l2", 8.0), ("l1", 150.0)):
        assert accuracy(trained[method], tmp_path, norm, eps, images=40, steps=6) <= 0.1


@pytest.mark.parametrize("norm", ORDERS)
@pytest.mark.parametrize("eps", [1e-3, 0.3, 5.0])
def test_images_stay_in_the_ball_and_the_range(trained, norm, eps):
    run = trained["base"]
    x, y = torch.from_numpy(run.test.images[:32].copy()) / 255, torch.from_numpy(run.test.labels[:32].copy())
    torch.manual_seed(0)
    found = robustness.perturb(AttackedModel(run.model, 1).eval(), x, y, norm, eps, 5, 0.3)
    assert found.min() >= 0 and found.max() <= 1
    distance = torch.linalg.vector_norm((found - x).double().flatten(1), ORDERS[norm], dim=1)
    assert distance.max() <= eps * (1 + 1e-4) + 1e-4 and distance.min() > 0.05 * min(eps, 0.3)
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("norm", ORDERS)
def test_a_network_that_is_sure_of_itself_does_not_look_robust(trained, tmp_path, norm):
    """By cross-entropy in float32, nearly every image of the second one would withstand."""
    run = trained["base"]
    sure = dataclasses.replace(run, model=network(lambda x: 200 * run.model(x)))
    plain, scaled = (accuracy(r, tmp_path, norm, 1.5 * MIDDLE[norm]) for r in (run, sure))
    assert plain < 0.85 and scaled <= plain + 0.08


def test_what_is_wrong_from_the_start_counts_as_wrong(trained, tmp_path):
    """A network that the attack makes right: on images of its own making it answers with the true class."""
    run = trained["base"]
    labels = torch.from_numpy(run.test.labels.copy())
    clean = torch.from_numpy(run.test.images.copy())

    def answers(x):  # images as they are: the next class; others: the true one of the nearest image
        nearest = (x[:, None] - normalize(clean)).flatten(2).norm(dim=2).min(dim=1)
        target = torch.where(nearest.values < 1e-3, (labels[nearest.indices] + 1) % 10, labels[nearest.indices])
        return 5 * F.one_hot(target, 10).float() + 0 * x.sum(dim=(1, 2, 3))[:, None]

    assert accuracy(dataclasses.replace(run, model=network(answers)), tmp_path, "linf", 0.02, images=20) == 0.0


def test_a_network_that_overflows_under_attack_has_no_answer(trained, tmp_path, capsys):
    """It is broken where pixels leave their grid by much: finite on images as they are, not where the attack ends."""

    for name in ("base", "metaperturb"):
        model = trained[name].model

        def answers(x, model=model):
            pixels = (x + 1) * 127.5
            far = (pixels - pixels.round()).abs().flatten(1).amax(dim=1) > 0.4
            return model(x) + torch.where(far, math.nan, 0.0)[:, None]

        run = dataclasses.replace(trained[name], model=network(answers))
        attack = dataclasses.replace(SMALL, linf=(0.0, 1.4 / 255), l2=(), l1=())
        clean, attacked = measure_robustness(run, attack, tmp_path / f"{name}.json")["points"]
        assert clean["accuracy"] > 0.5 and attacked["accuracy"] == 0
        assert "returns what is not finite, which counts as wrong" in capsys.readouterr().err


# --- results


def test_further_radii_are_added(trained, tmp_path):
    run, path, few = trained["base"], tmp_path / "r.json", dataclasses.replace(SMALL, linf=(0.05,), l1=())
    whole = measure_robustness(run, SMALL, tmp_path / "whole.json")
    measure_robustness(run, few, path)
    assert {**measure_robustness(run, SMALL, path), "seconds": 0} == {**whole, "seconds": 0}
    fewer = measure_robustness(run, few, path)  # what was not asked for is not drawn
    assert [(point["norm"], point["eps"]) for point in fewer["points"]] == few.points
    kept = json.loads(path.read_text())
    kept["points"][-1]["correct"].pop()  # as if cut off there
    path.write_text(json.dumps(kept))
    measure_robustness(run, few, path)  # nor need it be complete


@pytest.mark.slow
def test_of_kept_and_last_iterate_the_worse_by_fresh_draws_is_taken(trained):
    """Of the margins of both under the same many draws, the result has the larger one, nearly always."""
    run = trained["metaperturb"]
    labels, images = torch.tensor(run.test.labels[:60]), torch.tensor(run.test.images[:60]).float() / 255
    found = {}
    for samples in (1, 200):
        torch.manual_seed(0)
        model = AttackedModel(run.model, 1, samples).eval()
        found[samples] = robustness.perturb(model, images, labels, "l2", MIDDLE["l2"], 10, 0.1)
    changed, model.samples = (found[1] != found[200]).flatten(1).any(dim=1), 500
    assert 5 < changed.sum() < 60  # of one draw in each step the largest margin was often luck
    margins = []
    for candidate in found.values():
        torch.manual_seed(1)
        margins.append(robustness.margin(model.predict(candidate[changed]), labels[changed]))
    assert (margins[1] > margins[0]).float().mean() > 0.85 and margins[1].mean() > margins[0].mean()


def test_the_images_are_the_same_for_every_run(trained):
    """Some are a fixed random choice; all are each image once."""
    images = [robustness.attacked_images(run, 24, 8, CPU)[0][0] for run in trained.values()]
    assert torch.equal(*images)
    ((every_one, labels),) = robustness.attacked_images(trained["base"], 200, 600, CPU)
    assert torch.equal(labels.bincount(), torch.tensor(trained["base"].test.labels).bincount())
    assert len(every_one.unique(dim=0)) == 200 and len(images[0].unique(dim=0)) == 8


def test_foolbox_that_is_not_installed(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)  # as Python marks what cannot be imported
    message = refusal(measure_robustness, trained["base"], SMALL, tmp_path / "r.json")
    assert "foolbox cannot be imported" in message
    assert ".venv/bin/pip install foolbox" in message and 'pip install -e ".[analyses]"' in message
