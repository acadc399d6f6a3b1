"""Every table and figure that exists, the paper's numbers beside ours, on one self-contained HTML page.

    ./run.sh report                          # results/ and figures/ → results/report.html

The page needs nothing but itself: pictures are inside, and it asks no server for anything.
"""

import base64
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from metaperturb.cli import argument_parser, run_program
from metaperturb.errors import UserError
from metaperturb.storage import reason, write_atomically

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figure:
    """A picture of `figures/`, by the beginning of its file name."""

    stem: str
    title: str
    shows: str
    paper: str = ""  # what the paper's figure shows, in a sentence of ours


TABLES = {
    "table1": "Table 1",
    "table2": "Table 2",
    "table3": "Table 3",
    "schedule": "Length of training",
    "networks": "Networks of other families",
    "recipe": "Today's recipe",
    "target_size": "Number of training images",
    "meta_training": "What meta-training needs",
    "select": "Selection of φ",
    "tune": "Hyperparameters",
}
FIGURES = (
    Figure("fig1", "Figure 1: the idea", "One φ is meta-trained over many tasks and then used by other networks."),
    Figure("fig2", "Figure 2: the two functions", "How noise and scale are computed, with shapes."),
    Figure("fig3", "Figure 3: where it acts", "A site in a residual and in a plain network."),
    Figure("phi", "The 82 numbers", "What each of them is, with the learned values."),
    Figure(
        "fig5",
        "Figure 5: convergence",
        "Test loss and accuracy against training steps; mean and standard deviation over seeds.",
        "On Aircraft and Cars, MetaPerturb ends with the lowest test loss and the highest accuracy.",
    ),
    Figure(
        "fig6-robustness",
        "Figure 6 a–c: robustness",
        "Accuracy under PGD that averages the gradient over the network's noise (EoT).",
        "MetaPerturb is above every other regularizer, and under small L2 and L1 attacks above adversarial training.",
    ),
    Figure(
        "fig6-calibration",
        "Figure 6 d: calibration",
        "Accuracy against confidence.",
        "MetaPerturb lowers the expected calibration error; Manifold Mixup raises it above Base.",
    ),
    Figure(
        "fig6-samples",
        "Figure 6 d: Monte-Carlo samples",
        "What more samples in a prediction buy: accuracy, calibration error, and what they cost: time.",
    ),
    Figure(
        "fig7",
        "Figure 7: learned scales",
        "The scale s of each channel, block by block; beyond the paper, how much the noise on it scatters.",
        "Low blocks: nearly the same for all channels and data sets; high blocks: widely spread.",
    ),
    Figure(
        "fig8",
        "Figure 8: loss surfaces",
        "Training loss along two filter-normalized random directions.",
        "MetaPerturb and Manifold Mixup lie in flatter surroundings than Base.",
    ),
    Figure(
        "compare", "Methods side by side", "Final accuracy, loss and calibration error: points are seeds, bars means."
    ),
    Figure(
        "lengths",
        "Length of training",
        "Final accuracy against training steps; mean and standard deviation over seeds.",
    ),
    Figure("amount", "Number of training images", "Final accuracy against the size of the training set."),
    Figure(
        "effort",
        "What meta-training needs",
        "Final accuracy against the steps, tasks and classes of φ's meta-training.",
    ),
    Figure("benchmark", "Speed", "Cost against the number of tasks and processes, and of the exchange of gradients."),
    Figure("demo", "The demo", "What ./run.sh demo draws."),
    Figure("trial", "Trials", "Meta-training in a reduced setting."),
)
STYLE = """
:root { --ink: #1b1b1b; --faint: #666; --line: #ddd; --ours: #D55E00; --band: #faf7f2; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 2px solid var(--line); } h3 { margin-bottom: .3rem; }
nav a { margin-right: 1rem; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); }
tbody tr:nth-child(even) { background: var(--band); }
.ours { font-weight: 600; } .paper, .note { color: var(--faint); } .paper { display: block; font-size: .85em; }
td.long { white-space: normal; text-align: left; min-width: 14rem; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; background: #fff; }
figcaption { color: var(--faint); }
@media screen and (max-width: 40rem) {
  body { font-size: 15px; padding: .6rem; } th, td { padding: .25rem .4rem; }
  figure { overflow-x: auto; } img { min-width: 44rem; max-width: none; }
}
@media print {
  body { max-width: none; font-size: 10pt; } nav { display: none; } .scroll { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .1rem .3rem; }
  figure, tr, section { break-inside: avoid; } h2, h3 { break-after: avoid; }
  img { max-height: 20cm; } details::details-content { content-visibility: visible; }
  td.long { min-width: 9rem; }
}
"""


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the tables")
    parser.add_argument("--figures", type=Path, default=ROOT / "figures", help="folder of the pictures")
    parser.add_argument("--out", type=Path, help="the page [<results>/report.html]")
    arguments = parser.parse_args()

    def report() -> None:
        out = arguments.out or arguments.results / "report.html"
        page = render(arguments.results, arguments.figures)
        write_atomically(out, lambda file: file.write(page.encode()))
        print(out)

    return run_program(report, show_traceback=arguments.traceback, resumes=False)


def render(results: Path, figures: Path) -> str:
    """The page.

    Raises:
        UserError: there is neither a table nor a picture, or one of them cannot be read.
    """
    tables = [*_tables(results)]
    pictures = [*_pictures(figures)]
    if not tables and not pictures:
        raise UserError(f"{results} has no table and {figures} no picture yet (./run.sh table1, ./run.sh figures)")
    sections = [("tables", "Tables", tables), ("figures", "Figures", pictures)]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, parts in sections if parts)
    body = "".join(f'<h2 id="{anchor}">{name}</h2>{"".join(parts)}' for anchor, name, parts in sections if parts)
    intro = (
        "Measured with this code, the paper's numbers beside it. Accuracy in %, mean ± standard deviation over seeds "
        "(how many). <em>Reduced</em> settings are named; nothing is tuned on test images."
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # else browsers ask the server for one
        f"<title>MetaPerturb: tables and figures</title><style>{STYLE}</style></head><body>"
        f"<h1>MetaPerturb: tables and figures</h1><p>{intro}</p><nav>{links}</nav>{body}</body></html>\n"
    )


def _tables(results: Path) -> Iterator[str]:
    others = sorted({path.parent.name for path in results.glob("*/*.csv")} - TABLES.keys())
    for name, title in {**TABLES, **{name: name for name in others}}.items():
        for path in sorted((results / name).glob("*.csv")):
            yield _table(title, path)


def _table(title: str, path: Path) -> str:
    """One CSV of `./run.sh table…`: rows × columns as in the paper, then every number."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [*csv.DictReader(file, restval="")]
        rows, columns = (list(dict.fromkeys(line[key] for line in lines)) for key in ("row", "column"))
        by_place = {(line["row"], line["column"]): line for line in lines}
        overview = [[escape(row), *(_cell(by_place.get((row, column))) for column in columns)] for row in rows]
        shared = _shared(sorted({line["departs_from_paper"] for line in lines} - {""}))
        details = [_details(line, shared) for line in lines]
    except (OSError, UnicodeDecodeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table ({reason(error)}); make it again with --report") from error
    head = ["", "", "seeds", "accuracy", "paper", "ours − paper", "to baseline [95 %]", "NLL", "ECE", "setting"]
    notes = (
        f'<p class="note">Every reduced cell departs from the paper: {escape("; ".join(shared))}</p>' if shared else ""
    )
    return (
        f"<h3>{escape(title)}, preset {escape(path.stem)}</h3>"
        f"{_html_table(['', *map(escape, columns)], overview)}{notes}"
        f"<details><summary>every number</summary>{_html_table(head, details)}</details>"
    )


def _shared(departures: Sequence[str]) -> list[str]:
    """The changes that all reduced cells have in common; each cell's own are among the details."""
    lists = [text.split("; ") for text in departures]
    return [change for change in lists[0] if all(change in other for other in lists)] if lists else []


def _cell(line: dict[str, str] | None) -> str:
    if line is None:
        return "–"
    reduced = '<span class="note"> reduced</span>' if line["setting"] == "reduced" else ""
    paper = line["paper"].replace("±", " ± ") or "–"
    ours = f"{_spread(line, 'accuracy')} ({_seeds(line)})"
    return f'<span class="ours">{ours}</span>{reduced}<span class="paper">paper {escape(paper)}</span>'


def _details(line: dict[str, str], shared: Sequence[str]) -> list[str]:
    gap = f"{float(line['ours_minus_paper']):+.2f}" if line["ours_minus_paper"] else "–"
    difference = "–"
    if line["difference"]:
        difference = f"{float(line['difference']):+.2f}"
        if line["low_95"]:
            difference += f" [{float(line['low_95']):+.2f}, {float(line['high_95']):+.2f}]"
    numbers = [_spread(line, "accuracy"), line["paper"].replace("±", " ± ") or "–", gap, difference]
    own = [change for change in line["departs_from_paper"].split("; ") if change not in shared]
    setting = "; ".join(own) or "reduced, as said above" if line["departs_from_paper"] else "the paper's"
    return [
        escape(line["row"]),
        escape(line["column"]),
        _seeds(line),
        *numbers,
        _spread(line, "nll"),
        _spread(line, "ece"),
        escape(setting),
    ]


def _seeds(line: dict[str, str]) -> str:
    lost = int(line.get("diverged") or 0)  # pages made earlier do not tell
    return line["seeds"] + (f"; {lost} diverged" if lost else "")


def _spread(line: dict[str, str], key: str) -> str:
    if line["seeds"] == "0":  # all diverged
        return "–"
    spread = line[f"{key}_std"]
    return f"{float(line[key]):.2f}" + (f" ± {float(spread):.2f}" if spread else "")


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        return f'<td class="long">{text}</td>' if len(text) > 60 and "<" not in text else f"<td>{text}</td>"

    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _pictures(figures: Path) -> Iterator[str]:
    left = sorted(figures.rglob("*.png"))
    for figure in (*FIGURES, Figure("", "Others", "Further pictures.")):
        paths = [path for path in left if path.name.startswith(figure.stem)]
        left = [path for path in left if path not in paths]
        if not paths:
            continue
        paper = f'<p class="note">Paper: {escape(figure.paper)}</p>' if figure.paper else ""
        first, *others = (_picture(path, figures) for path in paths)
        head = f"<h3>{escape(figure.title)}</h3><p>{escape(figure.shows)}</p>{paper}"
        yield f"<section>{head}{first}</section>" + "".join(others)  # printed, a title stays with its first picture


def _picture(path: Path, figures: Path) -> str:
    try:
        with Image.open(path) as image:
            image.verify()
        content = base64.b64encode(path.read_bytes()).decode()
    except (OSError, SyntaxError) as error:  # what Pillow raises on a broken file
        raise UserError(f"{path}: cannot be read as a picture ({reason(error)}); draw it again") from error
    name = escape(path.relative_to(figures).with_suffix("").as_posix())  # folders tell equal names apart
    numbers = f", numbers in {name}.csv" if path.with_suffix(".csv").exists() else ""
    return (
        f'<figure><img src="data:image/png;base64,{content}" alt="{name}">'
        f"<figcaption>{name}{numbers}</figcaption></figure>"
    )


if __name__ == "__main__":
    sys.exit(main())
