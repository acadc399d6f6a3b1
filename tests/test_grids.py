"""Tables as data: which cells a grid stands for, how they depart from the paper, what is refused."""

import dataclasses
import hashlib
import json
import struct
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
import yaml
from grid_files import CONFIGS, GRID, write_grid
from image_files import refusal
from tables.grid import Grid, Overrides

from metaperturb.config import MetaTestConfig, option
from metaperturb.identity import fingerprint
from metaperturb.perturbation import MetaPerturb
from metaperturb.regularizers import REGULARIZERS
from metaperturb.weights import load_phi, save_phi

TABLES = ("table1", "table2", "table3")


@pytest.fixture
def path(tmp_path) -> Path:
    return write_grid(tmp_path / "configs")


def message(*arguments, **options) -> str:
    """Of the error that a grid, or one of its cells, ends with."""
    return refusal(lambda: Grid(*arguments, **options).cells())


def eight_digits(program: str, **chosen) -> str:
    return hashlib.sha256(json.dumps([program, chosen], sort_keys=True).encode()).hexdigest()[:8]


# --- cells


def test_cells_are_all_rows_on_all_columns_seed_by_seed(path):
    rows = ["Base", "Dropout", "MetaPerturb", "FT", "FT + Dropout"]
    cells = Grid(path).cells()
    expected = [(row, column, seed) for seed in (0, 1, 2) for column in ("STL10", "CUB") for row in rows]
    assert [(cell.row, cell.column, cell.seed) for cell in cells] == expected
    assert len({cell.id for cell in cells}) == len(cells)
    config = Grid(path).cell("Dropout", "CUB", 2).config
    found = (config.method, config.target, config.seed, config.model, config.steps)
    assert found == ("dropout", "cub", 2, "resnet8", 100)


def test_an_id_is_of_the_settings_that_matter_and_are_not_at_their_defaults(path):
    small, whole = (Grid(file).cell("Base", "CUB", 1).id for file in (path, CONFIGS / "table1.yaml"))
    own = {"method": "base", "target": "cub"}
    assert whole == "base--cub--seed1--" + eight_digits("meta_test", **own)
    assert small == "base--cub--seed1--" + eight_digits("meta_test", **own, model="resnet8", steps=100)


def test_an_id_stays_when_a_later_version_has_a_further_setting():
    later = make_dataclass("Later", [("newest", int, option(3, "what is new"))], bases=(MetaTestConfig,), frozen=True)
    assert fingerprint("meta_test", later(steps=5)) == fingerprint("meta_test", MetaTestConfig(steps=5))
    assert fingerprint("meta_test", later(steps=5, newest=4)) != fingerprint("meta_test", later(steps=5))


def test_an_id_changes_with_every_setting_that_matters_and_with_no_other(path):
    def id_(text: str) -> str:
        return Grid(path, overrides=Overrides(settings=(text,))).cell("Base", "CUB", 0).id

    plain = Grid(path).cell("Base", "CUB", 0).id
    assert {id_(text) for text in ("threads=2", "log_every=3", "eval_every=7", "eval_samples=1", "lr=1e-3")} == {plain}
    others = {id_(text) for text in ("steps=101", "lr=2e-3", "final_samples=3", "model=conv4", "precision=bfloat16")}
    assert len(others) == 5 and plain not in others


def test_what_cells_start_from_is_one_run_for_all_that_agree_on_it(path):
    grid = Grid(path)
    cells = {(cell.row, cell.column): cell for cell in grid.cells() if cell.seed == 0}
    phi = cells["MetaPerturb", "CUB"].needs["phi"]
    assert phi.id == "phi-seed0-" + eight_digits("meta_train", tasks=2)
    assert cells["MetaPerturb", "CUB"].config.phi == phi.id == cells["MetaPerturb", "STL10"].config.phi
    pretrained = cells["FT", "CUB"].needs["init"]
    assert pretrained.id == cells["FT + Dropout", "STL10"].needs["init"].id
    runs = Path("runs")
    assert [phi.outcome(runs), pretrained.outcome(runs)] == [runs / phi.id / "phi.pt", runs / pretrained.id]
    assert pretrained.config.model == "resnet8" and pretrained.config.target == "tiny_imagenet"  # the model as in FT
    other = Grid(path, overrides=Overrides(settings=("phi.seed=3",))).cell("MetaPerturb", "CUB", 0)
    assert other.needs["phi"].config.seed == 3 and other.id != cells["MetaPerturb", "CUB"].id


def test_images_of_what_cells_start_from_may_lie_anywhere(path):
    usual = Grid(path).cell("MetaPerturb", "CUB", 0).needs["phi"], Grid(path).cell("FT", "CUB", 0).needs["init"]
    moved = Grid(path, overrides=Overrides(paths={"phi": "a.zip,b.zip", "pretrained": "a.zip,b.zip", "CUB": "c.zip"}))
    phi, pretrained = moved.cell("MetaPerturb", "CUB", 0).needs["phi"], moved.cell("FT", "CUB", 0).needs["init"]
    assert phi.config.source_paths == ["a.zip", "b.zip"] and pretrained.config.target_path == "a.zip,b.zip"
    assert moved.cell("FT", "CUB", 0).config.target_path == "c.zip"
    assert (phi.id, pretrained.id) == (usual[0].id, usual[1].id)  # where images are is no setting


def test_networks_of_table_2_have_a_pretraining_each():
    cells = [cell for cell in Grid(CONFIGS / "table2.yaml").cells() if cell.row == "Finetuning"]
    assert len({cell.needs["init"].id for cell in cells}) == 6
    assert all(cell.needs["init"].config.model == cell.config.model for cell in cells)


def test_a_preset_takes_some_rows_replaces_columns_and_adds_others(path):
    grid = Grid(path, "quick")
    assert list(grid.rows) == ["Base", "Dropout", "MetaPerturb", "No anneal"]
    assert grid.seeds == [5] and list(grid.columns) == ["Birds"]
    assert grid.paper_value("Base", "Birds") == "30.63±0.66" and grid.paper_value("MetaPerturb", "Birds") is None
    found = {row: set(grid.cell(row, "Birds", 5).differences) for row in grid.rows}
    common = {"steps: 100 → 10", "target: cub → embedded", "image_size: 84 → 32"}  # each data set's own size
    assert found["Base"] == found["Dropout"] == common
    assert found["MetaPerturb"] == found["No anneal"] == common | {"phi: steps: 750 → 7"}


def test_each_row_is_compared_with_the_nearest_baseline_above_or_the_row_that_it_names(tmp_path):
    text = GRID.replace("FT + Dropout: {method: dropout,", "FT + Dropout: {versus: Base, method: dropout,")
    named, usual = (Grid(write_grid(tmp_path / name, t)) for name, t in (("named", text), ("usual", GRID)))
    assert [usual.baseline(row) for row in usual.rows] == [None, "Base", "Base", None, "FT"]
    assert [named.baseline(row) for row in named.rows] == [None, "Base", "Base", None, "Base"]
    assert [cell.id for cell in named.cells()] == [cell.id for cell in usual.cells()]  # no setting of the training
    assert "'Bse' is unknown" in message(write_grid(tmp_path / "wrong", text.replace("versus: Base", "versus: Bse")))


def test_tuned_values_count_as_the_papers_setting(path, tmp_path):
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps({"chosen": {c: {"dropout": {"dropout_prob": 0.02}} for c in ("STL10", "CUB")}}))
    grid = Grid(path, overrides=Overrides(tuned=tuned))
    for row in ("Dropout", "FT + Dropout"):
        cell = grid.cell(row, "CUB", 0)
        assert cell.config.dropout_prob == 0.02 and cell.differences == ()
        assert cell.id != Grid(path).cell(row, "CUB", 0).id
    assert grid.cell("Base", "CUB", 0).id == Grid(path).cell("Base", "CUB", 0).id
    content = {column: {"label_smoothing": {"label_smoothing": 0.3}, "dropout": {}} for column in ("STL10", "CUB")}
    tuned.write_text(json.dumps({"chosen": content}))
    text = GRID.replace("baselines:", "  Recipe: {method: dropout, recipe: [label_smoothing]}\nbaselines:")
    recipe = Grid(write_grid(tmp_path / "recipe", text), overrides=Overrides(tuned=tuned)).cell("Recipe", "CUB", 0)
    assert recipe.config.label_smoothing == 0.3 and recipe.differences == ()


def test_a_given_phi_is_held_to_the_papers_by_what_its_file_says(path, tmp_path):
    phi, card = MetaPerturb(), {"config": {"tasks": 5, "steps": 750, "seed": 3}}
    save_phi(phi, tmp_path / "ours.pt", card)
    torch.save(phi.state_dict(), tmp_path / "bare.pt")
    files = {name: Overrides(files={"phi": tmp_path / f"{name}.pt"}) for name in ("ours", "bare")}
    cells = {name: Grid(path, overrides=given).cell("MetaPerturb", "CUB", 0) for name, given in files.items()}
    assert cells["ours"].differences == ("phi: tasks: 2 → 5",)
    assert cells["bare"].differences == ("phi: bare.pt, of which nothing is recorded",)
    for name, cell in cells.items():
        values = [value for p in load_phi(tmp_path / f"{name}.pt").parameters() for value in p.flatten().tolist()]
        digest = hashlib.sha256(struct.pack("<82f", *values)).hexdigest()
        assert cell.needs["phi"].id == f"phi-{digest[:8]}"  # of its numbers, whatever its card says
        assert cell.needs["phi"].outcome(Path("runs")) == tmp_path / f"{name}.pt"


def test_what_may_be_given_in_place_of_a_run(path, tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    cell = Grid(path, overrides=Overrides(files={"pretrained": tmp_path / "weights.pt"})).cell("FT", "CUB", 0)
    assert cell.differences == ("pretrained: weights.pt, of which nothing is recorded",)
    run = tmp_path / "run"
    save_phi(MetaPerturb(), run / "phi.pt")
    torch.save({}, run / "latest.pt")
    for name in ("phi", "pretrained"):
        assert message(path, overrides=Overrides(files={name: run})).endswith("run: no such file or finished run")
    (run / "result.json").write_text("{}")
    phi = Grid(path, overrides=Overrides(files={"phi": run})).cell("MetaPerturb", "CUB", 0).needs["phi"]
    assert phi.outcome(Path("runs")) == run / "phi.pt"


def test_a_reference_among_the_common_settings(tmp_path):
    text = GRID.replace("set: {model: resnet8", 'set: {method: metaperturb, phi: "${phi}", model: resnet8')
    cell = Grid(write_grid(tmp_path, text.replace("{method: dropout}", "{gate: false}")), "quick").cells()[1]
    assert cell.row == "Dropout" and "phi" in cell.needs and "phi: steps: 750 → 7" in cell.differences


# --- the shipped grids


BEYOND = ("schedule", "networks", "recipe", "target_size", "meta_training")
SHIPPED = [
    (name, preset)
    for name in (*TABLES, *BEYOND, "tune", "select")
    for preset in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["presets"]
]


@pytest.mark.parametrize(("name", "preset"), SHIPPED)
def test_shipped_grids_load_in_every_preset(name, preset):
    assert {"paper", "quick", "smoke"} <= {other for grid, other in SHIPPED if grid == name}
    grid = Grid(CONFIGS / f"{name}.yaml", preset)
    cells = grid.cells()
    assert cells
    if name in TABLES:
        assert {bool(cell.differences) for cell in cells} == {preset != "paper"}  # each says that it is reduced
    if name in TABLES and preset == "paper":
        assert grid.seeds == [0, 1, 2, 3, 4] and grid.paper.keys() <= grid.rows.keys()
        assert all(of.keys() == grid.columns.keys() for of in grid.paper.values())
    if name in ("tune", "select"):
        assert all(cell.config.eval_split != "test" for cell in cells)


def test_a_preset_with_tuned_values_says_how_to_get_them_and_takes_those_given(tmp_path):
    other = write_grid(tmp_path / "configs", (CONFIGS / "table1.yaml").read_text(), "table1")
    assert "results/tune/cpu.json: no such file; ./run.sh tune writes it" in message(other, "cpu")
    tuned = tmp_path / "tuned.json"
    columns = ("s-CIFAR100", "CUB (50 classes)")
    tuned.write_text(json.dumps({"chosen": {column: {"dropblock": {"dropblock_prob": 0.02}} for column in columns}}))
    cells = Grid(other, "cpu", Overrides(tuned=tuned)).cells()
    assert {cell.config.dropblock_prob for cell in cells if cell.row == "DropBlock"} == {0.02}
    authors = [cell for cell in cells if "the authors" in cell.row]
    assert authors and all(cell.needs["phi"].sha256.startswith("63f47f80") for cell in authors)


def test_of_the_lengths_of_training_one_is_the_papers():
    grid = Grid(CONFIGS / "schedule.yaml")
    reduced = {cell.column: cell.differences for cell in grid.cells()}
    assert reduced.pop("10000 steps") == ()
    assert reduced == {f"{n} steps": (f"steps: 10000 → {n}",) for n in (1000, 2500, 5000, 20000)}


def test_an_image_size_that_a_data_set_has_anyway_is_no_departure():
    cell = Grid(CONFIGS / "table1.yaml", "cpu_paper_settings").cell("Base", "CUB (50 classes)", 0)
    own = {"target: cub → folder", "batch_size: 128 → 32", "precision: float32 → bfloat16"}
    assert set(cell.differences) == own
    cell = Grid(CONFIGS / "table3.yaml", "quick").cell("(b) Only at top layers", "CUB", 0)
    assert set(cell.differences) == {"steps: 10000 → 2000", "final_samples: 100 → 20", "phi: steps: 750 → 150"}


def test_the_papers_numbers():
    grids = {table: Grid(CONFIGS / f"{table}.yaml") for table in TABLES}
    for table, row, column, value in [
        ("table1", "Information Dropout", "Cars", "43.13±2.31"),
        ("table1", "Manifold Mixup", "s-CIFAR100", "39.06±0.73"),
        ("table1", "MetaPerturb", "Cars", "62.46±0.80"),
        ("table1", "FT + Manifold Mixup", "STL10", "79.60±0.27"),
        ("table1", "FT + MetaPerturb", "CUB", "48.60±1.14"),
        ("table1", "TrivialAugment", "CUB", None),
        ("table2", "Base", "Conv4", "83.93±0.20"),
        ("table2", "Information Dropout", "VGG9", "88.29±1.18"),
        ("table2", "Finetuning", "ResNet20", "88.77±0.26"),
        ("table2", "MetaPerturb", "ResNet44", "90.97±1.09"),
        ("table3", "Base", "Aircraft", "59.23±0.95"),
        ("table3", "(a) w/o stochastic noise z", "s-CIFAR100", "31.02±0.44"),
        ("table3", "(b) Only before pooling", "CUB", "38.88±1.15"),
        ("table3", "(c) Homogeneous task distribution", "s-CIFAR100", "34.31±0.88"),
        ("table3", "one-step lookahead in meta-training", "CUB", None),
    ]:
        assert grids[table].paper_value(row, column) == value, (table, row, column)
    reported = {table: [n for of in grid.paper.values() for n in of.values() if n] for table, grid in grids.items()}
    assert [*map(len, reported.values())] == [60, 30, 24]


def test_table_1_has_every_regularizer_alone_and_finetuned():
    cells = Grid(CONFIGS / "table1.yaml").cells()
    regularizers = set(REGULARIZERS) - {"adversarial"}  # of a figure, not of this table
    for finetuned in (False, True):
        chosen = [cell for cell in cells if (cell.config.init is not None) == finetuned]
        assert {cell.config.method for cell in chosen} == regularizers
        assert len(chosen) == 10 * 6 * 5


def test_ablations_of_table_3_train_on_the_target_without_the_same_part():
    grid = Grid(CONFIGS / "table3.yaml")
    for row, part in [("(a) w/o channel-wise scaling s", "gate"), ("(a) w/o stochastic noise z", "noise")]:
        cell = grid.cell(row, "CUB", 0)
        assert getattr(cell.config, part) is False and getattr(cell.needs["phi"].config, part) is False
    made = {row: grid.cell(row, "CUB", 0).needs["phi"].config for row in grid.rows if row != "Base"}
    plain = dataclasses.replace(made["MetaPerturb"])
    assert made["(c) Homogeneous task distribution"] == dataclasses.replace(plain, split="homogeneous")
    assert made["paired class split"] == dataclasses.replace(plain, split="paired")
    assert made["annealing in meta-training"] == dataclasses.replace(plain, anneal=0.4)
    assert made["no clipping in meta-training"] == dataclasses.replace(plain, clip=None)
    assert made["one-step lookahead in meta-training"] == dataclasses.replace(plain, lookahead=1e-3)
    assert made["(b) Only at top layers"] == made["no annealing in training on the target"] == plain


# --- bad input


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title: A small table", "titel: A", "key 'titel' is unknown; did you mean 'title'?"),
        ("title: A small table\n", "", "lacks 'title'"),
        ("config: tgt.yaml\n", "", "lacks 'config'"),
        ("config: tgt.yaml", "config: target.yaml", "target.yaml: cannot read the settings"),
        ("title: A small table", "title: [A", "not valid YAML"),
        ("set: {model: resnet8, steps: 100, threads: 1}", "set: [1]", "set: expected 'name: value' lines, got [1]"),
        ("seeds: [0, 1, 2]", "seeds: '0 1'", "seeds: expected a list of whole numbers, got '0 1'"),
        ("seeds: [0, 1, 2]", "seeds: []", "seeds: expected a list of whole numbers, got []"),
        ("  Base: {method: base}", "  Base: base", "rows: Base: expected 'name: value' lines, got 'base'"),
        ("  Base: {method: base}", "  1: {method: base}", "rows: 1 is no text; put names like this in quotes"),
        ("{method: dropout}", "{method: dropot}", "Dropout, STL10: method: expected one of base, metaperturb"),
        ("{method: dropout}", "{method: dropout, dropout_prob: 2}", "dropout_prob: must be at least 0 and below 1"),
        ("  FT: ", "  base: {method: base}\n  FT: ", "'Base' on 'STL10' and 'base' on 'STL10': the same settings"),
        ('"${phi}"', '"${psi}"', "need 'psi' is unknown; did you mean 'phi'?"),
        ("program: meta_train,", "program: train,", "program 'train' is unknown; did you mean 'meta_train'?"),
        ("{program: meta_train,", "{", "needs: phi: lacks 'program'"),
        ("{program: meta_train,", "{file: phi.pt,", "needs: phi: key 'config' is unknown"),
        ("config: src.yaml, ", "config: source.yaml, ", "source.yaml: cannot read the settings"),
        ("{tasks: 2}", "{taks: 2}", "needs: phi: unknown setting 'taks' (did you mean tasks?)"),
        ("baselines: [Base, FT]", "baselines: Base", "baselines: expected a list of names, got 'Base'"),
        ("baselines: [Base, FT]", "baselines: [Basis]", "baselines: row 'Basis' is unknown; did you mean 'Base'?"),
        ("  Base: [66.78±0.59, 30.63±0.66]", "  Base: [1]", "paper: Base: has 1 values for 2 columns"),
        ("  Base: [66.78±0.59,", "  Base: [many,", "paper: Base: expected numbers such as 66.78±0.59, got 'many'"),
        ("  Base: [66.78±0.59,", "  Bass: [66.78±0.59,", "paper: row 'Bass' is unknown; did you mean 'Base'?"),
        ("  paper: {}", "  paper: {row: [Base]}", "presets: paper: key 'row' is unknown; did you mean 'rows'?"),
        ("  paper: {}", "  paper: {rows: 5}", "presets: paper: rows: expected a list of names, got 5"),
        ("  paper: {}", "  paper: {rows: [Bas]}", "presets: paper: row 'Bas' is unknown; did you mean 'Base'?"),
        ("  paper: {}", "  paper: {needs: {psi: {}}}", "presets: paper: need 'psi' is unknown"),
        ("  paper: {}", "  paper: {comparable: 1}", "comparable: expected true or false, got 1"),
        ("  paper: {}", "  small: {}", "preset 'paper' is unknown"),
        ("stands_for: CUB", "stands_for: CAB", "stands_for: column 'CAB' is unknown; did you mean 'CUB'?"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, old, new, said):
    assert old in GRID
    found = message(write_grid(tmp_path, GRID.replace(old, new, 1)))
    assert said in found and ".yaml" in found


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (Overrides(settings=("steps",)), "--set steps: expected key=value"),
        (Overrides(settings=("stps=1",)), "unknown setting 'stps' (did you mean steps?)"),
        (Overrides(settings=("steps=0",)), "steps: must be at least 1"),
        (Overrides(settings=("psi.steps=1",)), "--set psi.steps=1: need 'psi' is unknown; did you mean 'phi'?"),
        (Overrides(settings=("seed=3",)), "--set seed=3: is given by --seeds"),
        (Overrides(settings=("phi=phi.pt",)), "--set phi=phi.pt: is given by --use"),
        (Overrides(files={"psi": Path("phi.pt")}), "--use: need 'psi' is unknown; did you mean 'phi'?"),
        (Overrides(files={"phi": Path("none.pt")}), "none.pt: no such φ file"),
        (Overrides(files={"phi": CONFIGS}), "no such file or finished run"),
        (Overrides(files={"phi": CONFIGS / "src.yaml"}), "src.yaml: not loaded, because it is damaged"),
        (Overrides(paths={"CAB": "x"}), "--path: column or need 'CAB' is unknown; did you mean 'CUB'?"),
        (Overrides(tuned=Path("none.json")), "none.json: no such file; ./run.sh tune writes it"),
        (Overrides(tuned=CONFIGS / "tgt.yaml"), "tgt.yaml: cannot be read as JSON"),
    ],
)
def test_wrong_options_are_one_line(path, overrides, said):
    assert said in message(path, overrides=overrides)


def test_a_choice_of_hyperparameters_that_is_none_is_named(path, tmp_path):
    tuned = tmp_path / "tuned.json"
    for content, said in (("[]", "holds no choice"), ('{"chosen": {"Cars": {}}}', "was tuned for STL10, CUB (tuned")):
        tuned.write_text(content)
        assert said in message(path, overrides=Overrides(tuned=tuned))
