"""What is committed under results/: each number of a table's pages is that of the JSONs beside it."""

import json
import re
import shutil
import statistics
from collections import Counter

import pytest
from conftest import ROOT
from grid_files import csv_lines, tables
from tables.grid import Grid
from tables.results import take_recorded
from tables.trainings import write_table

from metaperturb import load_phi

PAGES = sorted(path for path in (ROOT / "results").glob("*/*.csv") if path.with_suffix("").is_dir())


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")


@each_page
def test_every_record_is_counted_in_its_line(page):
    folder = page.with_suffix("")  # a result counts in place of a record that its training diverged
    records = {path.name: path for path in [*folder.glob("diverged/*--*.json"), *folder.glob("*--*.json")]}
    found = [json.loads(path.read_text()) for path in records.values()]
    places = Counter((record["cell"]["row"], record["cell"]["column"], record["metrics"] is None) for record in found)
    for line in csv_lines(page):
        for key, lost in (("seeds", False), ("diverged", True)):
            assert int(line.get(key) or 0) == places.pop((line["row"], line["column"], lost), 0)
    assert not places
    assert len({(r["cell"]["row"], r["cell"]["column"], r["seed"]) for r in found}) == len(found)


def test_each_page_names_its_command():
    text = "".join(path.read_text() for path in (ROOT / "results").glob("*.md"))
    for page in PAGES:
        table, preset = page.parent.name, page.stem
        assert f"./run.sh {table} --preset {preset}" in text and f"({table}/{preset}.md)" in text, page


COLUMNS = (("s-CIFAR100", "cpu_paper_settings"), ("CUB (50 classes)", "cpu_paper_settings"))
COLUMNS += (("CUB (50 classes)", "cpu_full_length"),)


def of_table1(column: str, preset: str) -> dict[str, dict[str, str]]:
    """Row → its line; the control at 32 pixels is a row of another table."""
    known = csv_lines(ROOT / "results" / "table1" / f"{preset}.csv")
    if preset == "cpu_full_length":
        controls = csv_lines(ROOT / "results" / "meta_training" / "cpu.csv")
        known += [line for line in controls if line["row"].startswith("no meta-training")]
    return {line["row"]: line for line in known if line["column"] == column}


def spread(line: dict[str, str], *, seeds: bool) -> str:
    deviation = f" ± {float(line['accuracy_std']):.2f}" if line["accuracy_std"] else ""
    return f"{float(line['accuracy']):.2f}{deviation}" + (f" ({line['seeds']})" if seeds else "")


def agree(shown: str, expected: str) -> bool:
    """A page rounds the numbers themselves, not the four digits of the CSV file: the last digit may differ by one."""
    numbers = [[float(number) for number in re.findall(r"\d+\.\d+", text)] for text in (shown, expected)]
    rest = [re.sub(r"\d+\.\d+", "", text) for text in (shown, expected)]
    return rest[0] == rest[1] and numbers[0] == pytest.approx(numbers[1], abs=0.0101)


def gain(line: dict[str, str]) -> str:
    return f"{float(line['difference']):+.2f} [{float(line['low_95']):+.2f}, {float(line['high_95']):+.2f}]"


def gain_of_paper(with_phi: str, base: str) -> str:
    return f"{float(with_phi.partition('±')[0]) - float(base.partition('±')[0]):+.2f}"


def test_all_rows_of_table_1_are_those_of_the_pages():
    """Each row's numbers, and the paper's beside them."""
    text = (ROOT / "results" / "table1.md").read_text().partition("## All rows")[2].partition("\n## ")[0]
    known = [of_table1(*place) for place in COLUMNS]
    (_, *rows, gains) = tables(text)[0]
    assert sorted(row[0] for row in rows) == sorted({name for of_column in known for name in of_column})
    for name, s_cifar100, here, cub, *here_on_cub in rows:
        for of_column, paper, ours in zip(known, (s_cifar100, cub, cub), (here, *here_on_cub), strict=True):
            if (line := of_column.get(name)) is None:
                assert ours == "–"
                continue
            assert agree(ours, spread(line, seeds=True))
            assert paper.replace(" ", "") == line["paper"]
    _, *papers_and_ours = gains
    for paper, of_column in zip(papers_and_ours[0:3:2], known, strict=False):
        assert paper == gain_of_paper(of_column["MetaPerturb"]["paper"], of_column["Base"]["paper"])
    for text, of_column in zip([papers_and_ours[i] for i in (1, 3, 4)], known, strict=True):
        assert text == f"{gain(of_column['MetaPerturb'])} ({of_column['MetaPerturb']['pairs']})"


def test_the_readmes_results_are_those_of_the_pages():
    (_, *rows) = tables((ROOT / "README.md").read_text().partition("## Does it work?")[2])[0]
    known = [of_table1(*place) for place in COLUMNS]
    of_cub = known[-1]
    known.append({"Base": of_cub["Finetuning (FT)"], "MetaPerturb": of_cub["FT + MetaPerturb"]})
    ours = [row for row in rows if row[1] == "here"]
    for (_, _, base, control, with_phi, difference, seeds), of_column in zip(ours, known, strict=True):
        assert (base, with_phi) == tuple(spread(of_column[name], seeds=False) for name in ("Base", "MetaPerturb"))
        assert (difference, seeds) == (gain(of_column["MetaPerturb"]), of_column["MetaPerturb"]["pairs"])
        if (line := of_column.get("no meta-training")) is not None:
            fewer = "" if line["seeds"] == seeds else f" ({line['seeds']} seeds)"
            assert agree(control, spread(line, seeds=False) + fewer)
    papers = [row for row in rows if row[1] == "paper"]
    for (_, _, base, _, with_phi, difference, _), of_column in zip(papers, (*known[:2], known[3]), strict=True):
        assert base.replace(" ", "") == of_column["Base"]["paper"]
        assert with_phi.replace(" ", "") == of_column["MetaPerturb"]["paper"]
        assert difference == gain_of_paper(with_phi, base)


def test_the_gains_at_a_glance_are_those_of_the_pages():
    (_, *rows, _) = tables((ROOT / "results" / "README.md").read_text())[0]
    known = [of_table1(*place)["MetaPerturb"] for place in COLUMNS] + [of_table1(*COLUMNS[-1])["FT + MetaPerturb"]]
    table2 = csv_lines(ROOT / "results" / "table2" / "cpu_full_length.csv")
    known += [line for line in table2 if line["row"] == "MetaPerturb"]
    for row, line in zip(rows, known, strict=True):
        difference, *interval = (f"{float(line[key]):.1f}" for key in ("difference", "low_95", "high_95") if line[key])
        text = f"{difference} [{', '.join(interval)}]" if interval else difference
        assert (row[1], row[-1]) == (text.replace("-", "−"), line["pairs"])


@each_page
def test_report_makes_the_page_again(page, tmp_path):
    """Without the φ that was given for its trainings, of which only what was kept of its making is there."""
    folder = tmp_path / page.stem
    shutil.copytree(page.with_suffix(""), folder)
    grid = Grid(ROOT / "configs" / f"{page.parent.name}.yaml", page.stem)
    take_recorded(grid, folder)
    made = write_table(grid, folder)
    for suffix in (".md", ".csv"):
        assert made.with_suffix(suffix).read_text() == page.with_suffix(suffix).read_text()


def test_records_and_cards_say_nothing_of_folders_of_the_machine():
    results = ROOT / "results"
    found = {path: path.read_text() for path in results.rglob("*.json")}
    cards = [*results.rglob("*.pt"), *(ROOT / "src").rglob("shipped/*.pt")]
    found |= {path: json.dumps(load_phi(path).card) for path in cards}
    assert {path.suffix for path in found} == {".json", ".pt"}
    for path, content in found.items():  # a text that begins with /, or one of several with commas between
        assert re.findall(r'(?:"|, *)/[^"]*', content) == [], path


PAGES_OF_RUNS = {  # page → its rows: what the records are called, and which of their numbers
    "one_pass": {
        "Base": ("base", "metrics"),
        "control, 100 draws": ("control", "metrics"),
        "control, one pass": ("control", "one_pass"),
        "shipped φ, 100 draws": ("shipped", "metrics"),
        "shipped φ, one pass": ("shipped", "one_pass"),
        "CUB, 32 pixels, shipped φ, 100 draws": ("long-shipped", "metrics"),
        "CUB, 32 pixels, shipped φ, one pass": ("long-shipped", "one_pass"),
    },
    "imagenet": {
        "Base": ("base", "metrics"),
        "φ, 20 draws": ("metaperturb", "metrics"),
        "φ, one pass": ("metaperturb", "one_pass"),
        "label smoothing": ("label_smoothing", "metrics"),
        "mixup": ("mixup", "metrics"),
    },
}


@pytest.mark.parametrize("page", PAGES_OF_RUNS)
def test_pages_of_single_runs_have_the_numbers_of_their_records(page):
    text = (ROOT / "results" / f"{page}.md").read_text()
    for row, (name, part) in PAGES_OF_RUNS[page].items():
        paths = sorted((ROOT / "results" / page).glob(f"{name}-seed*.json"))
        found = [json.loads(path.read_text())[part] for path in paths]
        cells = [row]
        for metric, factor, digits in (("accuracy", 100, 2), ("nll", 1, 2), ("ece", 100, 1)):
            values = [factor * numbers[metric] for numbers in found]
            cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        assert f"| {' | '.join([*cells, str(len(found))])} |" in text
