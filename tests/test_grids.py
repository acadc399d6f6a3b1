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
from tables.grid import Grid

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
    assert [cell.place for cell in cells] == expected and len({cell.id for cell in cells}) == len(cells)
    config = Grid(path).cell("Dropout", "CUB", 2).config
    found = (config.method, config.target, config.seed, config.model, config.steps)
    assert found == ("dropout", "cub", 2, "resnet8", 100)


def test_an_id_is_of_the_settings_that_matter_and_are_not_at_their_defaults(path):
    def id_(*sets: str) -> str:
        return Grid(path, sets=sets).cell("Base", "CUB", 1).id

    own = {"method": "base", "target": "cub"}
    assert Grid(CONFIGS / "table1.yaml").cell("Base", "CUB", 1).id[-8:] == eight_digits("meta_test", **own)
    assert id_() == "base--cub--seed1--" + eight_digits("meta_test", **own, model="resnet8", steps=100)
    assert {*map(id_, ("threads=2", "log_every=3", "eval_every=7", "eval_samples=1", "lr=1e-3"))} == {id_()}
    others = {*map(id_, ("steps=101", "lr=2e-3", "final_samples=3", "model=conv4", "precision=bfloat16"))}
    assert len(others) == 5 and id_() not in others
    later = make_dataclass("Later", [("newest", int, option(3, "what is new"))], bases=(MetaTestConfig,), frozen=True)
    assert fingerprint("meta_test", later(steps=5)) == fingerprint("meta_test", MetaTestConfig(steps=5))
    assert fingerprint("meta_test", later(steps=5, newest=4)) != fingerprint("meta_test", later(steps=5))


def test_what_cells_start_from_is_one_run_for_all_that_agree_on_it(path):
    """Wherever the images are that it is made of."""
    images = {"phi": "a.zip,b.zip", "pretrained": "a.zip,b.zip", "CUB": "c.zip"}
    for grid in (Grid(path), moved := Grid(path, paths=images)):
        cells = {(cell.row, cell.column): cell for cell in grid.cells() if cell.seed == 0}
        phi, pretrained = cells["MetaPerturb", "CUB"].needs["phi"], cells["FT", "CUB"].needs["init"]
        assert phi.id == "phi-seed0-" + eight_digits("meta_train", tasks=2)
        assert cells["MetaPerturb", "CUB"].config.phi == phi.id == cells["MetaPerturb", "STL10"].config.phi
        assert pretrained.id == cells["FT + Dropout", "STL10"].needs["init"].id
        runs = Path("runs")
        assert [phi.outcome(runs), pretrained.outcome(runs)] == [runs / phi.id / "phi.pt", runs / pretrained.id]
        found = pretrained.config.model, pretrained.config.target, pretrained.config.method
        assert found == ("resnet8", "tiny_imagenet", "base")  # the model as in FT
    assert phi.config.source_paths == ["a.zip", "b.zip"] and pretrained.config.target_path == "a.zip,b.zip"
    assert moved.cell("FT", "CUB", 0).config.target_path == "c.zip"
    other = Grid(path, sets=("phi.seed=3",)).cell("MetaPerturb", "CUB", 0)
    assert other.needs["phi"].config.seed == 3 and other.id != cells["MetaPerturb", "CUB"].id


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


def test_tuned_values_count_as_the_papers_setting(path, tmp_path):
    """Those of a cell's method, and of what its recipe adds; of two columns here."""
    tuned, recipe = tmp_path / "tuned.json", "Recipe: {method: dropout, recipe: [label_smoothing]}"
    chosen = {"dropout": {"dropout_prob": 0.02}, "label_smoothing": {"label_smoothing": 0.3}}
    tuned.write_text(json.dumps({"chosen": dict.fromkeys(("STL10", "CUB"), chosen)}))
    grid = Grid(write_grid(path.parent, GRID.replace("baselines:", f"  {recipe}\nbaselines:")), tuned_path=tuned)
    for row in ("Dropout", "FT + Dropout", "Recipe"):
        cell = grid.cell(row, "CUB", 0)
        assert cell.config.dropout_prob == 0.02 and cell.differences == ()
        assert cell.id != Grid(path).cell(row, "CUB", 0).id
    assert cell.config.label_smoothing == 0.3
    assert grid.cell("Base", "CUB", 0).id == Grid(path).cell("Base", "CUB", 0).id
    for content in ("[]", '{"chosen": {"Cars": {}}}'):
        tuned.write_text(content)
        assert "nothing was tuned for STL10, CUB; ./run.sh tune" in message(path, tuned_path=tuned)


def test_a_given_phi_is_held_to_the_papers_by_what_its_file_says(path, tmp_path):
    phi, run = MetaPerturb(), tmp_path / "run"
    for name in ("ours.pt", "run/phi.pt"):
        save_phi(phi, tmp_path / name, {"config": {"tasks": 5, "steps": 750, "seed": 3}})
    torch.save(phi.state_dict(), tmp_path / "bare.pt")
    assert "run: is a folder; φ is a file" in message(path, files={"phi": run})
    (run / "result.json").write_text("{}")
    for name, said in (("ours.pt", "tasks: 2 → 5"), ("run", "tasks: 2 → 5"), ("bare.pt", "bare.pt, of which nothing")):
        cell = Grid(path, files={"phi": tmp_path / name}).cell("MetaPerturb", "CUB", 0)
        assert [text.partition(" is recorded")[0] for text in cell.differences] == [f"phi: {said}"]
        file = cell.needs["phi"].outcome(Path("runs"))
        assert file == tmp_path / ("run/phi.pt" if name == "run" else name)
        values = [value for p in load_phi(file).parameters() for value in p.flatten().tolist()]
        digest = hashlib.sha256(struct.pack("<82f", *values)).hexdigest()
        assert cell.needs["phi"].id == f"phi-{digest[:8]}"  # of its numbers, whatever its card says


def test_a_given_network_is_a_file_or_a_finished_run(path, tmp_path):
    weights = tmp_path / "run" / "weights.pt"
    weights.parent.mkdir()
    torch.save({"conv.weight": torch.zeros(1)}, weights)
    cell = Grid(path, files={"pretrained": weights}).cell("FT", "CUB", 0)
    assert cell.differences == ("pretrained: weights.pt, of which nothing is recorded",)
    assert "run: no such file or finished run" in message(path, files={"pretrained": weights.parent})


def test_a_reference_among_the_common_settings(tmp_path):
    text = GRID.replace("set: {model: resnet8", 'set: {method: metaperturb, phi: "${phi}", model: resnet8')
    cell = Grid(write_grid(tmp_path, text.replace("{method: dropout}", "{gate: false}")), "quick").cells()[1]
    assert cell.row == "Dropout" and "phi" in cell.needs and "phi: steps: 750 → 7" in cell.differences


# --- the shipped grids

PRESETS = [
    (name, preset)
    for name in (*TABLES, "schedule", "networks", "recipe", "target_size", "meta_training", "tune", "select")
    for preset in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["presets"]
]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_shipped_grids_load_in_every_preset(name, preset):
    grid = Grid(CONFIGS / f"{name}.yaml", preset)
    cells = grid.cells()
    assert cells and {"paper", "quick", "smoke"} <= {other for of, other in PRESETS if of == name}
    if name in TABLES:
        assert {bool(cell.differences) for cell in cells} == {preset != "paper"}  # each says that it is reduced
        assert preset != "paper" or grid.seeds == [0, 1, 2, 3, 4]
    if name in ("tune", "select"):
        assert all(cell.config.eval_split != "test" for cell in cells)


def test_what_departs_from_the_paper_and_what_does_not():
    reduced = {cell.column: cell.differences for cell in Grid(CONFIGS / "schedule.yaml").cells()}
    assert reduced.pop("10000 steps") == ()
    assert reduced == {f"{n} steps": (f"steps: 10000 → {n}",) for n in (1000, 2500, 5000, 20000)}
    cell = Grid(CONFIGS / "table1.yaml", "cpu_paper_settings").cell("Base", "CUB (50 classes)", 0)
    own = {"target: cub → folder", "batch_size: 128 → 32", "precision: float32 → bfloat16"}
    assert set(cell.differences) == own  # an image size that the data set has anyway is none
    cell = Grid(CONFIGS / "table3.yaml", "quick").cell("(b) Only at top layers", "CUB", 0)
    assert set(cell.differences) == {"steps: 10000 → 2000", "final_samples: 100 → 20", "phi: steps: 750 → 150"}


def test_the_papers_numbers():
    grids = {table: Grid(CONFIGS / f"{table}.yaml") for table in TABLES}
    for table, row, column, value in [
        ("table1", "Information Dropout", "Cars", "43.13±2.31"),
        ("table1", "FT + Manifold Mixup", "STL10", "79.60±0.27"),
        ("table1", "TrivialAugment", "CUB", None),
        ("table2", "Base", "Conv4", "83.93±0.20"),
        ("table2", "MetaPerturb", "ResNet44", "90.97±1.09"),
        ("table3", "(a) w/o stochastic noise z", "s-CIFAR100", "31.02±0.44"),
    ]:
        assert grids[table].paper_value(row, column) == value, (table, row, column)
    reported = {table: [n for of in grid.paper.values() for n in of.values() if n] for table, grid in grids.items()}
    assert [*map(len, reported.values())] == [60, 30, 24]


def test_table_1_has_every_regularizer_alone_and_finetuned():
    cells = Grid(CONFIGS / "table1.yaml").cells()
    for finetuned in (False, True):
        chosen = [cell for cell in cells if (cell.config.init is not None) == finetuned]
        assert {cell.config.method for cell in chosen} == REGULARIZERS.keys() - {"adversarial"}  # of a figure
        assert len(chosen) == 10 * 6 * 5


def test_ablations_of_table_3_train_on_the_target_without_the_same_part():
    grid = Grid(CONFIGS / "table3.yaml")
    cells = {row: grid.cell(row, "CUB", 0) for row in grid.rows if row != "Base"}
    made = {row: cell.needs["phi"].config for row, cell in cells.items()}
    for row, part in [("(a) w/o channel-wise scaling s", "gate"), ("(a) w/o stochastic noise z", "noise")]:
        assert getattr(cells[row].config, part) is getattr(made[row], part) is False
    for row, changed in {
        "(c) Homogeneous task distribution": {"split": "homogeneous"},
        "paired class split": {"split": "paired"},
        "annealing in meta-training": {"anneal": 0.4},
        "no clipping in meta-training": {"clip": None},
        "one-step lookahead in meta-training": {"lookahead": 1e-3},
        "(b) Only at top layers": {},
        "no annealing in training on the target": {},
    }.items():
        assert made[row] == dataclasses.replace(made["MetaPerturb"], **changed)


# --- bad input


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title: A small table", "titel: A", "key 'titel' is unknown; did you mean 'title'?"),
        ("config: tgt.yaml\n", "", "lacks 'config'"),
        ("config: tgt.yaml", "config: target.yaml", "target.yaml: cannot read the settings"),
        ("set: {model: resnet8, steps: 100, threads: 1}", "set: [1]", "set: expected 'name: value' lines, got [1]"),
        ("seeds: [0, 1, 2]", "seeds: '0 1'", "seeds: expected a list of whole numbers, got '0 1'"),
        ("seeds: [0, 1, 2]", "seeds: []", "seeds: expected a list of whole numbers, got []"),
        ("  Base: {method: base}", "  Base: base", "rows: Base: expected 'name: value' lines, got 'base'"),
        ("  Base: {method: base}", "  1: {method: base}", "rows: 1 is no text; put names like this in quotes"),
        ("{method: dropout}", "{method: dropot}", "Dropout, STL10: method: expected one of base, metaperturb"),
        ('"${phi}"', '"${psi}"', "need 'psi' is unknown; did you mean 'phi'?"),
        ("program: meta_train,", "program: train,", "program: expected meta_train or meta_test, got 'train'"),
        ("{program: meta_train,", "{file: phi.pt,", "needs: phi: key 'config' is unknown"),
        ("{tasks: 2}", "{taks: 2}", "needs: phi: unknown setting 'taks' (did you mean tasks?)"),
        ("baselines: [Base, FT]", "baselines: Base", "baselines: expected a list of names, got 'Base'"),
        ("baselines: [Base, FT]", "baselines: [Basis]", "baselines: row 'Basis' is unknown; did you mean 'Base'?"),
        ("FT: {method: base", "FT: {versus: Bse, method: base", "versus: row 'Bse' is unknown; did you mean 'Base'?"),
        ("  Base: [66.78±0.59, 30.63±0.66]", "  Base: [1]", "paper: Base: expected 2 values, one a column"),
        ("  Base: [66.78±0.59,", "  Base: [many,", "paper: Base: expected numbers such as 66.78±0.59, got 'many'"),
        ("  paper: {}", "  paper: {rows: 5}", "presets: paper: rows: expected a list of names, got 5"),
        ("  paper: {}", "  paper: {rows: [Bas]}", "presets: paper: row 'Bas' is unknown; did you mean 'Base'?"),
        ("  paper: {}", "  paper: {needs: {psi: {}}}", "presets: paper: need 'psi' is unknown"),
        ("  paper: {}", "  small: {}", "preset 'paper' is unknown"),
        ("{target: cub}", "{target: cub, stands_for: CAB}", "stands_for: column 'CAB' is unknown; did you mean 'CUB'?"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, old, new, said):
    assert old in GRID
    found = message(write_grid(tmp_path, GRID.replace(old, new, 1)))
    assert said in found and ".yaml" in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sets": ("steps",)}, "--set steps: expected key=value"),
        ({"sets": ("stps=1",)}, "unknown setting 'stps' (did you mean steps?)"),
        ({"sets": ("psi.steps=1",)}, "--set psi.steps=1: need 'psi' is unknown; did you mean 'phi'?"),
        ({"sets": ("seed=3",)}, "--set seed=3: is given by --seeds"),
        ({"sets": ("phi=phi.pt",)}, "--set phi=phi.pt: is given by --use"),
        ({"files": {"psi": Path("phi.pt")}}, "--use: need 'psi' is unknown; did you mean 'phi'?"),
        ({"files": {"phi": Path("none.pt")}}, "none.pt: no such φ file"),
        ({"files": {"phi": CONFIGS / "src.yaml"}}, "src.yaml: not loaded, because it is damaged"),
        ({"paths": {"CAB": "x"}}, "--path: column or need 'CAB' is unknown; did you mean 'CUB'?"),
        ({"tuned_path": Path("none.json")}, "none.json: no such file; ./run.sh tune writes it"),
        ({"tuned_path": CONFIGS / "tgt.yaml"}, "tgt.yaml: cannot be read as JSON"),
    ],
)
def test_wrong_options_are_one_line(path, changes, said):
    assert said in message(path, **changes)
