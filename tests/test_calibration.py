"""Calibration: its error by torchmetrics, and what Monte-Carlo samples buy, against a plain loop."""

import dataclasses
import json
import math
from unittest import mock

import pytest
import torch
from image_files import one_line, refusal
from torch import nn

from metaperturb import UserError, plots
from metaperturb.analyses import calibration
from metaperturb.analyses.calibration import Sampling, calibration_curves, measure_calibration
from metaperturb.evaluation import expected_calibration_error, metrics
from metaperturb.trained import load_run

SOME = Sampling(counts=(1, 3, 6), batch_size=64)


@pytest.fixture(scope="module")
def runs(trained_runs):
    return {method: load_run(folder) for method, folder in trained_runs.items()}


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0, 50.0])
def test_torchmetrics_agrees(sharpness):
    """An oracle of other authors, which gives a confidence of exactly 1 a bin of its own: a bit less is in the last."""
    oracle = pytest.importorskip("torchmetrics.classification").MulticlassCalibrationError(num_classes=7, n_bins=15)
    torch.manual_seed(0)
    log_p = (sharpness * torch.randn(2000, 7)).log_softmax(1)
    labels = torch.where(torch.rand(2000) < 0.6, log_p.argmax(1), torch.randint(0, 7, (2000,)))
    expected = oracle(log_p.exp().double().clamp_max(1 - torch.finfo(torch.float32).eps), labels).item()
    assert metrics(log_p, labels)["ece"] == pytest.approx(expected, abs=1e-6)
    if sharpness == 50.0:
        assert (log_p.exp().amax(1) == 1).any()


class Drawing(nn.Module):
    """Predictions that are other for each call: remembers them."""

    def __init__(self, classes=10):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.classes, self.calls = classes, []

    def forward(self, x):
        logits = 3 * torch.randn(len(x), self.classes)
        self.calls.append(logits)
        return logits


def test_counts_are_means_over_disjoint_draws(runs, tmp_path):
    network = Drawing()
    run = dataclasses.replace(runs["metaperturb"], model=network)
    result = measure_calibration(run, Sampling(counts=(4, 1, 6, 2), batch_size=64), tmp_path / "c.json")
    assert result == json.loads((tmp_path / "c.json").read_text())
    assert [len(logits) for logits in network.calls] == [64, 64, 64, 8] * 6  # six passes over 200 images, no more
    draws = [torch.cat(network.calls[4 * k : 4 * k + 4]).double().softmax(1) for k in range(6)]
    labels = torch.from_numpy(run.test.labels.copy())
    for found in result["counts"]:
        count = found["samples"]
        groups = [sum(draws[k : k + count]) / count for k in range(0, 6 - count + 1, count)]
        assert len(found["accuracy"]) == len(groups) == {1: 6, 2: 3, 4: 1, 6: 1}[count]
        for k, mean in enumerate(groups):
            right = mean.argmax(1) == labels
            assert found["accuracy"][k] == pytest.approx(right.double().mean().item())
            assert found["nll"][k] == pytest.approx(-mean[range(200), labels].log().mean().item(), rel=1e-5)
            ece = expected_calibration_error(mean.amax(1), right)
            assert found["ece"][k] == pytest.approx(ece, abs=1e-5)
        assert found["seconds"] == pytest.approx(count * result["seconds_per_sample"])
    bins = result["reliability"]
    assert bins["samples"] == 6 and sum(bins["count"]) == 200
    from_bins = sum(
        n * abs(a - c) for n, a, c in zip(bins["count"], bins["accuracy"], bins["confidence"], strict=True) if n
    )
    assert from_bins / 200 == pytest.approx(result["counts"][-1]["ece"][0], abs=1e-6)
    assert all((a is None) == (n == 0) for n, a in zip(bins["count"], bins["accuracy"], strict=True))


def test_real_runs(runs, tmp_path, capsys):
    for method, run in runs.items():
        result = measure_calibration(run, SOME, tmp_path / f"{method}.json")
        assert [c["samples"] for c in result["counts"]] == ([1, 3, 6] if method == "metaperturb" else [1])
        last = {key: result["counts"][-1][key][0] for key in ("accuracy", "nll", "ece")}
        if method == "metaperturb":
            assert len(set(result["counts"][0]["nll"])) == 6
        else:  # what meta-testing found
            for key, value in last.items():
                assert value == pytest.approx(run.result["metrics"][key], abs=1e-6)
        assert result["seconds_per_sample"] > 0 and result["method"] == method
    assert "Monte-Carlo samples of metaperturb: step 6/6" in capsys.readouterr().err


def test_deterministic_and_kept(runs, tmp_path):
    run = runs["metaperturb"]
    first, second = (measure_calibration(run, SOME, tmp_path / name) for name in ("a", "b"))
    other = measure_calibration(run, dataclasses.replace(SOME, seed=1), tmp_path / "c")
    nll = [[c["nll"] for c in result["counts"]] for result in (first, second, other)]
    assert nll[0] == nll[1] != nll[2]
    before = (tmp_path / "a").stat().st_mtime_ns
    assert measure_calibration(run, SOME, tmp_path / "a") == first and (tmp_path / "a").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"settings\.seed: 0 → 1") as error:
        measure_calibration(run, dataclasses.replace(SOME, seed=1), tmp_path / "a")
    assert "remove it" in one_line(error)
    assert "method: metaperturb → base" in refusal(measure_calibration, runs["base"], SOME, tmp_path / "a")


def test_cut_off_and_continued(runs, tmp_path, monkeypatch):
    run = runs["metaperturb"]
    whole = measure_calibration(run, SOME, tmp_path / "whole.json")
    monkeypatch.setattr(calibration, "SAVE_SECONDS", 0)
    save, saved = calibration.save_tensors, []

    def save_and_stop(content, path):
        save(content, path)
        saved.append(path)
        if len(saved) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "save_tensors", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        measure_calibration(run, SOME, tmp_path / "cut.json")
    continued = measure_calibration(run, SOME, tmp_path / "cut.json")
    assert len(saved) == 5 and not saved[0].exists()  # the fifth draw, and the sixth ends it

    def comparable(content):
        counts = [{key: value for key, value in of_count.items() if key != "seconds"} for of_count in content["counts"]]
        return {**content, "counts": counts, "seconds_per_sample": None}

    assert comparable(continued) == comparable(whole)


def test_curves_and_pictures(runs, tmp_path):
    results = {m: [measure_calibration(runs[m], SOME, tmp_path / f"{m}.json")] for m in ("base", "metaperturb")}
    other = json.loads(json.dumps(results["metaperturb"][0]))
    other["seed"], other["counts"][-1]["ece"] = 1, [0.5]
    other["reliability"].update(count=[0] * 14 + [100], confidence=[None] * 14 + [0.9], accuracy=[None] * 14 + [1.0])
    results["metaperturb"].append(other)
    curves = calibration_curves(results)
    first = results["metaperturb"][0]
    assert curves["metaperturb"]["ece"] == [first["counts"][-1]["ece"][0], 0.5]
    values = torch.tensor(first["counts"][0]["accuracy"], dtype=torch.float64)
    one = curves["metaperturb"]["counts"][0]
    assert one["accuracy"] == pytest.approx([values.mean().item()] * 2)
    assert one["accuracy_scatter"] == pytest.approx([values.std(correction=0).item()] * 2)
    bins, pooled = first["reliability"], curves["metaperturb"]["reliability"]
    assert sum(pooled["count"]) == 300 and pooled["count"][-1] == bins["count"][-1] + 100
    expected = ((bins["accuracy"][-1] or 0) * bins["count"][-1] + 100) / pooled["count"][-1]
    assert pooled["accuracy"][-1] == pytest.approx(expected)
    for plot, header in (
        (plots.plot_reliability, "name,bin,count,confidence,accuracy"),
        (plots.plot_samples, "name,samples,accuracy,accuracy_scatter,ece,ece_scatter,nll,seconds,seeds"),
    ):
        with mock.patch.object(plots, "save_figure"):  # test_figures.py renders them
            plot(curves, "drawn", tmp_path / plot.__name__)
        lines = (tmp_path / f"{plot.__name__}.csv").read_text().splitlines()
        assert lines[0] == header and len(lines) == 1 + (30 if plot is plots.plot_reliability else 4)
    plots.plot_samples({"base": curves["base"]}, "drawn", tmp_path / "alone")  # nothing to compare counts with
    results["base"][0]["target"]["fingerprint"] = "0"
    assert "cannot be compared: target" in refusal(calibration_curves, results)


def test_a_network_that_is_not_finite(runs, tmp_path):
    class Broken(Drawing):
        def forward(self, x):
            return super().forward(x) * math.nan

    run = dataclasses.replace(runs["base"], model=Broken())
    with pytest.raises(UserError, match="not finite") as error:
        measure_calibration(run, SOME, tmp_path / "c.json")
    assert "base" in one_line(error) and not (tmp_path / "c.json").exists()
