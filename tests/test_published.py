"""What is committed under results/: each number of a table's page is that of the JSONs beside it."""

import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted(path for path in (ROOT / "results").glob("*/*.csv") if path.with_suffix("").is_dir())


def trainings(folder: Path) -> dict[tuple[str, str], list[list[dict]]]:
    """The JSONs of each row and column of a table, those of like settings together."""
    groups = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*--*.json")):
        record = json.loads(path.read_text())
        groups[record["row"], record["column"]][path.stem.rpartition("--")[2]].append(record)
    return {place: [*by_settings.values()] for place, by_settings in groups.items()}


def numbers(records: list[dict]) -> dict[str, float | None]:
    found = {"seeds": float(len(records))}
    for name, unit in (("accuracy", 100), ("nll", 1), ("ece", 100)):
        values = [unit * record["result"]["metrics"][name] for record in records]
        found[name] = statistics.mean(values)
        found[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_pages_say_what_their_jsons_say(page):
    known = trainings(page.with_suffix(""))
    lines = [line for line in csv.DictReader(page.read_text().splitlines()) if line["accuracy"]]
    assert lines
    for line in lines:
        candidates = [numbers(records) for records in known[line["row"], line["column"]]]
        said = {name: float(line[name]) if line[name] else None for name in candidates[0]}
        assert said in [pytest.approx(candidate, abs=1e-4) for candidate in candidates], line


def test_each_page_names_its_command():
    text = (ROOT / "results" / "README.md").read_text()
    for page in PAGES:
        table, preset = page.parent.name, page.stem
        assert f"./run.sh {table} --preset {preset}" in text and f"({table}/{preset}.md)" in text, page
