"""What tables say of finished cells: statistics, comparisons, what is not mixed; tuning and selection by them."""

import dataclasses
import json
import math
import statistics
from argparse import Namespace
from pathlib import Path

import pytest
import scipy.stats
import torch
from grid_files import fill, read_csv, tables, write_grid, write_record
from image_files import refusal
from tables import choices
from tables.grid import Grid
from tables.page import markdown_table
from tables.results import (
    Results,
    curve,
    paired_difference,
    read_record,
    t_quantile,
    take_recorded,
    write_diverged,
)
from tables.results import write_record as write_own_record
from tables.trainings import write_table

from metaperturb.perturbation import MetaPerturb
from metaperturb.weights import load_phi, phi_digest, save_phi

# --- statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 30])
def test_students_t_is_scipys(freedom):
    for probability in (0.5, 0.9, 0.975, 0.9995):
        expected = scipy.stats.t.ppf(probability, freedom)
        assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_paired_difference_is_that_of_the_seeds_both_have():
    ours, base = {0: 3.0, 1: 5.5, 2: 4.0, 7: 100.0}, {2: 3.0, 1: 2.0, 0: 1.0, 5: -100.0}
    found = paired_difference(ours, base)
    test = scipy.stats.ttest_rel([3.0, 5.5, 4.0], [1.0, 2.0, 3.0])
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(6.5 / 3) and found.n == 3
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    one = paired_difference({0: 1.5}, {0: 1.0, 1: 4.0})
    assert (one.mean, one.low, one.high, one.n) == (0.5, None, None, 1) and str(one) == "+0.50"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


# --- results of hand-made records

ACCURACIES = {
    ("Base", "CUB"): [0.30, 0.32, None],
    ("MetaPerturb", "CUB"): [0.40, 0.41, 0.45],
    ("FT", "CUB"): [None, None, 0.50],
    ("FT + Dropout", "CUB"): [0.2, 0.3, None],
    ("Base", "STL10"): [0.66, None, None],
}


@pytest.fixture
def grid(tmp_path) -> Grid:
    return Grid(write_grid(tmp_path / "configs"))


@pytest.fixture
def folder(grid, tmp_path) -> Path:
    path = tmp_path / "results" / "small" / "paper"
    fill(grid, path, ACCURACIES)
    return path


def test_the_csv_has_every_number(grid, folder, tmp_path):
    lines = read_csv(write_table(grid, folder))
    assert lines.keys() == ACCURACIES.keys()
    for place, values in ACCURACIES.items():
        line, present = lines[place], [100 * value for value in values if value is not None]
        assert int(line["seeds"]) == len(present)
        for key, factor in (("accuracy", 1), ("nll", 0.02), ("ece", 0.1)):  # as `write_record` makes them
            assert float(line[key]) == pytest.approx(factor * statistics.mean(present), abs=1e-4)
        std = f"{statistics.stdev(present):.4f}" if len(present) > 1 else ""
        found = [line[key] for key in ("accuracy_std", "setting", "departs_from_paper", "code")]
        assert found == [std, "paper", "", "c0ffee (d16e57)"]
    ours = lines["MetaPerturb", "CUB"]
    interval = scipy.stats.ttest_rel([40.0, 41.0], [30.0, 32.0]).confidence_interval(0.95)
    assert (ours["baseline"], float(ours["difference"]), ours["pairs"]) == ("Base", 9.5, "2")
    assert [float(ours[key]) for key in ("low_95", "high_95")] == pytest.approx([*interval], abs=1e-4)
    assert ours["paper"] == ours["ours_minus_paper"] == ""
    base = lines["Base", "CUB"]
    assert base["paper"] == "30.63±0.66" and float(base["ours_minus_paper"]) == pytest.approx(31.0 - 30.63)
    assert base["baseline"] == base["difference"] == ""
    alone = lines["FT + Dropout", "CUB"]  # FT ran with other seeds
    assert alone["baseline"] == "FT" and alone["difference"] == alone["low_95"] == alone["pairs"] == ""


def test_a_border_in_a_name_is_none_of_the_table():
    assert tables(markdown_table(["", "a | b"], [["c|d", "1"]])) == [[["", "a | b"], ["c|d", "1"]]]


def test_a_report_takes_the_phi_that_the_records_started_from(grid, folder, tmp_path):
    """The command that made them gave a file, which `--report` need not be given again, nor be there."""

    def trained_with(name: str, seed: int, card: dict) -> str:
        save_phi(MetaPerturb(), tmp_path / name, card)
        given = Grid(grid.path, grid.preset, files={"phi": tmp_path / name})
        write_record(folder, given.cell("MetaPerturb", "CUB", seed), 0.4, phi_card=card)
        (tmp_path / name).unlink()
        return write_table(given, folder).read_text()

    def reported() -> tuple[str, list[str]]:
        report = Grid(grid.path, grid.preset)
        taken = take_recorded(report, folder)
        return write_table(report, folder).read_text(), [need.name for need in taken]

    assert reported()[1] == []  # one that a run of the table makes
    for path in folder.glob("metaperturb--*.json"):
        path.unlink()
    page = trained_with("own.pt", 1, {"config": {"tasks": 4}})
    assert "phi: tasks: 2 → 4" in page and reported() == (page, ["phi"])
    trained_with("another.pt", 2, {})
    assert reported()[1] == []  # which of the two is not for us to say


def test_other_images_are_not_mixed(grid, folder):
    other = {"fingerprints": ["CUB train", "others"]}
    path = write_record(folder, grid.cell("Dropout", "CUB", 1), 0.3, target=other)
    said = refusal(Results, grid, folder)
    assert path.name in said and "other images than" in said


# --- cells that diverged


def diverge(results: Results, row: str, seed: int, column: str = "CUB", said: str = "step 3: not finite") -> Path:
    """Makes what is kept of a cell that diverged; its file."""
    cell = results.grid.cell(row, column, seed)
    made = {key: str(need.file) for key, need in cell.needs.items()}
    config = dataclasses.replace(cell.config, run_dir="/home/me/run", **made)
    place = {"row": row, "column": column, "needs": cell.need_ids}
    images = [f"{column} train", f"{column} test"]  # as `write_record` has them
    write_diverged(place, config, images, f"/home/me/run: {said}", path := results.path(cell, diverged=True))
    return path


def test_what_diverged_is_said_beside_the_seeds_that_did_not(grid, folder):
    results = Results(grid, folder)
    (folder / f"{grid.cell('Base', 'CUB', 1).id}.json").unlink()
    for row, seed in (("Base", 1), ("Base", 2), ("Dropout", 0)):
        diverge(results, row, seed)
    diverge(results, "Base", 0, "STL10", "it finished later")
    path = write_table(grid, folder)
    page, lines = path.read_text(), read_csv(path)
    cells = {row[0]: row[2].partition("<br>")[0] for row in tables(page)[0]}
    assert cells["Base"].startswith("30.00 (1; 2 diverged)") and cells["Dropout"] == "diverges (1)"
    assert "\n- Dropout on CUB, seed 0, diverged: step 3: not finite.\n" in page and "finished later" not in page
    assert "/home" not in page and "19 of 30 cells have not run yet" in page
    assert [lines[row, "CUB"]["diverged"] for row in ("Base", "MetaPerturb", "Dropout")] == ["2", "0", "1"]
    for file in folder.glob("*.json"):
        file.unlink()
    assert "diverges (1)" in write_table(grid, folder).read_text()  # of nothing but that


def test_what_is_no_record_is_named(grid, folder):
    """Neither of a training that finished nor of one that diverged."""
    lost = diverge(Results(grid, folder), "Dropout", 0)
    for path, own in ((folder / f"{grid.cell('Base', 'CUB', 0).id}.json", {"metrics": 5}), (lost, {"diverged": 5})):
        record = json.loads(path.read_text())
        parts = ("program", "cell", "config", "metrics", "target", "phi_digest", *own)
        damaged = [{key: value for key, value in record.items() if key != part} for part in parts]
        changes = {"cell": {"row": "Base"}}, {"target": {"fingerprints": ["one"]}}, own
        damaged += [record | change for change in changes]
        for text in ("{", "[]", *map(json.dumps, damaged)):
            path.write_text(text)
            assert str(path) in refusal(read_record, path)


def test_a_record_of_another_seed_phi_or_setting_is_not_taken(grid, folder, capsys):
    first, second = (grid.cell("Base", "CUB", seed).id for seed in (0, 2))
    (folder / f"{first}.json").rename(folder / f"{second}.json")
    assert "holds other settings than its name says (it is of ('Base', 'CUB', 0))" in refusal(Results, grid, folder)
    (folder / f"{second}.json").unlink()
    cell = grid.cell("MetaPerturb", "CUB", 0)
    other_steps = dataclasses.replace(cell.config, steps=99)
    for changes, said in (
        ({"needs": {}}, "it started from another φ or network"),
        ({"config": other_steps}, "steps: 99 → 100"),
    ):
        path = write_record(folder, dataclasses.replace(cell, **changes), 0.4)
        assert said in refusal(Results, grid, folder)
    path.unlink()
    others = [write_record(folder, Grid(grid.path, sets=("lr=0.1",)).cell("Base", "CUB", 2), 0.99)]
    others.append(diverge(Results(grid, folder), "Dropout", 0).rename(folder / "diverged" / "dropout--other.json"))
    assert read_csv(write_table(grid, folder))["Base", "CUB"]["seeds"] == "1"
    said = capsys.readouterr().err
    assert all(f"not in the table: {other} (another row, setting or φ)" in said for other in others)


def test_the_curve_of_a_run(tmp_path):
    """Training between two evaluations is averaged over its steps, however many a line stands for."""
    lines = [
        {"step": 4, "train_loss": 3.0, "train_accuracy": 0.1},
        {"step": 5, "train_loss": 1.0, "train_accuracy": 0.6, "test_accuracy": 0.3, "test_nll": 2.0, "seconds": 1.0},
        {"step": 8, "train_loss": 0.5, "train_accuracy": 0.7},
        {"step": 8, "test_accuracy": 0.4, "test_nll": 1.5, "test_samples": 7, "seconds": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curve(tmp_path) == [
        {"step": 5, "test_accuracy": 0.3, "test_nll": 2.0, "train_loss": 2.6, "train_accuracy": 0.2},
        {"step": 8, "test_accuracy": 0.4, "test_nll": 1.5, "test_samples": 7, "train_loss": 0.5, "train_accuracy": 0.7},
    ]


def test_a_record_names_no_folder_of_the_machine(tmp_path):
    run = tmp_path / "secret" / "run"
    run.mkdir(parents=True)
    config = {"run_dir": str(run), "phi": str(run / "phi.pt"), "source_paths": [str(run / "a.zip")], "seed": 0}
    config |= {"target_path": f"{run / 'b.zip'}, {run / 'c.zip'}", "split_file": ""}
    result = {"program": "meta_test", "config": config, "init": {"from": str(run), "tensors": 7}, "phi_digest": "d"}
    result |= {"phi_card": {"config": config}, "target": {"fingerprints": ["a", "b"]}}
    result |= {key: {"accuracy": 0.5, "nll": 1, "ece": 0.1} for key in ("metrics", "one_pass")}
    (run / "result.json").write_text(json.dumps(result))
    write_own_record({"row": "Base"}, run, tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    short = {"run_dir": "run", "phi": "phi.pt", "source_paths": ["a.zip"], "target_path": "b.zip,c.zip"}
    # No file is none, which is not the folder that the program runs in.
    assert record["config"] == record["phi_card"]["config"] == {**short, "split_file": "", "seed": 0}
    assert record["init"] == {"from": "run", "tensors": 7} and record["one_pass"] == result["one_pass"]


# --- tuning

TUNE = """
title: Tuning
config: tgt.yaml
set: {eval_split: holdout}
seeds: [0, 1]
columns: {CUB: {target: cub}, STL10: {target: stl10}}
candidates:
  dropout: {dropout_prob: [0.1, 0.2, 0.3]}
  mixup: {mixup_alpha: [0.2, 1.0]}
presets: {paper: {}}
"""


def arguments(tmp_path: Path, grid: Path, *more: object) -> Namespace:
    folders = ["--results", tmp_path / "results", "--runs", tmp_path / "runs"]
    return choices.select_parser().parse_intermixed_args([*map(str, ["--grid", grid, *folders, *more])])


def test_of_equally_good_candidates_the_first_is_chosen_and_incomplete_columns_wait(tmp_path, capsys):
    grid, folder = Grid(write_grid(tmp_path / "configs", TUNE, "tune")), tmp_path / "results" / "tune" / "paper"
    rows = [f"dropout: dropout_prob {p}" for p in (0.1, 0.2, 0.3)] + [f"mixup: mixup_alpha {a}" for a in (0.2, 1.0)]
    assert list(grid.rows) == rows
    values = dict(zip(rows, ([0.1, 0.5], [0.2, 0.3], [0.5, 0.7], [0.4, 0.4], [0.5, 0.3]), strict=True))
    fill(grid, folder, {(row, "CUB"): value for row, value in values.items()})
    fill(grid, folder, {(row, "STL10"): [0.5, 0.5 if row != rows[2] else None] for row in rows})
    choices.tune(arguments(tmp_path, grid.path, "--report"))
    tuned = folder.with_suffix(".json")
    found = json.loads(tuned.read_text())
    assert found["chosen"] == {"CUB": {"dropout": {"dropout_prob": 0.3}, "mixup": {"mixup_alpha": 0.2}}}
    assert found["accuracy"]["CUB"][rows[1]] == {"mean": 25.0, "std": pytest.approx(math.sqrt(50)), "seeds": 2}
    said = capsys.readouterr()
    edge = "CUB: dropout: dropout_prob 0.3 (dropout_prob: an end of those tried; the best may lie beyond)\n"
    assert edge in said.out and "CUB: mixup: mixup_alpha 0.2\n" in said.out
    assert "STL10: 1 of 5 candidates have not run yet: nothing chosen" in said.err
    table = Grid(write_grid(tmp_path / "configs"), tuned_path=tuned)  # it is what tables take
    assert table.cell("Dropout", "CUB", 0).config.dropout_prob == 0.3
    (folder / f"{grid.cell(rows[0], 'CUB', 0).id}.json").unlink()
    assert "nothing was chosen" in refusal(choices.tune, arguments(tmp_path, grid.path, "--report"))


def test_tuning_opens_no_test_image(tmp_path):
    for old, new, *more in [
        ("holdout", "test"),
        ("dropout: {", "dropout: {eval_split: [test], "),
        ("{target: stl10", "{eval_split: val"),
        ("", "", "--set", "eval_split=test"),
    ]:
        path = write_grid(tmp_path, TUNE.replace(old, new, 1), "tune")
        said = refusal(choices.tune, arguments(tmp_path, path, *more))
        assert "eval_split must be holdout, so that tuning sees no test image" in said


# --- selection of φ

SELECT = """
title: Selection
config: tgt.yaml
set: {eval_split: val}
seeds: [0, 1]
columns: {Validation: {target: s_cifar100}}
rows: {Base: {method: base}}
baselines: [Base]
presets: {paper: {}}
"""


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """Three meta-trainings, of which the last had other settings than its seed."""
    folders = [tmp_path / "runs" / f"src-{name}" for name in ("a", "b", "c")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        folder.mkdir(parents=True)
        config = {"seed": seed, "tasks": 10, "steps": 750 if seed < 2 else 100}
        source = {"fingerprint": "all" if seed < 2 else "a part"}
        save_phi(MetaPerturb(), folder / "phi.pt", {"config": config, "source": source, "program": "meta_train"})
        (folder / "result.json").write_text("{}")
    return folders


def selection_grid(tmp_path: Path, sources: list[Path]) -> Grid:
    grid = Grid(write_grid(tmp_path / "configs", SELECT, "select"))
    for folder in sources:
        digest = phi_digest(load_phi(folder / "phi.pt"))
        grid.add_row(folder.name, f"phi_{digest:.8}", folder / "phi.pt")
    return grid


def test_the_best_phi_is_kept_with_the_evidence(tmp_path, sources, capsys):
    grid, folder = selection_grid(tmp_path, sources), tmp_path / "results" / "select" / "paper"
    choose = arguments(tmp_path, grid.path, "--report", *sources)
    fill(grid, folder, {("src-a", "Validation"): [0.4, 0.6], ("src-b", "Validation"): [0.5, None]})
    assert "2 of 3 candidates have not run yet: nothing chosen" in refusal(choices.select, choose)
    assert not (tmp_path / "runs" / "selected").exists()
    fill(grid, folder, {("src-b", "Validation"): [0.5, 0.7], ("src-c", "Validation"): [0.6, 0.3]})
    choices.select(choose)
    said = capsys.readouterr()
    assert "src-c differs from src-a in more than the seed: steps: 750 → 100; other images" in said.err
    assert "src-b differs" not in said.err
    assert "* src-b: 60.00 % over 2 seeds" in said.out and "  src-a: 50.00 % over 2 seeds" in said.out
    selected = load_phi(tmp_path / "runs" / "selected" / "phi.pt")
    assert phi_digest(selected) == phi_digest(load_phi(sources[1] / "phi.pt"))
    evidence = json.loads(folder.with_suffix(".json").read_text())
    assert selected.card["selection"] == evidence and selected.card["config"]["seed"] == 1
    assert evidence["accuracy"]["src-c"] == {"mean": 45.0, "std": pytest.approx(math.sqrt(450)), "seeds": 2}
    found = evidence["chosen"], evidence["evaluated"]
    assert found == ("src-b", "s_cifar100, val images, resnet20, 10000 steps, seeds 0, 1")


def test_a_phi_with_which_a_network_diverged_is_not_chosen(tmp_path, sources, capsys):
    grid = selection_grid(tmp_path, sources)
    results = Results(grid, tmp_path / "results" / "select" / "paper")
    fill(grid, results.folder, {("src-a", "Validation"): [0.4, 0.6], ("src-b", "Validation"): [0.8, None]})
    for name, seed in (("src-b", 1), ("src-c", 0), ("src-c", 1)):
        diverge(results, name, seed, "Validation")
    choose = arguments(tmp_path, grid.path, "--report", *sources)
    choices.select(choose)
    said = capsys.readouterr().out
    assert "* src-a: 50.00 %" in said and "  src-b: 1 diverged\n  src-c: 2 diverged\n" in said
    for seed in (0, 1):
        results.path(grid.cell("src-a", "Validation", seed)).unlink()
        diverge(results, "src-a", seed, "Validation")
    assert "with each φ some trainings diverged; nothing was chosen" in refusal(choices.select, choose)


def test_further_phi_do_not_rename_the_trainings_of_those_there(tmp_path, sources):
    grids = [selection_grid(tmp_path, some) for some in (sources[1:], sources)]
    ids = [{cell.id for cell in grid.cells() if cell.row != "src-a"} for grid in grids]
    assert ids[0] == ids[1] and len(ids[0]) == 6


def refused(tmp_path: Path, *more: object, text: str = SELECT) -> str:
    return refusal(choices.select, arguments(tmp_path, write_grid(tmp_path / "configs", text, "select"), *more))


def test_what_selection_refuses(tmp_path, sources):
    one = sources[0]
    assert "needs two or more finished meta-trainings, found 1" in refused(tmp_path, one)
    assert "the same folder name" in refused(tmp_path, one, one)
    for folder in (tmp_path / "runs" / "src-z", sources[1] / "phi.pt"):
        assert "no folder of a finished meta-training (it holds no phi.pt)" in refused(tmp_path, one, folder)
    cheating = "choosing on test images is cheating"
    assert cheating in refused(tmp_path, *sources, text=SELECT.replace("val}", "test}"))
    assert cheating in refused(tmp_path, *sources, "--set", "eval_split=test")
    assert "these runs are no repetitions of one meta-training" in refused(tmp_path)  # found, not named
    (sources[0] / "phi.pt").unlink()  # not finished: one of the three is left out
    (sources[1] / "phi.pt").unlink()
    assert "found 1" in refused(tmp_path)
