"""README, docs/ and results/: what they link to exists, what they say to type works, and the site shows all of it."""

import os
import re
import shutil
import statistics
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from conftest import ROOT

from metaperturb import models
from metaperturb.storage import load_json

AUTHORED = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]
PAGES = {*AUTHORED, *ROOT.glob("results/*/*.md"), *ROOT.glob("src/metaperturb/shipped/*.md")}
SPEED = "results/benchmark/cpu.json"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
each_page = pytest.mark.parametrize("page", AUTHORED, ids=lambda path: path.relative_to(ROOT).as_posix())
TARGET = re.compile(r"\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


@each_page
def test_the_front_page_and_sentences_are_short(page):
    """What stands between full stops, outside code, headings and tables; a paragraph or item ends its last one."""
    assert page.name != "README.md" or len(page.read_text().splitlines()) <= 180
    text = TARGET.sub("]", without_code(page.read_text()))
    text = re.sub(r"^(#|\||!).*$", "", text, flags=re.M)
    items = re.split(r"\n\s*\n|^- ", text, flags=re.M)
    sentences = [sentence for item in items for sentence in re.split(r"[.!?][*)]*\s", item)]
    lengths = [len(re.findall(r"\S*\w\S*", sentence)) for sentence in sentences]
    assert statistics.mean(filter(None, lengths)) <= 17


def test_links_lead_to_files_and_every_page_is_linked():
    linked = set()
    for page in PAGES:
        targets = [target for target in TARGET.findall(without_code(page.read_text())) if "://" not in target]
        paths = {page.parent / target.partition("#")[0] for target in targets if target[0] != "#"}
        assert [path for path in paths if not path.exists()] == [], page
        linked |= {path.resolve() for path in paths}
    assert PAGES - linked == {ROOT / "README.md"}


@each_page
def test_commands_and_variables_are_those_of_run_sh(page):
    script = (ROOT / "run.sh").read_text()
    code = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S))
    code += "\n" + "\n".join(re.findall(r"`([^`\n]*\./run\.sh[^`]*)`", page.read_text()))
    patterns = " | ".join(re.findall(r'^([\w"][\w"\[\]| -]*)\)', script, flags=re.M)).split(" | ")  # of its case
    for command in {*re.findall(r"\./run\.sh ([a-z][\w-]*)", code)}:
        assert any(fnmatch(command, pattern) for pattern in patterns), command
    for variable in {*re.findall(r"\b([A-Z]+_[A-Z]+|GPUS|SEED|PHI|INIT|METHOD)=", code)}:
        assert re.search(rf"\b{variable}\b", script), variable


def test_the_page_of_speed_says_what_its_records_say():
    page, suites = (ROOT / "results" / "benchmark" / "README.md").read_text(), load_json(ROOT / SPEED)["suites"]
    newer = [path for path in (ROOT / SPEED).parent.glob("*.json") if path != ROOT / SPEED]
    of_newer = [ratio for path in newer for ratio in load_json(path)["ratios"]]
    assert of_newer
    for found in [*suites["bars"]["ratios"], *suites["site"]["ratios"][:3], *of_newer]:
        ratio, *quartiles = (f"{found[key]:.2f}" for key in ("ratio", "q1", "q3"))
        assert f" {ratio} " in page and all(quartile in page or found["group"] == "memory" for quartile in quartiles)


def test_python_on_the_front_page_runs():
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    known = {"model": models.create("resnet8", num_classes=3, image_size=32)}
    exec(first, known)
    assert known["model"].metaperturb.phi is known["phi"]
    known |= {"steps": 2, "images": torch.rand(2, 3, 64, 64)}
    exec(second, known)
    assert known["model"].metaperturb.strength == 1.0
    torch.testing.assert_close(known["probability"].sum(1), torch.ones(2))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for name in ("material", "mkdocstrings"):
        pytest.importorskip(name, reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0 and not re.search("link|anchor", built.stderr), built.stderr
    return folder


def test_the_site_holds_every_page_and_what_it_links_to(site):
    for page in PAGES:
        html = page.with_suffix(".html").relative_to(ROOT).as_posix().replace("README", "index")
        assert (site / html).is_file()
    assert "Raises" in (site / "docs" / "reference.html").read_text()
    for page in {*site.rglob("*.html")} - {site / "404.html"}:
        for target in re.findall(r'(?:src|href)="(?!\w+:)([^"]+)"', page.read_text()):
            assert (page.parent / unquote(target).partition("#")[0]).exists(), (page, target)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(site, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to open the site with ({str(error).splitlines()[0]})")
        tab = browser.new_page(viewport={"width": width, "height": 800})
        said, asked = [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        for page in sorted({*site.rglob("*.html")} - {site / "404.html"}):
            tab.goto(page.as_uri())
            assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth)"), page
            assert tab.evaluate("document.documentElement.scrollWidth") <= width and said == [], page
        assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
        tab.goto((site / "results" / "table1.html").as_uri())
        table = tab.locator(".md-typeset__scrollwrap").first
        table.evaluate("wrap => { wrap.scrollLeft = 200 }")
        assert table.locator("td").first.bounding_box()["x"] >= 0  # the first column stays
        if width > 1000:
            tab.fill(".md-search__input", "TrivialAugment")
            tab.wait_for_selector(".md-search-result__item")
        browser.close()
