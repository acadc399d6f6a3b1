"""Analyses of finished runs: that results are kept and continued; calibration, loss surfaces, scales and noise."""

import copy
import dataclasses
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grid_files import csv_lines
from image_files import refusal, refused
from torch import nn

from metaperturb import methods, models, plots
from metaperturb.analyses import calibration, robustness, surface
from metaperturb.analyses.calibration import Sampling, measure_calibration
from metaperturb.analyses.robustness import Attack, check_attack, measure_robustness
from metaperturb.analyses.scales import _spread, learned_scales
from metaperturb.analyses.surface import Plane, filter_normalized_directions, loss_surface
from metaperturb.config import MetaTestConfig, load_config
from metaperturb.data.arrays import from_memory
from metaperturb.evaluation import expected_calibration_error
from metaperturb.perturbation import PerturbSite
from metaperturb.randomness import numpy_generator
from metaperturb.trained import load_run

SAMPLING = Sampling(counts=(1, 3, 6), batch_size=64)
PLANE = Plane(reach=0.5, points=3, images=40, batch_size=20, draws=2)
ATTACK = Attack(linf=(0.0, 0.05, 0.15), l2=(0.5,), l1=(4.0,), steps=3, draws=2, samples=3, images=24, batch_size=16)
# module, analysis, settings; what saves a part, parts in all
ANALYSES = {
    "calibration": (calibration, measure_calibration, SAMPLING, "save_tensors", 5),
    "robustness": (robustness, measure_robustness, ATTACK, "save_json", 15),
    "surface": (surface, loss_surface, PLANE, "save_json", 3),
}


@pytest.fixture(params=ANALYSES)
def analysis(request):
    """Module, analysis, settings; what saves a part, parts in all."""
    if request.param == "robustness":
        pytest.importorskip("foolbox", reason="foolbox is not installed (./run.sh test installs it)")
    return ANALYSES[request.param]


def comparable(found):
    """Without the times."""
    if isinstance(found, dict):
        return {key: comparable(value) for key, value in found.items() if not key.startswith("seconds")}
    return [comparable(value) for value in found] if isinstance(found, list) else found


# --- results are kept, continued, and taken for no others


def test_results_are_kept_and_those_of_something_else_refused(analysis, trained_runs, tmp_path, capsys):
    _, measure, settings, *_ = analysis
    base, perturbed = (lambda name=name: load_run(trained_runs[name]) for name in ("base", "metaperturb"))
    first, again = (measure(perturbed(), settings, tmp_path / name) for name in "ab")
    other_seed = dataclasses.replace(settings, seed=1)
    assert comparable(first) == comparable(again) != comparable(measure(perturbed(), other_seed, tmp_path / "c"))
    assert first["method"] == "metaperturb" and first == json.loads((tmp_path / "a").read_text())
    before = (tmp_path / "a").stat().st_mtime_ns
    capsys.readouterr()
    assert measure(perturbed(), settings, tmp_path / "a") == first
    assert (tmp_path / "a").stat().st_mtime_ns == before and "step" not in capsys.readouterr().err
    refused(r"something else \(settings differ\); remove it", measure, perturbed(), other_seed, tmp_path / "a")
    refused(r"something else \(network, method differ\)", measure, base(), settings, tmp_path / "a")
    for content, said in (("[]", "holds results of something else"), ("{", "cannot be read as JSON")):
        (tmp_path / "a").write_text(content)
        refused(said, measure, perturbed(), settings, tmp_path / "a")


def test_cut_off_and_continued(analysis, trained_runs, tmp_path, monkeypatch, capsys):
    module, measure, settings, name, parts = analysis
    whole = measure(load_run(trained_runs["metaperturb"]), settings, tmp_path / "whole.json")
    save, saved = getattr(module, name), []

    def save_and_stop(content, path):
        save(content, path)
        saved.append(path)
        if len(saved) == parts - 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "SAVE_SECONDS", 0)
    monkeypatch.setattr(module, name, save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        measure(load_run(trained_runs["metaperturb"]), settings, tmp_path / "cut.json")
    continued = measure(load_run(trained_runs["metaperturb"]), settings, tmp_path / "cut.json")
    assert len(saved) == parts and comparable(continued) == comparable(whole)  # nothing twice
    assert "metaperturb: step " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.json", "whole.json"]


def test_a_network_that_is_not_finite(analysis, trained, tmp_path):
    _, measure, settings, *_ = analysis
    broken = dataclasses.replace(trained["base"], model=copy.deepcopy(trained["base"].model))
    broken.model.register_forward_hook(lambda module, args, out: math.inf * out)
    message = refusal(measure, broken, settings, tmp_path / "broken.json")
    assert "not finite" in message and str(broken.dir) in message and not any(tmp_path.iterdir())


BAD = {
    Attack: "linf=-0.1 l2=nan steps=0 draws=0 samples=0 images=0 step_size=0 images=201",
    Sampling: "counts= counts=0,5 batch_size=0",
    Plane: "points=4 points=1 reach=0 reach=nan draws=0 images=1",
}


def test_bad_settings(trained):
    """Each is named; distances are limited by how far apart two images can be."""
    bad = [(kind, text, f"{text.partition('=')[0]}: ") for kind, texts in BAD.items() for text in texts.split()]
    further = {
        **{"linf=384/255": "linf: ε = 1.50588 is beyond 1,", "l2=21": "l2: ε = 21 is beyond 20.78"},
        **{"l1=433": "l1: ε = 433 is beyond 432,", "linf= l2= l1=": "no ε is given"},
    }
    for kind, text, said in [*bad, *((Attack, *pair) for pair in further.items())]:
        assert said in refusal(lambda k=kind, t=text: check_attack(trained["base"], load_config(k, None, t.split())))


# --- calibration


def test_counts_are_means_over_disjoint_draws(trained, tmp_path):
    run, calls = trained["metaperturb"], []
    with run.model.register_forward_hook(lambda module, args, out: calls.append(out)):
        result = measure_calibration(run, Sampling(counts=(4, 1, 6, 2), batch_size=64), tmp_path / "c.json")
    assert [len(logits) for logits in calls] == [64, 64, 64, 8] * 6  # six passes over 200 images, no more
    draws = [torch.cat(calls[4 * k : 4 * k + 4]).double().softmax(1) for k in range(6)]
    labels = torch.from_numpy(run.test.labels.copy())
    for found in result["counts"]:
        count = found["samples"]
        groups = [sum(draws[k : k + count]) / count for k in range(0, 6 - count + 1, count)]
        assert len(found["accuracy"]) == len(groups) == {1: 6, 2: 3, 4: 1, 6: 1}[count]
        for k, mean in enumerate(groups):
            right = mean.argmax(1) == labels
            assert found["accuracy"][k] == pytest.approx(right.double().mean().item())
            assert found["nll"][k] == pytest.approx(-mean[range(200), labels].log().mean().item(), rel=1e-5)
            assert found["ece"][k] == pytest.approx(expected_calibration_error(mean.amax(1), right), abs=1e-5)
        assert found["seconds"] == pytest.approx(count * result["seconds_per_sample"])
    bins = result["reliability"]
    assert bins["samples"] == 6 and sum(bins["count"]) == 200
    count, correct, confidence = (np.array(bins[key], float) for key in ("count", "accuracy", "confidence"))
    ece = np.nansum(count * abs(correct - confidence)) / 200
    assert ece == pytest.approx(result["counts"][-1]["ece"][0], abs=1e-6)
    assert (np.isnan(correct) == (count == 0)).all()


def test_calibration_of_real_runs_and_its_pictures(trained, tmp_path):
    results = {}
    for method, run in trained.items():
        results[method] = [measure_calibration(run, SAMPLING, tmp_path / f"{method}.json")]
        *_, last = counts = results[method][0]["counts"]
        assert [c["samples"] for c in counts] == ([1, 3, 6] if method == "metaperturb" else [1])
        for key in ("accuracy", "nll", "ece") if method != "metaperturb" else ():  # what meta-testing found
            assert last[key][0] == pytest.approx(run.result["metrics"][key], abs=1e-6)
    first = results["metaperturb"][0]
    assert len(set(first["counts"][0]["nll"])) == 6
    other = copy.deepcopy(first)
    other["counts"][-1]["ece"] = [0.5]
    other["reliability"].update(count=[0] * 14 + [100], confidence=[None] * 14 + [0.9], accuracy=[None] * 14 + [1.0])
    results = {"base": results["base"], "metaperturb": [first, other]}
    found = {}
    with mock.patch.object(plots, "save_figure"):  # test_figures.py renders them
        for plot, lines in ((plots.plot_reliability, 30), (plots.plot_samples, 4)):
            plot(results, "drawn", tmp_path / "drawn")
            rows = csv_lines(tmp_path / "drawn.csv")
            assert len(rows) == lines
            found |= {(row["name"], key, row[key]): row for row in rows for key in ("bin", "samples") if key in row}
        plots.plot_samples({"base": results["base"]}, "drawn", tmp_path / "alone")  # nothing to compare counts with
    values, one, last = np.array(first["counts"][0]["accuracy"]), *(found["metaperturb", "samples", n] for n in "16")
    assert float(last["ece"]) == pytest.approx((first["counts"][-1]["ece"][0] + 0.5) / 2) and last["seeds"] == "2"
    assert float(one["accuracy"]) == pytest.approx(values.mean())
    assert float(one["accuracy_scatter"]) == pytest.approx(values.std())
    bins, pooled = first["reliability"], [found["metaperturb", "bin", f"{k}"] for k in range(1, 16)]
    counts = [int(of["count"]) for of in pooled]
    assert sum(counts) == 300 and counts[-1] == bins["count"][-1] + 100
    expected = ((bins["accuracy"][-1] or 0) * bins["count"][-1] + 100) / counts[-1]
    assert float(pooled[-1]["accuracy"]) == pytest.approx(expected)
    assert all(of["accuracy"] == of["confidence"] == "" for of in pooled if of["count"] == "0")


# --- loss surfaces


def test_directions_have_the_filters_norms(trained):
    model = trained["metaperturb"].model
    first, second = filter_normalized_directions(model, torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    assert first.keys() == {name for name, p in parameters.items() if name.endswith("weight") and p.dim() > 1}
    for name, part in [*first.items(), *second.items()]:
        torch.testing.assert_close(part.flatten(1).norm(dim=1), parameters[name].detach().flatten(1).norm(dim=1))
    other, _ = filter_normalized_directions(model, torch.Generator().manual_seed(1))
    for name in first:
        assert not torch.equal(first[name], other[name]) and not torch.equal(first[name], second[name])


def test_a_network_moves_alike_under_every_method():
    torch.manual_seed(0)
    plain = models.create("resnet8", 5, 16)
    with_parameters = copy.deepcopy(plain)
    arrays = from_memory("black", np.zeros((5, 3, 16, 16), dtype=np.uint8), np.arange(5), "abcde")
    methods.create(MetaTestConfig(method="info_dropout")).prepare(with_parameters, arrays)
    of_plain, of_other = (
        filter_normalized_directions(model, torch.Generator().manual_seed(0)) for model in (plain, with_parameters)
    )
    for direction, longer in zip(of_plain, of_other, strict=True):
        assert longer.keys() > direction.keys()
        assert all(torch.equal(part, longer[name]) for name, part in direction.items())


@pytest.mark.parametrize("name", ["base", "metaperturb"])
def test_the_middle_is_the_network_itself(trained_runs, name, tmp_path):
    run = load_run(trained_runs[name])
    content = loss_surface(run, PLANE, tmp_path / "surface.json")
    assert content["coordinates"] == [-0.5, 0.0, 0.5] and np.array(content["loss"]).shape == (3, 3)
    # The loss in the middle once more, by the book, of the network that measuring has left as it was.
    order = numpy_generator(PLANE.seed, 0, "order_train", 0).permutation(len(run.train))
    chosen = torch.tensor(sorted(order[: PLANE.images]))
    for module in run.model.modules():
        if isinstance(module, nn.BatchNorm2d | PerturbSite):
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


# --- scales and noise


@pytest.fixture
def perturbed(trained_runs):
    """A run of MetaPerturb, with a φ whose numbers are not small."""
    run = load_run(trained_runs["metaperturb"])
    torch.manual_seed(1)
    run.model.metaperturb.phi.flat.data.normal_(0, 0.2)
    return run


def with_settings(run, **changes):
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **changes))


def test_scales_are_those_that_evaluation_uses(perturbed):
    run, used = perturbed, {}
    for spec, site in zip(run.model.metaperturb.specs, run.model.metaperturb.sites, strict=True):
        site.register_forward_hook(lambda site, args, out, name=spec.name: used.update({name: site.scale(args[0])}))
    with torch.no_grad():
        run.model(torch.randn(2, 3, 12, 12))
    found = learned_scales(run)
    assert {place["site"]: place["channels"] for place in found} == {"layer1.0": 16, "layer2.0": 32, "layer3.0": 64}
    for place in found:
        assert place["s"] == pytest.approx(used[place["site"]].tolist())
        assert len(place["s"]) == place["channels"] and all(0 <= s <= 1 for s in place["s"])


def test_the_spread_of_the_noise_is_that_of_many_draws(perturbed):
    sites, seen = perturbed.model.metaperturb.sites, {}
    for site in sites:
        site.register_forward_hook(
            lambda site, args, more, out: seen.update({site: args[0] + more.get("shortcut", 0.0)}), with_kwargs=True
        )
    found = [at["spread"] for at in learned_scales(perturbed, images=1)]
    assert [len(spread) for spread in found] == [16, 32, 64]
    generator = torch.Generator().manual_seed(0)
    for site, spread in zip(sites, found, strict=True):
        mu = site.phi.noise_mean(seen[site]).detach().double()
        z = F.softplus(mu + torch.randn(3000, *mu.shape, generator=generator, dtype=torch.float64))
        expected = (z.std(dim=0) / z.mean(dim=0)).mean(dim=(0, 2, 3))
        torch.testing.assert_close(torch.tensor(spread).double(), expected, rtol=0, atol=1e-2)
        assert expected.std() > 1e-3
    # At μ = 0 by another rule: the trapezoid over ±9 standard deviations.
    with torch.no_grad():
        sites[0].phi.flat[:36].zero_()
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    z, density = F.softplus(x), (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    mean, square = (torch.trapezoid(density * value, x) for value in (z, z.square()))
    spreads = np.concatenate([at["spread"] for at in learned_scales(perturbed)])
    assert spreads == pytest.approx(((square - mean.square()).sqrt() / mean).item(), abs=1e-5)
    assert spreads == pytest.approx(0.65, abs=0.005)  # as its description says
    assert not any(any(at["spread"]) for at in learned_scales(with_settings(perturbed, noise=False)))


@pytest.mark.parametrize("mu", [-45.0, -104.0, -1e4])
def test_the_spread_far_below_zero_is_its_limit(mu):
    """There z = exp(μ + ε), log-normal, whose relative standard deviation is √(e − 1) for whatever μ."""
    assert _spread(torch.full((1, 1, 2, 1), mu)) == pytest.approx([math.sqrt(math.e - 1)], abs=1e-6)


def test_runs_without_scales_are_refused(trained, perturbed):
    assert "method base" in refusal(learned_scales, trained["base"])
    assert "gate=false" in refusal(learned_scales, with_settings(perturbed, gate=False))
