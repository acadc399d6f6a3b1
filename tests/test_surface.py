"""Loss surfaces and learned scales of trained networks (figures 7 and 8)."""

import copy
import json
import math
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from image_files import refusal

import metaperturb.meta_test as program
from metaperturb import methods, models, plots
from metaperturb.analyses.scales import _spread, learned_scales, noise_spread
from metaperturb.analyses.surface import Plane, filter_normalized_directions, loss_surface
from metaperturb.config import MetaTestConfig
from metaperturb.data.arrays import from_memory
from metaperturb.errors import UserError
from metaperturb.perturbation import MetaPerturb, PerturbSite
from metaperturb.randomness import numpy_generator
from metaperturb.trained import load_run
from metaperturb.weights import save_phi

ARRAYS = from_memory("black", np.zeros((5, 3, 16, 16), dtype=np.uint8), np.arange(5), "abcde")
PLANE = Plane(reach=0.5, points=3, images=40, batch_size=20, draws=2)


@pytest.fixture(scope="module")
def runs(target_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    phi = MetaPerturb()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in phi.tensors():
            parameter.normal_(0, 0.2)
    save_phi(phi, folder / "phi.pt")
    for name, changes in {
        "base": ["method=base"],
        "metaperturb": [f"phi={folder / 'phi.pt'}"],
        "ungated": [f"phi={folder / 'phi.pt'}", "gate=false"],
        "noiseless": [f"phi={folder / 'phi.pt'}", "noise=false"],
    }.items():
        with mock.patch.object(plots, "save_figure"):  # each would render its curves
            assert program.main(["--set", *target_settings, *changes, "steps=4", f"run_dir={folder / name}"]) == 0
    return folder


def test_directions_have_the_filters_norms(runs):
    model = load_run(runs / "metaperturb").model
    first, second = filter_normalized_directions(model, torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    assert first.keys() == {name for name, p in parameters.items() if name.endswith("weight") and p.dim() > 1}
    for name, part in [*first.items(), *second.items()]:
        for filter_, drawn in zip(parameters[name], part, strict=True):
            assert drawn.flatten().norm().item() == pytest.approx(filter_.flatten().norm().item(), rel=1e-5)
    other, _ = filter_normalized_directions(model, torch.Generator().manual_seed(1))
    for name in first:
        assert not torch.equal(first[name], other[name]) and not torch.equal(first[name], second[name])


def test_a_network_moves_alike_under_every_method():
    torch.manual_seed(0)
    plain = models.create("resnet8", 5, 16)
    with_parameters = copy.deepcopy(plain)
    methods.create(MetaTestConfig(method="info_dropout")).prepare(with_parameters, ARRAYS)
    of_plain, of_other = (
        filter_normalized_directions(model, torch.Generator().manual_seed(0)) for model in (plain, with_parameters)
    )
    for direction, longer in zip(of_plain, of_other, strict=True):
        assert longer.keys() > direction.keys()
        assert all(torch.equal(part, longer[name]) for name, part in direction.items())


@pytest.mark.parametrize("name", ["base", "metaperturb"])
def test_the_middle_is_the_network_itself(runs, name, tmp_path):
    content = loss_surface(load_run(runs / name), PLANE, tmp_path / "surface.json")
    assert content["coordinates"] == [-0.5, 0.0, 0.5]
    assert torch.tensor(content["loss"]).shape == (3, 3)

    run = load_run(runs / name)  # the loss in the middle once more, by the book
    order = numpy_generator(PLANE.seed, 0, "order_train", 0).permutation(len(run.train))
    chosen = torch.tensor(sorted(order[: PLANE.images]))
    for module in run.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | PerturbSite):
            module.train()
    torch.manual_seed(PLANE.seed)
    losses = []
    for part in chosen.split(20):
        x = torch.from_numpy(run.train.images[part.numpy()]).float() / 127.5 - 1
        y = torch.from_numpy(run.train.labels[part.numpy()])
        with torch.no_grad():
            draws = PLANE.draws if name == "metaperturb" else 1
            losses += [F.cross_entropy(run.model(x), y).item() for _ in range(draws)]
    assert content["loss"][1][1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert content["loss"][0][0] != content["loss"][1][1]


def test_measuring_leaves_no_trace_in_the_loss(runs, tmp_path):
    first = loss_surface(load_run(runs / "metaperturb"), PLANE, tmp_path / "a.json")
    again = loss_surface(load_run(runs / "metaperturb"), PLANE, tmp_path / "b.json")
    assert first == again  # nine points in between: running statistics and noise were where they had been


@pytest.mark.slow
def test_killed_it_goes_on_row_by_row(runs, tmp_path):
    whole = loss_surface(load_run(runs / "base"), Plane(points=9, images=40), tmp_path / "whole.json")
    path = tmp_path / "killed.json"
    code = (
        "from pathlib import Path; from metaperturb.trained import load_run; "
        "from metaperturb.analyses.surface import Plane, loss_surface; "
        f"loss_surface(load_run({str(runs / 'base')!r}), Plane(points=9, images=40), Path({str(path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    rows = json.loads(path.read_text())["loss"]
    assert 1 <= len(rows) <= 9
    resumed = loss_surface(load_run(runs / "base"), Plane(points=9, images=40), path)
    assert resumed == whole


def test_what_does_not_belong_together_is_refused(runs, tmp_path):
    path = tmp_path / "surface.json"
    loss_surface(load_run(runs / "base"), PLANE, path)
    for name, plane in (("metaperturb", PLANE), ("base", Plane(points=5))):
        assert "results of another kind" in refusal(loss_surface, load_run(runs / name), plane, path)


def test_a_loss_that_is_not_finite_is_said(runs, tmp_path):
    run = load_run(runs / "base")
    next(run.model.parameters()).data.fill_(float("nan"))
    assert "not finite" in refusal(loss_surface, run, PLANE, tmp_path / "surface.json")


def test_scales_are_those_that_evaluation_uses(runs):
    run = load_run(runs / "metaperturb")
    used = {}
    for spec, site in zip(run.model.metaperturb.specs, run.model.metaperturb.sites, strict=True):
        site.register_forward_hook(lambda site, args, out, name=spec.name: used.update({name: site.scale(args[0])}))
    with torch.no_grad():
        run.model(torch.randn(2, 3, 12, 12))
    found = learned_scales(run)
    assert {place["site"]: place["channels"] for place in found} == {"layer1.0": 16, "layer2.0": 32, "layer3.0": 64}
    for place in found:
        assert place["s"] == pytest.approx(used[place["site"]].tolist())
        assert len(place["s"]) == place["channels"] and all(0 <= s <= 1 for s in place["s"])


def test_the_spread_of_the_noise_is_that_of_many_draws(runs):
    run = load_run(runs / "metaperturb")
    sites = run.model.metaperturb.sites
    phi = sites[0].phi
    seen = {}
    for i, site in enumerate(sites):
        site.register_forward_hook(lambda site, args, out, i=i: seen.update({i: args[0]}))
    found = noise_spread(run, images=1)
    assert [len(spread) for spread in found] == [16, 32, 64]
    generator = torch.Generator().manual_seed(0)
    for i, site in enumerate(sites):
        mu = site.phi.noise_mean(seen[i]).detach().double()
        z = F.softplus(mu + torch.randn(3000, *mu.shape, generator=generator, dtype=torch.float64))
        expected = (z.std(dim=0) / z.mean(dim=0)).mean(dim=(0, 2, 3))
        torch.testing.assert_close(torch.tensor(found[i]).double(), expected, rtol=0, atol=1e-2)
        assert expected.std() > 1e-3
    # At μ = 0 by another rule: the trapezoid over ±9 standard deviations.
    with torch.no_grad():
        for parameter in (phi.self1, phi.all1, phi.self2, phi.all2):
            parameter.zero_()
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    z, density = F.softplus(x), (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    mean, square = (torch.trapezoid(density * value, x) for value in (z, z.square()))
    assert found_all(noise_spread(run)) == pytest.approx(((square - mean.square()).sqrt() / mean).item(), abs=1e-5)
    assert found_all(noise_spread(run)) == pytest.approx(0.65, abs=0.005)  # as its description says
    assert found_all(noise_spread(load_run(runs / "noiseless"))) == 0


@pytest.mark.parametrize("mu", [-45.0, -104.0, -1e4])
def test_the_spread_far_below_zero_is_its_limit(mu):
    """There z = exp(μ + ε), log-normal, whose relative standard deviation is √(e − 1) for whatever μ."""
    assert _spread(torch.full((1, 1, 2, 1), mu)) == pytest.approx([math.sqrt(math.e - 1)], abs=1e-6)


def found_all(spreads: list[list[float]]) -> float:
    """The one value that all channels of all sites have."""
    values = [value for spread in spreads for value in spread]
    assert max(values) - min(values) < 1e-5
    return values[0]


def test_runs_without_scales_are_refused(runs):
    for name, word in (("base", "method base"), ("ungated", "gate=false")):
        with pytest.raises(UserError, match=word):
            learned_scales(load_run(runs / name))
