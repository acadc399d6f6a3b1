"""The figures' commands on finished runs: pictures and numbers, and what is refused."""

import contextlib
import io
import json
import math
import os
import shutil
import statistics
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import conftest
import pytest
import torch
from conftest import result
from grid_files import csv_lines
from PIL import Image
from tables.results import write_record

import figures as scripts_figures
import metaperturb.meta_train as meta_training
from metaperturb import plots
from metaperturb.perturbation import MetaPerturb
from metaperturb.weights import load_phi, save_phi

FIGURE_6 = ("fig6-robustness", "fig6-calibration", "fig6-samples")
FAST = ["images=20", "steps=2", "draws=2", "samples=2", "linf=0,0.02", "l2=0.5", "l1=2", "counts=1,2"]


def figures(*arguments, render: bool = False) -> SimpleNamespace:
    """A command of the figures. Rendering takes most of the time: it is left out where no test looks at the picture."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), contextlib.nullcontext() if render else undrawn():
        returncode = scripts_figures.main([*map(str, arguments), "--device", "cpu"])
    return SimpleNamespace(returncode=returncode, stdout=out.getvalue(), stderr=err.getvalue())


def undrawn():
    return mock.patch.object(plots, "save_figure")


def drawn(*arguments, render: bool = False) -> SimpleNamespace:
    completed = figures(*arguments, render=render)
    assert completed.returncode == 0, completed.stderr
    return completed


def refused(said: str, *arguments) -> None:
    """A command that fails with one error that says this, and draws nothing."""
    with tempfile.TemporaryDirectory() as out:
        completed = figures(*arguments, "--out", out)
        assert completed.returncode == 1 and not os.listdir(out)
    (error,) = [line for line in completed.stderr.splitlines() if line.startswith("error: ")]
    assert said in error, error


def train(*arguments) -> Path:
    with undrawn():
        return conftest.train(*arguments)


def left(run: Path, of: Path, accuracy: float = 0.3, own: dict | None = None, **config) -> Path:
    """What a run leaves that differs in this from another one; pictures of final accuracies read nothing else."""
    run.mkdir(parents=True)
    content = result(of) | (own or {})
    content |= {"config": content["config"] | config, "metrics": content["metrics"] | {"accuracy": accuracy}}
    (run / "result.json").write_text(json.dumps(content))
    return run


def by_columns(path: Path, *columns: str) -> dict[tuple[str, ...], float]:
    """The accuracies of a file of numbers, in %, by the values in these columns."""
    return {tuple(row[name] for name in columns): float(row["accuracy_percent"]) for row in csv_lines(path)}


def percent(run: Path) -> float:
    return 100 * result(run)["metrics"]["accuracy"]


def check_pictures(folder: Path, stem: str) -> list[dict[str, str]]:
    """PNG, SVG and CSV are there, the PNG shows something; the numbers."""
    with Image.open(folder / f"{stem}.png") as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert (folder / f"{stem}.svg").read_text().lstrip().startswith("<?xml")
    return csv_lines(folder / f"{stem}.csv")


@pytest.fixture(scope="module")
def runs(target_settings, tmp_path_factory) -> Path:
    """Base with two seeds, MetaPerturb, and Base finetuned from it."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    save_phi(MetaPerturb(), folder / "phi.pt")
    for name, changes in {
        "base-0": "method=base",
        "base-1": "method=base seed=1 checkpoint_every=3 kernel=plain",  # what changes no result may differ
        "meta": f"phi={folder / 'phi.pt'}",
        "tuned": f"method=base init={folder / 'base-0'}",
    }.items():
        train(folder / name, target_settings, changes, "steps=8")
    return folder


def test_convergence(runs, tmp_path):
    completed = drawn("fig5", runs, "--out", tmp_path)
    assert completed.stdout.strip() == str(tmp_path / "fig5-folder-12-px-resnet8-8-steps.png")
    found = csv_lines(tmp_path / "fig5-folder-12-px-resnet8-8-steps.csv")
    logged = [json.loads(line) for line in (runs / "base-1" / "metrics.jsonl").read_text().splitlines()]
    columns = ("step", "test_nll", "test_accuracy", "test_ece")
    expected = [[line[key] for key in columns] for line in logged if "test_accuracy" in line]
    mine = [row for row in found if (row["method"], row["seed"]) == ("base", "1")]
    assert [[float(row[key]) for key in columns] for row in mine] == expected
    assert {row["method"] for row in found} == {"base", "metaperturb", "base, finetuned"}


def test_methods_side_by_side(runs, tmp_path):
    drawn("compare", runs, "--out", tmp_path)
    found = {row["name"]: row for row in csv_lines(tmp_path / "compare-folder-12-px-resnet8-8-steps.csv")}
    folders = {"base": ["base-0", "base-1"], "metaperturb": ["meta"], "base, finetuned": ["tuned"]}
    assert {name: int(row["seeds"]) for name, row in found.items()} == {name: len(of) for name, of in folders.items()}
    for name, of_method in folders.items():
        for column, factor in {"accuracy_percent": 100, "nll": 1, "ece_percent": 100}.items():
            key = column.removesuffix("_percent")
            values = [factor * result(runs / folder)["metrics"][key] for folder in of_method]
            assert float(found[name][column]) == pytest.approx(statistics.mean(values))
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            assert float(found[name][f"{column}_std"] or "nan") == pytest.approx(spread, nan_ok=True)


def test_records_stand_for_runs(runs, tmp_path):
    """What a table keeps of its cells is enough for pictures of what came out and how, and not for others."""
    folder = tmp_path / "results" / "small" / "paper"
    for name, needs in {"base-0": {}, "base-1": {}, "meta": {"phi": "phi-00001234"}}.items():
        place = {"table": "small", "row": name, "column": "Bugs", "needs": needs}
        write_record(place, runs / name, folder / f"{name}--bugs.json")
    (folder / "needs").mkdir()
    (folder / "needs" / "phi-00001234.json").write_text('{"need": "phi", "program": "meta_train"}')

    def numbers(name: str, *arguments, figure: str = "compare") -> list[dict[str, str]]:
        drawn(figure, *arguments, "--out", tmp_path / name)
        return csv_lines(tmp_path / name / f"{figure}-folder-12-px-resnet8-8-steps.csv")

    some = [runs / name for name in ("base-0", "base-1", "meta")]
    assert numbers("a", *some) == numbers("b", folder) == numbers("c", *folder.glob("*.json"))
    assert numbers("a", *some, figure="fig5") == numbers("b", folder, figure="fig5")
    # Another φ, whose file has the same name.
    left(tmp_path / "more", runs / "meta", 0.5, {"phi_digest": "f" * 64})
    shutil.copy(runs / "meta" / "metrics.jsonl", tmp_path / "more")
    place["needs"]["phi"] = "phi-00005678"
    write_record(place, tmp_path / "more", folder / "other--bugs.json")
    named = [f"metaperturb, φ phi-0000{digits}" for digits in ("1234", "5678")]
    assert [row["name"] for row in numbers("d", folder)][1:] == named
    older = json.loads((folder / "meta--bugs.json").read_text())
    del older["curve"]
    (tmp_path / "older--bugs.json").write_text(json.dumps(older))
    refused("older--bugs.json: holds no evaluation; this picture", "fig5", tmp_path / "older--bugs.json")
    for figure in ("fig6", "fig7", "fig8"):
        refused("meta--bugs.json: holds no finished run", figure, folder / "meta--bugs.json")


def test_lengths_of_training_and_several_phi(runs, tmp_path):
    """Seeds that one length lacks are left out; every φ has a line and a name of its own."""
    base, meta, more = runs / "base-0", runs / "meta", tmp_path / "more"
    other = {"phi": "other.pt", "own": {"phi_digest": "f" * 64}}
    left(more / "base", base, 0.31, steps=6)
    left(more / "meta", meta, 0.32, steps=6)
    left(more / "other", meta, 0.33, steps=6, **other)
    left(more / "other-8", meta, 0.34, **other)
    left(more / "base-1", runs / "base-1")  # whose seed the shorter one lacks
    chosen = [base, meta, more]
    completed = drawn("lengths", *chosen, "--out", tmp_path, "--call", "other=another φ", render=True)
    assert "base, 8 training steps: left out, as others lack them: seeds [1]" in completed.stderr
    check_pictures(tmp_path, "lengths-folder-12-px-resnet8")
    expected = {("base", "6"): 31, ("base", "8"): percent(base)}
    expected |= {("metaperturb, φ phi", "6"): 32, ("metaperturb, φ phi", "8"): percent(meta)}
    expected |= {("metaperturb, another φ", "6"): 33, ("metaperturb, another φ", "8"): 34}
    found = by_columns(tmp_path / "lengths-folder-12-px-resnet8.csv", "name", "amount")
    assert found == pytest.approx(expected)
    smaller = left(tmp_path / "smaller", base, steps=6, batch_size=4)
    for said, *arguments in (
        ("has another data set, network or length than", "fig5", *chosen),
        ("needs several numbers of them", "lengths", runs),
        ("this one has batch_size: 16 → 4", "lengths", base, smaller),
        ("no run has a φ of this name (phi)", "fig5", runs, "--call", "nobody=x"),
        ("expected FILE=NAME", "fig5", runs, "--call", "phi"),
    ):
        refused(said, *arguments)


def test_amount_of_training_images(runs, tmp_path):
    few = {"train_per_class": 3, "own": {"target": result(runs / "base-0")["target"] | {"train": 30}}}
    left(tmp_path / "more" / "few", runs / "base-0", 0.31, **few)
    left(tmp_path / "more" / "meta", runs / "meta", 0.32)
    chosen = [runs / "base-0", tmp_path / "more"]
    # As ./run.sh calls it: the folders behind an option.
    drawn("amount", "--runs", tmp_path, *chosen, "--out", tmp_path)
    found = by_columns(tmp_path / "amount-folder-12-px-resnet8-8-steps.csv", "name", "amount")
    expected = {("base", "30"): 31, ("base", "80"): percent(runs / "base-0"), ("metaperturb", "80"): 32}
    assert found == pytest.approx(expected)
    refused("all runs have 80 training images", "amount", runs)
    refused("with one seed", "amount", *chosen, runs / "meta")


def test_effort_of_meta_training(runs, tmp_path):
    """A panel has those φ that differ in its number alone; seeds are averaged; what no card tells is left out."""
    made = {
        "paper": {},
        "again": {"seed": 1},
        "short": {"steps": 50},
        "none": {"steps": 0},  # an axis of logarithms that begins at 0
        "few": {"classes": 20},
        "other": {"steps": 20, "batch_size": 32},
        "small": {"steps": 20},  # of fewer images of each class
    }
    more = tmp_path / "more"
    for i, (name, config) in enumerate(made.items()):
        classes = config.get("classes", 200)
        card = {"config": config, "source": {"classes": classes, "images": classes * (200 if name == "small" else 500)}}
        own = {"phi_card": card, "phi_digest": f"{i:08}"}
        left(more / name, runs / "meta", 0.2 + 0.01 * i, own)
        if name == "paper":
            left(tmp_path / "top", runs / "meta", 0.1, own, sites="top")
            left(tmp_path / "twice", runs / "meta", 0.1, own, log_every=1)
    completed = drawn("effort", runs / "base-0", runs / "base-1", runs / "meta", more, "--out", tmp_path, render=True)
    for name in ("other", "small"):
        assert f"{name}: left out, its φ differs in more than one number from those drawn" in completed.stderr
    base = [percent(runs / name) for name in ("base-0", "base-1")]
    expected = {  # of paper and again, which differ in their seed: 20.5
        ("", "", "2"): statistics.mean(base),
        ("meta-training steps", "0", "1"): 23,
        ("meta-training steps", "50", "1"): 22,
        ("meta-training steps", "750", "2"): 20.5,
        ("classes of the source", "20", "1"): 24,
        ("classes of the source", "200", "2"): 20.5,
    }
    check_pictures(tmp_path, "effort-folder-12-px-resnet8-8-steps")
    found = by_columns(tmp_path / "effort-folder-12-px-resnet8-8-steps.csv", "of", "amount", "runs")
    assert found == pytest.approx(expected)
    alone = "differ in the steps, tasks or classes of their meta-training alone"
    for some, said in (
        ([runs / "meta"], alone),
        ([more / "paper", more / "other"], alone),
        ([more / "paper", more / "small"], alone),
        ([more, tmp_path / "top"], "but the runs are of metaperturb and of metaperturb, sites top"),
        ([more, tmp_path / "twice"], "there are two runs of metaperturb with one seed"),
        ([more, runs], "one use of base, but the runs are of base and of base, finetuned"),
    ):
        refused(said, "effort", *some)


@pytest.fixture(scope="module")
def meta_trainings(source_settings, tmp_path_factory) -> Path:
    """Of one setting two seeds, of another one."""
    folder = tmp_path_factory.mktemp("src")
    for name, changes in {"0": [], "1": ["seed=1"], "fast": ["phi_lr=0.1"], "none": ["steps=0"]}.items():
        settings = [*source_settings, "gpus=cpu", "threads=1", "steps=4", *changes, f"run_dir={folder / name}"]
        with undrawn():
            assert meta_training.main(["--set", *settings]) == 0
    return folder


def test_what_meta_trainings_learn(meta_trainings, runs, tmp_path):
    """Each setting is a line; a number is the mean over its seeds, and μ's norm that of all its kernels."""
    drawn("learning", meta_trainings, runs, "--out", tmp_path)
    found = {(row["name"], row["step"]): row for row in csv_lines(tmp_path / "learning-folder-train-resnet8.csv")}
    assert [*found] == [(name, step) for name in ("phi_lr None", "phi_lr 0.1") for step in "24"]
    for name, folders in {"phi_lr None": "01", "phi_lr 0.1": ["fast"]}.items():
        logged = [json.loads((meta_trainings / x / "metrics.jsonl").read_text().splitlines()[-1]) for x in folders]
        state = [load_phi(meta_trainings / x / "phi.pt").tensors()._asdict() for x in folders]
        row = {key: float(value) for key, value in found[name, "4"].items() if key != "name"}
        expected = {"test_loss": [line["test_loss"] for line in logged]}
        expected["test_accuracy_percent"] = [100 * line["test_accuracy"] for line in logged]
        for part, column in ((False, "norm_of_mu"), (True, "norm_of_scale")):
            parts = [[v.flatten() for k, v in s.items() if ("scale" in k) is part] for s in state]
            expected[column] = [torch.cat(values).norm().item() for values in parts]
        for column, values in expected.items():
            spread = statistics.stdev(values) if len(folders) > 1 else 0
            of_row = row[column], row[f"{column}_std"]
            assert of_row == pytest.approx((statistics.mean(values), spread), abs=2e-5)  # metrics have five digits
        assert row["seeds"] == len(folders)

    twin = shutil.copytree(meta_trainings / "0", tmp_path / "twin")
    refused("two runs of MetaPerturb with one seed", "learning", meta_trainings / "0", twin)
    content = result(twin)
    content["source"]["fingerprint"] = "other"
    (twin / "result.json").write_text(json.dumps(content))
    refused("has another data set, network or length than", "learning", meta_trainings / "0", twin)
    (twin / "metrics.jsonl").unlink()
    refused("metrics.jsonl of MetaPerturb: no step that all seeds have", "learning", twin)
    refused("no finished run of meta_train there", "learning", runs, meta_trainings / "none")
    refused("no such folder", "learning", tmp_path / "nowhere")
    drawn("figures", meta_trainings / "0", "--out", tmp_path / "out")  # of meta-trainings alone
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["learning-folder-train-resnet8.csv"]


def test_all_figures(runs, meta_trainings, tmp_path):
    """What can be drawn is drawn, the runs of each folder apart."""
    pytest.importorskip("foolbox", reason="foolbox is not installed")
    own = shutil.copytree(runs, tmp_path / "runs" / "own")
    for name in ("0", "1"):
        shutil.copytree(meta_trainings / name, own / f"src-{name}")
        shutil.copytree(runs / "base-0", tmp_path / "runs" / "table" / f"twin-{name}")
    out = tmp_path / "out"
    completed = figures("figures", tmp_path / "runs", "--out", out, "--set", *FAST, "points=3", render=True)
    assert completed.returncode == 1
    for said in ("fig5 not drawn: ", "two runs of base with one seed", "4 pictures were not drawn, for the reasons"):
        assert said in completed.stderr
    found = {
        stem: check_pictures(out, f"{stem}-folder-12-px-resnet8-8-steps-own")
        for stem in ("fig5", *FIGURE_6, "fig8", "compare")
    }
    assert {row["seeds"] for row in check_pictures(out, "learning-folder-train-resnet8-own")} == {"2"}
    scales = check_pictures(out, "fig7-scales-folder-12-px-resnet8-own")
    assert len(scales) == 16 + 32 + 64 and all(0 <= float(row["s"]) <= 1 for row in scales)
    assert len([*out.glob("*.csv")]) == len(found) + 2
    assert len(found["fig8"]) == 3 * 9  # a panel a method, of the lowest seed
    attacked = [row for row in found["fig6-robustness"] if row["name"] == "base"]
    accuracies = {(row["norm"], float(row["eps"])): float(row["accuracy_percent"]) for row in attacked}
    (one,), (two,) = (own.glob(f"base-{seed}/analyses/robustness-*.json") for seed in (0, 1))
    both = zip(*(json.loads(path.read_text())["points"] for path in (one, two)), strict=True)
    expected = {(a["norm"], a["eps"]): 100 * sum(a["correct"] + b["correct"]) / 40 for a, b in both}
    assert accuracies == pytest.approx(expected) and {row["seeds"] for row in attacked} == {"2"}
    # What takes long is kept, and taken from there.
    again = figures("fig6", own, "--out", tmp_path / "again", "--set", *FAST)
    assert again.returncode == 0 and "step" not in again.stderr
    for path in (tmp_path / "again").glob("*.csv"):
        assert path.read_text() == (out / f"{path.stem}-own.csv").read_text()


def test_what_does_not_belong_into_one_picture_is_refused(runs, tmp_path):
    base, other = runs / "base-0", left(tmp_path / "other", runs / "base-0", model="resnet20")
    for said, *arguments in (
        ("and a picture shows one", "fig5", runs / "base-1", left(tmp_path / "long", base, steps=6)),
        ("has another data set, network or length than", "fig8", base, other),
        ("two runs of base with one seed", "fig5", base, left(tmp_path / "twin", base)),
        ("has no scales s", "fig7", base),
        ("no such folder", "fig5", tmp_path / "nowhere"),
        ("no finished run of meta_test there", "fig5", base / "checkpoints"),
        ("expected KEY=VALUE", "fig8", runs, "--set", "pionts=3"),
        ("points: expected a whole number, got 'few'", "fig8", runs, "--set", "points=few"),
        ("counts: expected a whole number, got '1.5'", "fig6", runs, "--set", "counts=1,1.5"),
        ("l2: expected a number, got '1/0'", "fig6", runs, "--set", "l2=1/0"),
        ("--set points=3: this figure has no settings", "fig5", runs, "--set", "points=3"),
        ("must be odd", "fig8", runs, "--set", "points=4"),
        ("linf: must be finite, got inf", "fig6", runs, "--set", "linf=inf"),
        ("beyond 1, the largest distance", "fig6", runs, "--set", "linf=0,2"),
    ):
        before = [*runs.rglob("analyses/*")]
        refused(said, *arguments)
        assert [*runs.rglob("analyses/*")] == before  # told before anything is done
    unfinished = shutil.copytree(base, tmp_path / "unfinished", ignore=shutil.ignore_patterns("result.json"))
    refused("not finished", "fig5", unfinished)


def test_damaged_runs_are_named(runs, tmp_path):
    moved = json.dumps(result(runs / "meta") | {"config": result(runs / "meta")["config"] | {"target_path": "/gone"}})
    for figure, change, said in (
        ("fig5", lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl"),
        ("fig5", lambda run: (run / "result.json").write_text('{"program": "meta_test"}'), "is no result of a run"),
        ("fig8", lambda run: (run / "result.json").write_text(moved), "/gone: no such file or folder"),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        change(shutil.copytree(runs / "meta", tmp_path / "run"))
        refused(said, figure, tmp_path / "run")


def test_seeds_with_a_phi_each_are_averaged_under_one_name(runs, tmp_path):
    """As ./run.sh src and tgt make them."""
    for seed in (0, 1):
        own = {"phi_digest": f"{seed}" * 64}
        left(tmp_path / f"{seed}", runs / "meta", 0.2 + seed / 10, own, seed=seed, phi=f"src-seed{seed}/phi.pt")
    drawn("compare", tmp_path, "--out", tmp_path, "--call", "src-seed0=ours", "src-seed1=ours")
    (row,) = csv_lines(tmp_path / "compare-folder-12-px-resnet8-8-steps.csv")
    assert (row["name"], row["seeds"], float(row["accuracy_percent"])) == ("metaperturb, ours", "2", 25)


def test_the_numbers_of_phi(tmp_path):
    save_phi(MetaPerturb(), tmp_path / "src-1" / "phi.pt")
    drawn("phi", tmp_path / "src-1" / "phi.pt", "--out", tmp_path / "out", render=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"phi-src-1.png", "phi-src-1.svg"}
    assert (tmp_path / "out" / "phi-src-1.svg").read_text().count("scale kernel") == 4
    assert "phi-tiny-imagenet-resnet20.png" in drawn("phi", "tiny_imagenet_resnet20", "--out", tmp_path).stdout
    refused("name a φ", "phi")
    refused("nowhere", "phi", "nowhere")


def test_curves_of_one_evaluation(tmp_path):
    """A point is seen, and the caption does not speak of points before it."""
    line = {"step": 8, "test_nll": 2.0, "test_accuracy": 0.25, "test_samples": 3}
    plots.plot_convergence({"metaperturb": [[line]]}, "bugs", tmp_path / "one")
    before = {**line, "step": 4, "test_samples": 1}
    plots.plot_convergence({"metaperturb": [[before, line]]}, "bugs", tmp_path / "two")
    one, two = ((tmp_path / f"{name}.svg").read_text() for name in ("one", "two"))
    assert "(last point: 3 Monte-Carlo samples)" in one and "before" not in one
    assert "last point: 3 Monte-Carlo samples, before: 1" in two
    color = plots.COLORS["metaperturb"].lower()
    with Image.open(tmp_path / "one.png") as image:
        rgb = tuple(bytes.fromhex(color[1:]))
        panels = image.convert("RGB").crop((0, 0, image.width, int(0.8 * image.height)))  # without the legend
        assert sum(n for n, pixel in panels.getcolors(1 << 24) if pixel == rgb) > 50
    for name in ("again", "only.png"):
        plots.plot_convergence({"metaperturb": [[line]]}, "bugs", tmp_path / name)
    assert all((tmp_path / f"one{s}").read_bytes() == (tmp_path / f"again{s}").read_bytes() for s in plots.FORMATS)
    assert [path.name for path in tmp_path.glob("only*")] == ["only.png"]  # a suffix is one format
