"""A small grid of trainings, hand-made records of its cells, and its table read back."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from conftest import ROOT
from tables.grid import Cell, Grid

from metaperturb.weights import load_phi

CONFIGS = ROOT / "configs"

GRID = """
title: A small table
config: tgt.yaml
set: {model: resnet8, steps: 100, threads: 1}
seeds: [0, 1, 2]
needs:
  phi: {program: meta_train, config: src.yaml, set: {tasks: 2}}
  pretrained: {program: meta_test, config: pretrain.yaml, like: [model]}
columns:
  STL10: {target: stl10}
  CUB: {target: cub}
rows:
  Base: {method: base}
  Dropout: {method: dropout}
  MetaPerturb: {method: metaperturb, phi: "${phi}"}
  FT: {method: base, init: "${pretrained}"}
  FT + Dropout: {method: dropout, init: "${pretrained}"}
baselines: [Base, FT]
paper:
  Base: [66.78±0.59, 30.63±0.66]
  MetaPerturb: [69.98±0.63, null]
presets:
  paper: {}
  quick:
    seeds: [5]
    set: {steps: 10}
    rows: [Dropout, Base, MetaPerturb]
    columns: {Birds: {target: embedded, stands_for: CUB, comparable: false}}
    needs: {phi: {steps: 7}}
    also: {No anneal: {method: metaperturb, phi: "${phi}", anneal: 0.0}}
"""


def write_grid(folder: Path, text: str = GRID, name: str = "small") -> Path:
    """A grid file beside the settings of the programs."""
    folder.mkdir(parents=True, exist_ok=True)
    for config in ("tgt.yaml", "src.yaml", "pretrain.yaml"):
        shutil.copy(CONFIGS / config, folder)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def write_record(folder: Path, cell: Cell, accuracy: float, **changes: Any) -> Path:
    """What a finished cell leaves, with the metrics NLL = 2 · accuracy and ECE = accuracy / 10."""
    phi = cell.needs.get("phi")
    card = load_phi(phi.file).card if phi and phi.file and phi.file.exists() else None
    record = {
        "program": "meta_test",
        "cell": {"table": "small", "row": cell.row, "column": cell.column, "needs": cell.need_ids},
        "seed": cell.seed,
        "target": {"train": 3, "test": 2, "fingerprints": [f"{cell.column} train", f"{cell.column} test"]},
        "metrics": {"accuracy": accuracy, "nll": 2 * accuracy, "ece": accuracy / 10, "samples": 1},
        **{"init": None, "phi_card": card, "phi_digest": None, "config": dataclasses.asdict(cell.config)},
        **{"commit": "c0ffee", "code": "d16e57", "curve": []},
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cell.id}.json"
    path.write_text(json.dumps(record))
    return path


def fill(grid: Grid, folder: Path, accuracies: dict[tuple[str, str], list[float | None]]) -> None:
    """Records by row and column: an accuracy a seed of the grid, None where there is none."""
    for (row, column), values in accuracies.items():
        for seed, accuracy in zip(grid.seeds, values, strict=True):
            if accuracy is not None:
                write_record(folder, grid.cell(row, column, seed), accuracy)


def csv_lines(path: Path) -> list[dict[str, str]]:
    return [*csv.DictReader(path.open(newline=""))]


def read_csv(page: Path) -> dict[tuple[str, str], dict[str, str]]:
    return {(line["row"], line["column"]): line for line in csv_lines(page.with_suffix(".csv"))}


def tables(page: str) -> list[list[list[str]]]:
    """The cells of each table of a page, read as GitHub does: `\\|` is no border; every row as wide as its head."""
    found, lines = [], []
    for line in [*page.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")])
        elif lines:
            assert len({len(cells) for cells in lines}) == 1 and set(lines[1]) == {"---"}
            found.append([[cell.replace("\0", "|") for cell in cells] for cells in lines[:1] + lines[2:]])
            lines = []
    return found
