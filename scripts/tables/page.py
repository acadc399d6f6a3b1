"""A grid's results as Markdown and CSV: ours beside the paper's."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tables.grid import Grid
from tables.results import Entry, Results, finished, images_of, versions

NONE = "–"
PARTS = (("", "mean"), ("_std", "std"))  # of a metric, in the CSV
Marks = Mapping[tuple[str, ...], str]  # way of departing from the paper's setting → its letter; "" for none


def markdown(results: Results) -> str:
    """The page."""
    grid, entries = results.grid, results.entries()
    ways = dict.fromkeys(entry.differences for entry in entries if entry.differences)
    marks = {(): ""} | {way: f" ({_letter(i)})" for i, way in enumerate(ways)}
    paper = "The second line is the paper's number. " if grid.paper else ""
    usual = "the paper's" if grid.paper else "that of the preset `paper`"
    parts = [
        f"# {grid.title}",
        f"Preset `{grid.preset}`. Each cell is the accuracy in %: mean ± standard deviation (number of seeds). {paper}"
        f"A letter marks a setting that differs from {usual}.",
        _overview(grid, entries, marks),
        "\n".join(f"-{note}" for note in _notes(results, entries, marks)),
        "## In detail",
        "The difference from the baseline is the mean over the seeds that both have, with the 95 % interval of "
        "Student's t over these pairs. NLL is in nats.",
        _details(entries, marks),
    ]
    if trained := _meta_trainings(results):
        parts += ["## The φ behind it", trained]
    return "\n\n".join(part for part in parts if part) + "\n"


def csv_text(results: Results) -> str:
    """One line a row and column."""
    out, entries = io.StringIO(), results.entries()
    lines = [_csv_line(entry, _measured_once(entries)) for entry in entries]
    writer = csv.DictWriter(out, [*lines[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_line(entry: Entry, once: bool) -> dict[str, Any]:
    line = {"row": entry.row, "column": entry.column, "seeds": len(entry.records)}
    line |= {f"{key}{end}": getattr(of, part) for key, of in entry.metrics.items() for end, part in PARTS}
    line |= {"paper": entry.paper, "ours_minus_paper": entry.gap, "baseline": entry.versus}
    line |= zip(("difference", "low_95", "high_95", "pairs"), entry.difference or (None,) * 4, strict=True)
    line |= {"setting": "reduced" if entry.differences else "paper", "departs_from_paper": "; ".join(entry.differences)}
    line |= {"code": "; ".join(entry.code), "diverged": entry.diverged}
    once = entry.one_pass if once else {}
    line |= {f"one_pass_{key}{end}": getattr(of, part) for key, of in once.items() for end, part in PARTS}
    return {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in line.items()}


def _overview(grid: Grid, entries: Sequence[Entry], marks: Marks) -> str:
    found = {}
    for entry in entries:
        ours = f"{entry.metrics['accuracy']} ({entry.seeds})" if entry.records else f"diverges ({entry.diverged})"
        found[entry.row, entry.column] = ours + marks[entry.differences]

    def text(row: str, column: str) -> str:
        ours = found.get((row, column), NONE)
        return f"{ours}<br>{_paper(grid.paper_value(row, column))}" if grid.paper else ours

    return markdown_table(
        ["", *grid.columns], [[row, *(text(row, name) for name in grid.columns)] for row in grid.rows]
    )


def _details(entries: Sequence[Entry], marks: Marks) -> str:
    head = ["", "", "seeds", "accuracy %", "paper", "ours − paper", "difference from baseline"]
    head += ["NLL", "ECE %", "setting"]
    head += ["one pass: accuracy %", "one pass: NLL", "one pass: ECE %"] * _measured_once(entries)
    rows = []
    for entry in entries:
        (accuracy, nll, ece), one_pass = (map(str, of.values()) for of in (entry.metrics, entry.one_pass))
        gap = NONE if entry.gap is None else f"{entry.gap:+.2f}"
        versus = f"{entry.difference} to {entry.versus}, n = {entry.difference.n}" if entry.difference else NONE
        setting = f"reduced{marks[entry.differences]}" if entry.differences else "paper"
        line = [entry.row, entry.column, entry.seeds, accuracy, _paper(entry.paper), gap, versus, nll, ece, setting]
        rows.append([*line, *one_pass][: len(head)])
    return markdown_table(head, rows)


def _measured_once(entries: Sequence[Entry]) -> bool:
    return any(entry.one_pass["accuracy"].n for entry in entries)


def _notes(results: Results, entries: Sequence[Entry], marks: Marks) -> Iterator[str]:
    """What a reader must know so as not to compare what cannot be compared."""
    grid, done = results.grid, {place: record for place, record in results.records.items() if finished(record)}
    common = set.intersection(*(set(entry.differences) for entry in entries))
    if common:
        usual = "the paper" if grid.paper else "the preset `paper`"
        yield f" All cells differ from {usual} in: {'; '.join(c for c in entries[0].differences if c in common)}"
    for differences, mark in marks.items():
        own = [change for change in differences if change not in common]
        if mark:
            yield f"{mark} {'; '.join(own) or 'differs in nothing else'}"
    if grid.tuned_path is not None:
        values = (
            (column, "; ".join(f"{name} {listed(own)}" for name, own in methods.items() if own))
            for column, methods in grid.tuned.items()
        )
        for chosen, columns in _by_text(values).items():
            yield f" Hyperparameters tuned on held-out training images of {columns}: {chosen}"
        if grid.untuned:
            yield f" Hyperparameters on {', '.join(grid.untuned)} are the defaults of their sources, not tuned."
    elif not grid.tunes:
        yield (
            " Hyperparameters of the regularizers are the defaults of their sources, unless this page names another "
            "value. They were not tuned for these data."
        )
    reported = {name: of for name, of in grid.columns.items() if any(grid.paper_value(row, name) for row in grid.rows)}
    for name, column in reported.items():
        if column["stands_for"] != name:
            how = "" if column["comparable"] else " Its images differ, so no difference from the paper is given."
            yield f" `{name}` stands in for the paper's {column['stands_for']}.{how}"
    if others := [name for name, of in reported.items() if of["stands_for"] == name and not of["comparable"]]:
        yield f" {', '.join(others)}: the images differ from the paper's, so its numbers are not comparable to ours."
    for images, columns in _by_text((place[1], images_of(record)) for place, record in done.items()).items():
        yield f" {columns}: {images}."
    code = versions(results.records.values())
    several = f"The cells come from {len(code)} versions of the code. The CSV names the version of each."
    yield f" {several if len(code) > 1 else f'Code: {code[0]}.'}"
    if taken := sum("taken_from" in record["cell"] for record in done.values()):
        were = "was" if taken == 1 else "were"
        yield f" {taken} of these trainings {were} run for another table or preset. The records say for which."
    for (row, column, seed), record in results.records.items():
        if not finished(record):
            yield f" {row} on {column}, seed {seed}, diverged: {record['diverged']}."
    if missing := len(results.cells) - len(results.records):
        yield f" {missing} of {len(results.cells)} cells have not run yet, or failed."


def _by_text(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Name and what is said of it → what is said, and of which names."""
    found: dict[str, dict[str, None]] = {}
    for name, text in pairs:
        found.setdefault(text, {})[name] = None
    return {text: ", ".join(names) for text, names in found.items()}


def listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _meta_trainings(results: Results) -> str:
    """Loss and time of each: what joint training saves over the lookahead, for one."""
    rows: dict[tuple[str, str], list[str]] = {}  # of each φ, by its name in the grid and its id
    for place, cell in results.cells.items():
        if not (need := cell.needs.get("phi")):
            continue
        row = rows.setdefault((need.name, need.id), [])
        card = results.records.get(place, {}).get("phi_card") or {}
        if not (card.get("source") and card.get("hardware")):
            continue  # of which less is known
        steps, m, hardware = card["config"]["steps"], card["metrics"] or {}, card["hardware"]
        pace = f"{card['seconds'] / steps:.2f}" if steps else NONE
        losses = [f"{m[key]:.3f}" if key in m else NONE for key in ("train_loss", "test_loss")]
        processes = f"{card['processes']} process{'es' * (card['processes'] > 1)}"
        machine = f"{hardware['device']}, {processes} ({hardware['cpu']}, {hardware['cores']} cores)"
        row[:] = [need.name, f"{card['source']['images']:,}", str(steps), pace, *losses, machine, f"`{need.id}`"]
    head = ["φ", "images", "steps", "s / step", "loss on D_tr", "loss on D_te", "hardware", "run"]
    return markdown_table(head, known) if (known := [row for row in rows.values() if row]) else ""


def _letter(i: int) -> str:
    return ("" if i < 26 else _letter(i // 26 - 1)) + chr(ord("a") + i % 26)


def _paper(value: str | None) -> str:
    return NONE if value is None else value.replace("±", " ± ")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; a `|` in a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
