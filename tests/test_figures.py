"""The figures' commands on finished runs: pictures and numbers, and what is refused."""

import contextlib
import csv
import io
import json
import shutil
import statistics
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from tables.results import write_record

import figures as scripts_figures
import metaperturb.meta_test as program
import metaperturb.meta_train as meta_training
from metaperturb import plots
from metaperturb.perturbation import MetaPerturb
from metaperturb.storage import load_tensors, save_tensors
from metaperturb.weights import load_phi, save_phi

FIGURE_6 = ("fig6-robustness", "fig6-calibration", "fig6-samples")
FAST = ["images=20", "steps=2", "draws=2", "samples=2", "linf=0,0.02", "l2=0.5", "l1=2", "counts=1,2"]


def figures(*arguments, render: bool = False) -> SimpleNamespace:
    """A command of the figures. Rendering takes most of the time: it is left out where no test looks at the picture."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), undrawn() if not render else contextlib.nullcontext():
        returncode = scripts_figures.main([*map(str, arguments), "--device", "cpu"])
    return SimpleNamespace(returncode=returncode, stdout=out.getvalue(), stderr=err.getvalue())


def undrawn():
    return mock.patch.object(plots, "save_figure")


def drawn(*arguments, render: bool = False) -> SimpleNamespace:
    completed = figures(*arguments, render=render)
    assert completed.returncode == 0, completed.stderr
    return completed


def refused(*arguments) -> str:
    """The one error of a command that fails."""
    completed = figures(*arguments)
    assert completed.returncode == 1
    (error,) = [line for line in completed.stderr.splitlines() if line.startswith("error: ")]
    return error


def train(settings: list[str], *changes) -> None:
    with undrawn():
        assert program.main(["--set", *settings, *map(str, changes)]) == 0


def accuracy(*folders: Path) -> float:
    """Mean over the runs, in %."""
    return 100 * statistics.mean(
        json.loads((run / "result.json").read_text())["metrics"]["accuracy"] for run in folders
    )


@pytest.fixture(scope="module")
def runs(target_settings, tmp_path_factory) -> Path:
    """Base with two seeds, MetaPerturb, and Base finetuned from it."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    save_phi(MetaPerturb(), folder / "phi.pt")
    for name, changes in {
        "base-0": ["method=base"],
        "base-1": ["method=base", "seed=1", "checkpoint_every=3", "kernel=plain"],  # what changes no result may differ
        "meta": [f"phi={folder / 'phi.pt'}"],
        "tuned": ["method=base", f"init={folder / 'base-0'}"],
    }.items():
        train(target_settings, *changes, "steps=8", f"run_dir={folder / name}")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [*csv.DictReader(file)]


def check_pictures(folder: Path, stem: str) -> list[dict[str, str]]:
    """PNG, SVG and CSV are there, the PNG shows something; the numbers."""
    with Image.open(folder / f"{stem}.png") as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert (folder / f"{stem}.svg").read_text().lstrip().startswith("<?xml")
    return rows(folder / f"{stem}.csv")


def test_convergence(runs, tmp_path):
    completed = drawn("fig5", runs, "--out", tmp_path)
    assert completed.stdout.strip() == str(tmp_path / "fig5-folder-12-px-resnet8-8-steps.png")
    found = rows(tmp_path / "fig5-folder-12-px-resnet8-8-steps.csv")
    logged = [json.loads(line) for line in (runs / "base-1" / "metrics.jsonl").read_text().splitlines()]
    expected = [line["test_accuracy"] for line in logged if "test_accuracy" in line]
    mine = [row for row in found if (row["method"], row["seed"]) == ("base", "1")]
    assert [float(row["test_accuracy"]) for row in mine] == expected
    assert {row["method"] for row in found} == {"base", "metaperturb", "base, finetuned"}


def test_methods_side_by_side(runs, tmp_path):
    drawn("compare", runs, "--out", tmp_path)
    found = {row["name"]: row for row in rows(tmp_path / "compare-folder-12-px-resnet8-8-steps.csv")}
    folders = {"base": ["base-0", "base-1"], "metaperturb": ["meta"], "base, finetuned": ["tuned"]}
    assert {name: int(row["seeds"]) for name, row in found.items()} == {name: len(of) for name, of in folders.items()}
    for name, of_method in folders.items():
        metrics = [json.loads((runs / folder / "result.json").read_text())["metrics"] for folder in of_method]
        for column, key, factor in (
            ("accuracy_percent", "accuracy", 100),
            ("nll", "nll", 1),
            ("ece_percent", "ece", 100),
        ):
            values = [factor * of_run[key] for of_run in metrics]
            assert float(found[name][column]) == pytest.approx(statistics.mean(values))
            spread = found[name][f"{column}_std"]
            assert (spread == "") == (len(values) == 1)
            assert not spread or float(spread) == pytest.approx(statistics.stdev(values))


def test_records_stand_for_runs(runs, target_settings, tmp_path):
    """What a table keeps of its cells is enough for pictures of what came out and how, and not for others."""
    folder = tmp_path / "results" / "small" / "paper"
    for name, phi in {"base-0": None, "base-1": None, "meta": "phi-00001234"}.items():
        place = {"table": "small", "row": name, "column": "Bugs", "needs": {"phi": phi} if phi else {}}
        write_record(place, runs / name, folder / f"{name}--bugs.json")
    (folder / "needs").mkdir()
    (folder / "needs" / "phi-00001234.json").write_text('{"need": "phi", "program": "meta_train"}')

    def numbers(name: str, *arguments, figure: str = "compare") -> list[dict[str, str]]:
        drawn(figure, *arguments, "--out", tmp_path / name)
        return rows(tmp_path / name / f"{figure}-folder-12-px-resnet8-8-steps.csv")

    some = [runs / name for name in ("base-0", "base-1", "meta")]
    assert numbers("a", *some) == numbers("b", folder) == numbers("c", *folder.glob("*.json"))
    assert numbers("a", *some, figure="fig5") == numbers("b", folder, figure="fig5")
    # The same training in another table: once.
    again = tmp_path / "results" / "other" / "paper"
    write_record({**place, "table": "other", "needs": {"phi": "learned-00001234"}}, runs / "meta", again / "m--b.json")
    assert numbers("a2", folder, again) == numbers("a", *some)
    # Another φ, whose file has the same name.
    save_phi(MetaPerturb(), tmp_path / "another" / "phi.pt")
    train(target_settings, f"phi={tmp_path / 'another' / 'phi.pt'}", "steps=8", f"run_dir={tmp_path / 'more'}")
    place["needs"]["phi"] = "phi-00005678"
    write_record(place, tmp_path / "more", folder / "other--bugs.json")
    assert [row["name"] for row in numbers("d", folder)][1:] == [
        "metaperturb, φ phi-00001234",
        "metaperturb, φ phi-00005678",
    ]
    older = json.loads((folder / "meta--bugs.json").read_text())
    del older["curve"]
    (tmp_path / "older--bugs.json").write_text(json.dumps(older))
    needed = "this picture needs the run's folder"
    said = refused("fig5", tmp_path / "older--bugs.json", "--out", tmp_path / "out")
    assert f"older--bugs.json: is a record without its curve; {needed}" in said
    for figure in ("fig6", "fig7", "fig8"):
        said = refused(figure, folder / "meta--bugs.json", "--out", tmp_path / "out")
        assert f"meta--bugs.json: is a record of a run; {needed}" in said


def test_lengths_of_training_and_several_phi(runs, target_settings, tmp_path):
    """Seeds that one length lacks are left out; every φ has a line and a name of its own."""
    torch.manual_seed(1)
    other = tmp_path / "other.pt"
    save_phi(MetaPerturb(), other)
    for name, changes in {
        "base": ["method=base", "steps=6"],
        "meta": [f"phi={runs / 'phi.pt'}", "steps=6"],
        "other": [f"phi={other}", "steps=6"],
        "other-8": [f"phi={other}", "steps=8"],
    }.items():
        train(target_settings, *changes, f"run_dir={tmp_path / 'more' / name}")
    chosen = [runs / "base-0", runs / "base-1", runs / "meta", tmp_path / "more"]
    completed = drawn("lengths", *chosen, "--out", tmp_path, "--call", "other=another φ", render=True)
    assert "base, 8 training steps: left out, as others lack them: seeds [1]" in completed.stderr
    found = check_pictures(tmp_path, "lengths-folder-12-px-resnet8")
    drawn_at = {(row["name"], row["training_steps"]): float(row["accuracy_percent"]) for row in found}
    names = ("base", "metaperturb, φ phi", "metaperturb, another φ")
    assert {*drawn_at} == {(name, steps) for name in names for steps in ("6", "8")}
    for (name, steps), folder in {("base", "8"): runs / "base-0", ("base", "6"): tmp_path / "more" / "base"}.items():
        assert drawn_at[name, steps] == pytest.approx(accuracy(folder))
    train(target_settings, "method=base", "steps=6", "batch_size=4", f"run_dir={tmp_path / 'smaller'}")
    for figure, some, said in (
        ("fig5", chosen, "steps: 8 → 6"),
        ("lengths", [runs], "needs several numbers of them"),
        ("lengths", [runs / "base-0", tmp_path / "smaller"], "this one has batch_size: 16 → 4"),
    ):
        assert said in refused(figure, *some, "--out", tmp_path)
    for name, said in (("nobody=x", "no run has a φ of this name (phi)"), ("phi", "expected FILE=NAME")):
        assert said in refused("fig5", runs, "--out", tmp_path, "--call", name)


def test_amount_of_training_images(runs, target_settings, tmp_path):
    for name, changes in {"few": ["method=base", "train_per_class=3"], "meta": [f"phi={runs / 'phi.pt'}"]}.items():
        train(target_settings, *changes, "steps=8", f"run_dir={tmp_path / 'more' / name}")
    chosen = [runs / "base-0", tmp_path / "more"]
    # As ./run.sh calls it: the folders behind an option.
    drawn("amount", "--runs", tmp_path, *chosen, "--out", tmp_path)
    found = rows(tmp_path / "amount-folder-12-px-resnet8-8-steps.csv")
    drawn_at = {(row["name"], row["training_images"]): float(row["accuracy_percent"]) for row in found}
    expected = {("base", "30"): "few", ("metaperturb", "80"): "meta"}
    expected = {place: tmp_path / "more" / name for place, name in expected.items()} | {("base", "80"): runs / "base-0"}
    assert drawn_at == {place: pytest.approx(accuracy(folder)) for place, folder in expected.items()}
    for some, said in (([runs], "all runs have 80 training images"), ([*chosen, runs / "meta"], "with one seed")):
        assert said in refused("amount", *some, "--out", tmp_path)


def test_effort_of_meta_training(runs, tmp_path):
    """A panel has those φ that differ in its number alone; seeds are averaged; what no card tells is left out."""
    made = {
        "paper": ({}, 200),
        "again": ({"seed": 1}, 200),
        "short": ({"steps": 50}, 200),
        "none": ({"steps": 0}, 200),  # an axis of logarithms that begins at 0
        "few": ({"classes": 20}, 20),
        "other": ({"steps": 20, "batch_size": 32}, 200),
        "small": ({"steps": 20}, 200),  # of fewer images of each class
    }
    trained = json.loads((runs / "meta" / "result.json").read_text())

    def left(path: Path, digest: int, accuracy: float, card: dict, **config) -> None:
        """What a run with such a φ leaves; pictures of final accuracies read nothing else."""
        path.mkdir(parents=True)
        own = {"phi_card": card, "phi_digest": f"{digest:08}", "config": trained["config"] | config}
        metrics = trained["metrics"] | {"accuracy": accuracy}
        (path / "result.json").write_text(json.dumps(trained | own | {"metrics": metrics}))

    for i, (name, (config, classes)) in enumerate(made.items()):
        images = classes * (500 if name != "small" else 200)
        card = {"config": config, "source": {"classes": classes, "images": images}}
        left(tmp_path / "more" / name, i, 0.2 + 0.01 * i, card)
        if name == "paper":
            left(tmp_path / "top", i, 0.1, card, sites="top")
            left(tmp_path / "twice", i, 0.1, card, log_every=1)

    more = tmp_path / "more"
    completed = drawn("effort", runs / "base-0", runs / "base-1", runs / "meta", more, "--out", tmp_path, render=True)
    for name in ("other", "small"):
        assert f"{name}: left out, its φ differs in more than one number from those drawn" in completed.stderr
    found = check_pictures(tmp_path, "effort-folder-12-px-resnet8-8-steps")
    numbers = {(row["of"], row["amount"]): (float(row["accuracy_percent"]), row["runs"]) for row in found}
    paper = accuracy(more / "paper", more / "again"), "2"
    expected = {
        ("", ""): (accuracy(runs / "base-0", runs / "base-1"), "2"),
        ("meta-training steps", "0"): (accuracy(more / "none"), "1"),
        ("meta-training steps", "50"): (accuracy(more / "short"), "1"),
        ("meta-training steps", "750"): paper,
        ("classes of the source", "20"): (accuracy(more / "few"), "1"),
        ("classes of the source", "200"): paper,
    }
    assert numbers.keys() == expected.keys()
    for place, (mean, count) in expected.items():
        assert numbers[place] == (pytest.approx(mean), count)
    alone = "differ in the steps, tasks or classes of their meta-training alone"
    for some, said in (
        ([runs / "meta"], alone),
        ([more / "paper", more / "other"], alone),
        ([more / "paper", more / "small"], alone),
        ([more, tmp_path / "top"], "but the runs are of metaperturb and of metaperturb, sites top"),
        ([more, tmp_path / "twice"], "there are two runs of metaperturb with seed 0 and the same φ"),
        ([runs], "one use of base, but the runs are of base and of base, finetuned"),
    ):
        assert said in refused("effort", *some, "--out", tmp_path)


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
    found = {(row["name"], row["step"]): row for row in rows(tmp_path / "learning-folder-train-resnet8.csv")}
    assert [*found] == [(name, step) for name in ("phi_lr None", "phi_lr 0.1") for step in "24"]
    for name, folders in {"phi_lr None": "01", "phi_lr 0.1": ["fast"]}.items():
        logged = [json.loads((meta_trainings / x / "metrics.jsonl").read_text().splitlines()[-1]) for x in folders]
        state = [load_phi(meta_trainings / x / "phi.pt").tensors()._asdict() for x in folders]
        row = {key: float(value) for key, value in found[name, "4"].items() if key != "name"}
        assert row["seeds"] == len(folders) and row["step"] == 4
        assert row["test_loss"] == pytest.approx(statistics.mean(line["test_loss"] for line in logged))
        assert row["test_accuracy_percent"] == pytest.approx(
            100 * statistics.mean(line["test_accuracy"] for line in logged)
        )
        if len(folders) > 1:
            assert row["test_loss_std"] == pytest.approx(statistics.stdev(line["test_loss"] for line in logged))
        for part, column in ((False, "norm_of_mu"), (True, "norm_of_scale")):
            norms = [sum(v.square().sum() for k, v in s.items() if ("scale" in k) is part).sqrt().item() for s in state]
            assert row[column] == pytest.approx(statistics.mean(norms), abs=2e-5)  # metrics have five digits

    def message(*sources: Path) -> str:
        return refused("learning", *sources, "--out", tmp_path / "refused")

    shutil.copytree(meta_trainings / "0", tmp_path / "twin")
    assert "two meta-trainings with these settings and one seed" in message(meta_trainings / "0", tmp_path / "twin")
    result = tmp_path / "twin" / "result.json"
    content = json.loads(result.read_text())
    content["source"]["fingerprint"] = "other"
    result.write_text(json.dumps(content))
    assert "learned from other images" in message(meta_trainings / "0", tmp_path / "twin")
    (tmp_path / "twin" / "metrics.jsonl").unlink()
    assert "metrics.jsonl of MetaPerturb: no step that all seeds have" in message(tmp_path / "twin")
    assert "no finished run of meta-training" in message(runs, meta_trainings / "none")
    drawn("figures", meta_trainings / "0", "--out", tmp_path / "out")  # of meta-trainings alone
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["learning-folder-train-resnet8.csv"]
    assert "no such folder" in message(tmp_path / "nowhere")


def test_all_figures(runs, meta_trainings, tmp_path):
    pytest.importorskip("foolbox", reason="foolbox is not installed")
    copies = tmp_path / "runs"
    shutil.copytree(runs, copies)
    for name in ("0", "1"):
        shutil.copytree(meta_trainings / name, copies / f"src-{name}")
    drawn("figures", copies, "--out", tmp_path / "out", "--set", *FAST, "points=3", render=True)
    assert {row["seeds"] for row in check_pictures(tmp_path / "out", "learning-folder-train-resnet8")} == {"2"}
    for stem in ("fig5", *FIGURE_6, "fig8", "compare"):
        check_pictures(tmp_path / "out", f"{stem}-folder-12-px-resnet8-8-steps")
    scales = check_pictures(tmp_path / "out", "fig7-scales-folder-12-px-resnet8")
    assert len(scales) == 16 + 32 + 64 and all(0 <= float(row["s"]) <= 1 for row in scales)
    surface = rows(tmp_path / "out" / "fig8-folder-12-px-resnet8-8-steps.csv")
    assert len(surface) == 3 * 9  # a panel a method, of the lowest seed
    robust = rows(tmp_path / "out" / "fig6-robustness-folder-12-px-resnet8-8-steps.csv")
    assert {row["seeds"] for row in robust if row["name"] == "base"} == {"2"}
    # What takes long is kept, and taken from there.
    again = figures("fig6", copies, "--out", tmp_path / "again", "--set", *FAST)
    assert again.returncode == 0 and "step" not in again.stderr
    for path in (tmp_path / "again").glob("*.csv"):
        assert path.read_text() == (tmp_path / "out" / path.name).read_text()


def test_what_does_not_belong_into_one_picture_is_refused(runs, target_settings, tmp_path):
    def message(*arguments) -> str:
        return refused(*arguments, "--out", tmp_path / "out")

    for name, changes in {"long": ["steps=6"], "other": ["steps=8", "model=resnet20"], "twin": ["steps=8"]}.items():
        train(target_settings, "method=base", *changes, f"run_dir={tmp_path / name}")
    assert "steps: 8 → 6" in message("fig5", runs / "base-1", tmp_path / "long")
    assert "one picture shows one data set and network" in message("fig8", runs / "base-0", tmp_path / "other")
    assert "two runs of base with one seed" in message("fig5", runs / "base-0", tmp_path / "twin")
    assert "has no scales s" in message("fig7", runs / "base-0")
    assert "no such folder" in message("fig5", tmp_path / "nowhere")
    assert "holds no finished run" in message("fig5", runs / "base-0" / "checkpoints")
    assert "no finished run of these methods" in message("fig5", runs, "--methods", "mixup")
    for figure, text, said in (
        ("fig8", "pionts=3", "expected KEY=VALUE"),
        ("fig8", "points=few", "points: expected a whole number, got 'few'"),
        ("fig6", "counts=1,1.5", "counts: expected a whole number, got '1.5'"),
        ("fig6", "l2=1/0", "l2: expected a number, got '1/0'"),
        ("fig5", "points=3", "--set points=3: this figure has no settings"),
        ("fig8", "points=4", "must be odd"),
        ("fig6", "linf=0,-1", "linf: must be at least 0, got -1.0"),
        ("fig6", "linf=inf", "linf: must be finite, got inf"),
    ):
        assert said in message(figure, runs, "--set", text)
    before = [*runs.rglob("analyses/*")]
    assert "beyond 1, the largest distance" in message("fig6", runs, "--set", "linf=0,2")
    assert [*runs.rglob("analyses/*")] == before  # told before anything is done
    (tmp_path / "long" / "result.json").unlink()
    assert "not finished" in message("fig5", tmp_path / "long")


def test_damaged_runs_are_named(runs, tmp_path):
    def message(figure: str, change) -> str:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(runs / "meta", tmp_path / "run")
        change(tmp_path / "run")
        said = refused(figure, tmp_path / "run", "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return said

    def replaced(path: Path, *pair: str) -> None:
        assert pair[0] in path.read_text()
        path.write_text(path.read_text().replace(*pair))

    def broken_network(folder: Path, name: str) -> None:
        state = load_tensors(folder / "checkpoints" / "latest.pt")
        key = next(key for key in state["model"] if key.endswith(name))
        state["model"][key].view(-1)[0] = float("nan")
        save_tensors(state, folder / "checkpoints" / "latest.pt")

    def moved(folder: Path) -> None:
        settings = (folder / "config.yaml").read_text()
        path = yaml.safe_load(settings)["target_path"]
        for name in ("config.yaml", "result.json"):
            replaced(folder / name, path, str(tmp_path / "elsewhere"))

    for figure, change, said in (
        ("fig5", lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl"),
        ("fig5", lambda folder: replaced(folder / "metrics.jsonl", "test_nll", "nll"), "metrics.jsonl"),
        ("fig5", lambda folder: replaced(folder / "metrics.jsonl", 'nll": ', 'nll": NaN, "x": '), "finite"),
        ("fig7", lambda folder: broken_network(folder, "bn1.running_mean"), "holds values that are not finite"),
        ("fig8", lambda folder: broken_network(folder, "metaperturb.running_var"), "holds values that are not finite"),
        ("fig8", moved, "(--target-path says where they are now)"),
        (
            "fig5",
            lambda folder: (folder / "result.json").write_text('{"program": "meta_test"}'),
            "is no result of a run",
        ),
    ):
        assert said in message(figure, change)


def test_seeds_with_a_phi_each_are_averaged_under_one_name(runs, target_settings, tmp_path):
    """As ./run.sh src and tgt make them. And every_figure draws what it can, the runs of each folder apart."""
    settings = [*target_settings, "steps=8"]
    for seed in (0, 1):
        torch.manual_seed(seed)
        phi = tmp_path / f"src-seed{seed}" / "phi.pt"
        save_phi(MetaPerturb(), phi)
        folder = tmp_path / "runs" / "own" / f"meta-{seed}"
        train(settings, f"phi={phi}", f"seed={seed}", f"run_dir={folder}")
    called = ["--call", "src-seed0=ours", "src-seed1=ours"]
    drawn("fig5", tmp_path / "runs", "--out", tmp_path / "fig5", *called)
    found = rows(tmp_path / "fig5" / "fig5-folder-12-px-resnet8-8-steps.csv")
    assert {(row["method"], row["seed"]) for row in found} == {("metaperturb, ours", "0"), ("metaperturb, ours", "1")}

    shutil.copytree(runs / "base-0", tmp_path / "runs" / "table" / "one")
    shutil.copytree(runs / "base-0", tmp_path / "runs" / "table" / "two")
    small = ["points=3", "images=20", "draws=1", "steps=1", "samples=1", "linf=0.1", "l2=", "l1=", "counts=1"]
    completed = figures("figures", tmp_path / "runs", "--out", tmp_path / "all", *called, "--set", *small)
    assert completed.returncode == 1
    assert "fig5 not drawn: " in completed.stderr and "two runs of base with one seed" in completed.stderr
    assert "4 pictures were not drawn, for the reasons above" in completed.stderr
    assert sorted(path.stem for path in (tmp_path / "all").glob("*.csv")) == sorted(
        [f"{figure}-folder-12-px-resnet8-8-steps-own" for figure in ("fig5", *FIGURE_6, "fig8", "compare")]
        + ["fig7-scales-folder-12-px-resnet8-own"]
    )


def test_the_numbers_of_phi(tmp_path):
    save_phi(MetaPerturb(), tmp_path / "src-1" / "phi.pt")
    drawn("phi", tmp_path / "src-1" / "phi.pt", "--out", tmp_path / "out", render=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"phi-src-1.png", "phi-src-1.svg"}
    assert (tmp_path / "out" / "phi-src-1.svg").read_text().count("scale kernel") == 4
    assert "phi-tiny-imagenet-resnet20.png" in drawn("phi", "tiny_imagenet_resnet20", "--out", tmp_path).stdout
    assert "name a φ" in refused("phi") and "nowhere" in refused("phi", "nowhere")


def test_curves_of_one_evaluation(tmp_path):
    """A point is seen, and the caption does not speak of points before it."""
    line = {"step": 8, "test_nll": 2.0, "test_accuracy": 0.25, "test_samples": 3}
    plots.plot_convergence({"metaperturb": [[line]]}, "bugs", tmp_path / "one")
    before = {**line, "step": 4, "test_samples": 1}
    plots.plot_convergence({"metaperturb": [[before, line]]}, "bugs", tmp_path / "two")
    one, two = ((tmp_path / f"{name}.svg").read_text() for name in ("one", "two"))
    assert "(3 Monte-Carlo samples)" in one and "before" not in one
    assert "last point: 3 Monte-Carlo samples, before: 1" in two
    color = plots.COLORS["metaperturb"].lower()
    with Image.open(tmp_path / "one.png") as image:
        rgb = tuple(bytes.fromhex(color[1:]))
        panels = image.convert("RGB").crop((0, 0, image.width, int(0.8 * image.height)))  # without the legend
        assert sum(n for n, pixel in panels.getcolors(1 << 24) if pixel == rgb) > 50


def test_a_figure_gives_the_same_files_and_a_suffix_is_one_format(tmp_path):
    for name in ("a", "b", "one.png"):
        with matplotlib.rc_context(plots.STYLE):
            figure = Figure()
            figure.subplots().plot([1, 2])
            plots.save_figure(figure, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg", "one.png"]
    assert all((tmp_path / f"a{s}").read_bytes() == (tmp_path / f"b{s}").read_bytes() for s in plots.FORMATS)
