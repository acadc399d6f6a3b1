"""The page that gathers tables and figures, looked at in a real browser."""

import base64
import csv
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from tables.page import CSV_COLUMNS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def line(row: str, column: str, **values: str) -> dict[str, str]:
    return dict.fromkeys(CSV_COLUMNS, "") | {"row": row, "column": column, "seeds": "3", "setting": "paper"} | values


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Results and figures as the other commands leave them, with names that HTML must escape."""
    results, figures = (tmp_path_factory.mktemp(name) for name in ("results", "figures"))
    measured = {"accuracy": "31.5", "accuracy_std": "0.25", "nll": "2.1", "nll_std": "0.01", "ece": "3", "ece_std": "1"}
    lines = [
        line("Base", "CUB", paper="30.63±0.66", ours_minus_paper="0.87", **measured),
        line(
            "a <b> & c",
            "CUB",
            **measured | {"setting": "reduced", "departs_from_paper": "steps: 10000 → 20; lr: 1 → <2>"},
            difference="1.5",
            low_95="-0.25",
            high_95="3.25",
        ),
        line("c", "CUB", **measured | {"setting": "reduced", "departs_from_paper": "steps: 10000 → 20"}),
    ]
    for table in ("table1", "of-my-own"):
        (results / table).mkdir()
        with open(results / table / "quick.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows(lines)
    for name in ("fig5-cub", "fig7-scales", "fig7-more", "zebras"):
        Image.new("RGB", (40, 30), "teal").save(figures / f"{name}.png")
    (figures / "fig5-cub.csv").write_text("step,accuracy\n1,2\n")
    return results, figures


def make(results: Path, figures: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "report.py", "--results", results, "--figures", figures, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    completed = make(*folders, "--out", str(path))
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.strip() == str(path)
    return path


class Texts(HTMLParser):
    """The table cells, the pictures and all addresses of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.cells, self.images, self.addresses, self.open = [], [], [], False
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [value for key, value in attributes.items() if key in ("src", "href")]
        if tag == "img":
            self.images.append(attributes)
        if tag in ("td", "th"):
            self.cells.append("")
            self.open = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open = False

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data


def test_ours_and_the_papers_stand_side_by_side(page):
    cells = Texts(page.read_text()).cells
    assert "31.50 ± 0.25 (3)paper 30.63 ± 0.66" in cells
    assert "31.50 ± 0.25 (3) reducedpaper –" in cells
    details = cells.index("Base", cells.index("setting"))
    assert cells[details : details + 10] == [
        *("Base", "CUB", "3", "31.50 ± 0.25", "30.63 ± 0.66", "+0.87", "–", "2.10 ± 0.01", "3.00 ± 1.00", "the paper's")
    ]
    assert cells[details + 10 : details + 17] == [
        *("a <b> & c", "CUB", "3", "31.50 ± 0.25", "–", "–", "+1.50 [-0.25, +3.25]")
    ]
    assert (cells[details + 19], cells[details + 29]) == ("lr: 1 → <2>", "reduced, as said above")
    assert "Every reduced cell departs from the paper: steps: 10000 → 20<" in page.read_text()


def test_every_picture_is_inside_and_nothing_is_asked_for(page, folders):
    parsed = Texts(page.read_text())
    assert [image["alt"] for image in parsed.images] == ["fig5-cub", "fig7-more", "fig7-scales", "zebras"]
    for image in parsed.images:
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert content == (folders[1] / f"{image['alt']}.png").read_bytes()
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses)
    assert "of-my-own, preset quick" in page.read_text() and "Further pictures." in page.read_text()
    assert "numbers in fig5-cub.csv" in page.read_text() and "fig7-more.csv" not in page.read_text()


def test_nothing_yet_and_broken_tables_are_said(folders, tmp_path):
    completed = make(tmp_path / "none", tmp_path / "none", "--out", str(tmp_path / "page.html"))
    assert completed.returncode == 1 and "no picture yet" in completed.stderr and "Traceback" not in completed.stderr
    broken = tmp_path / "results" / "table2"
    broken.mkdir(parents=True)
    header = ",".join(CSV_COLUMNS) + "\n"
    for content in ("row,column\nBase,CUB\n", header + ",".join(["x"] * len(CSV_COLUMNS)) + "\n", header + "a,b,1\n"):
        (broken / "paper.csv").write_text(content)
        completed = make(tmp_path / "results", folders[1], "--out", str(tmp_path / "page.html"))
        assert completed.returncode == 1 and "paper.csv: cannot be read as a table" in completed.stderr
        assert "Traceback" not in completed.stderr
    picture = (folders[1] / "fig5-cub.png").read_bytes()
    for content in (b"", picture[:40], b"<svg>"):
        (tmp_path / "fig5-cub.png").write_bytes(content)
        completed = make(folders[0], tmp_path, "--out", str(tmp_path / "page.html"))
        assert completed.returncode == 1 and "fig5-cub.png: cannot be read as a picture" in completed.stderr


def test_every_picture_and_table_that_is_committed_is_on_the_page(tmp_path):
    assert make(ROOT / "results", ROOT / "figures", "--out", str(tmp_path / "page.html")).returncode == 0
    content = (tmp_path / "page.html").read_text()
    names = {image["alt"] for image in Texts(content).images}
    pictures = [path.relative_to(ROOT / "figures") for path in (ROOT / "figures").rglob("*.png")]
    assert names == {path.with_suffix("").as_posix() for path in pictures}
    assert any(len(path.parts) > 1 for path in pictures)
    assert content.count(", preset ") == len([*(ROOT / "results").glob("*/*.csv")])


@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(page, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=BROWSER, args=QUIET)
        except playwright.Error as error:
            pytest.skip(f"no Chromium to open the page with ({str(error).splitlines()[0]})")
        tab = browser.new_page(viewport={"width": width, "height": 800})
        said, asked = [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
        loaded = "[...document.images].map(image => image.complete && image.naturalWidth)"
        assert tab.evaluate(loaded) == [40] * 4
        assert tab.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll by themselves
        browser.close()
