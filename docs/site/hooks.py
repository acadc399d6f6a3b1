"""The site's pages: Markdown from all over the repository, under the paths that it has there, and what it links to."""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/*.md", "results/**/*.md", "src/metaperturb/shipped/*.md")
NUMBERS = re.compile(r"<td>([-+−]?\d[^<]{0,29})</td>")
LINK = re.compile(
    r"\[((?:[^][]|\[[^][]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)"
)  # text, path, anchor; the text may be a picture


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in list(files):
        if Path(file.abs_src_path or "/").is_relative_to(ROOT / "docs"):
            files.remove(file)  # it comes back under its path in the repository, like all others
    paths = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    for page in list(paths):
        paths |= {path for path in _linked(page.read_text(), page.parent) if path.is_file()}
    for path in sorted(paths | {path for path in (ROOT / "docs/site").iterdir() if path.suffix != ".py"}):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    files.append(File.generated(config, "docs/reference.md", content=_reference()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Folders are no pages: what points to one becomes its text."""
    folder = (ROOT / page.file.src_uri).parent
    if page.file.src_uri.count("/") > 1:
        page.meta["search"] = {"boost": 0.5}  # generated: what was found stands on the page of its table
    return LINK.sub(lambda link: link[1] if (folder / link[2]).is_dir() else link[0], markdown)


def on_page_content(html: str, **_: object) -> str:
    """Numbers in tables stay on one line."""
    return NUMBERS.sub(lambda cell: f"<td>{cell[1].replace(' ', chr(0xA0))}</td>", html)


def _linked(markdown: str, folder: Path) -> set[Path]:
    """The files of the repository that it shows or links to."""
    inner = [target for link in LINK.finditer(markdown) for target in LINK.findall(link[1])]
    targets = [link[1] for link in [*LINK.findall(markdown), *inner] if "://" not in link[1]]
    return {path for path in ((folder / target).resolve() for target in targets) if path.is_relative_to(ROOT)}


def _reference() -> str:
    """What `import metaperturb` offers, by its docstrings."""
    names = re.search(r"__all__ = (\[.*?\])", (ROOT / "src/metaperturb/__init__.py").read_text(), re.S)[1]
    sections = "\n\n".join(f"::: metaperturb.{name}" for name in ast.literal_eval(names))
    return f"# Reference\n\nWhat `import metaperturb` offers.\n\n{sections}\n"
