"""A grid's results as Markdown and CSV: ours beside the paper's."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tables.grid import Grid
from tables.results import Entry, Results, images_of

CSV_COLUMNS = (
    *("row", "column", "seeds", "accuracy", "accuracy_std", "nll", "nll_std", "ece", "ece_std"),
    *("paper", "ours_minus_paper", "baseline", "difference", "low_95", "high_95", "pairs"),
    *("setting", "departs_from_paper", "code", "diverged"),
)


def markdown(grid: Grid, results: Results, needs: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        grid: rows, columns and the paper's values.
        results: of its cells.
        needs: results of the runs that cells started from, by id.
    """
    entries = results.entries()
    marks = _marks(entries)
    below = ", and below it the paper's" if grid.paper else ""
    standard = "the paper's setting" if grid.paper else "that of the preset `paper`"
    parts = [
        f"# {grid.title}",
        f"Preset `{grid.preset}`. Accuracy in %, mean ± standard deviation over seeds (their number)"
        f"{below}. A letter marks a reduced setting, explained below; no letter: {standard}.",
        _overview(grid, entries, marks),
        *_notes(grid, results, needs, entries, marks),
        "## In detail",
        "Difference to the baseline: mean over seeds that both have, with the 95 % interval of Student's t over these "
        "pairs. NLL in nats.",
        _details(entries, marks),
    ]
    if runs := _meta_trainings(needs):
        parts += ["## The meta-trainings behind it", runs]
    return "\n\n".join(parts) + "\n"


def csv_text(results: Results) -> str:
    """One line a row and column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for entry in results.entries():
        d = entry.difference
        numbers = [x for m in entry.metrics.values() for x in (_number(m.mean), _number(m.std))]
        paper = [entry.paper, _number(entry.gap)]
        difference = [entry.versus, *([_number(d.mean), _number(d.low), _number(d.high), d.n] if d else [None] * 4)]
        setting = ["reduced" if entry.differences else "paper", "; ".join(entry.differences), "; ".join(entry.code)]
        n = entry.metrics["accuracy"].n
        writer.writerow([entry.row, entry.column, n, *numbers, *paper, *difference, *setting, entry.diverged])
    return out.getvalue()


def _overview(grid: Grid, entries: Sequence[Entry], marks: Mapping[tuple[str, ...], str]) -> str:
    by_place = {(entry.row, entry.column): entry for entry in entries}

    def text(row: str, column: str) -> str:
        entry = by_place.get((row, column))
        ours = "–"
        if entry is not None:
            accuracy = entry.metrics["accuracy"]
            number = f"{accuracy} ({entry.seeds})" if accuracy.n else f"diverges ({entry.diverged})"
            ours = f"{number}{_mark(entry, marks)}"
        return f"{ours}<br>{_paper(grid.paper_value(row, column))}" if grid.paper else ours

    rows = [[row, *(text(row, column) for column in grid.columns)] for row in grid.rows]
    return markdown_table(["", *grid.columns], rows)


def _details(entries: Sequence[Entry], marks: Mapping[tuple[str, ...], str]) -> str:
    head = ["", "", "seeds", "accuracy %", "paper", "ours − paper", "difference to baseline", "NLL", "ECE %", "setting"]
    rows = []
    for entry in entries:
        accuracy, nll, ece = (entry.metrics[key] for key in ("accuracy", "nll", "ece"))
        gap = "–" if entry.gap is None else f"{entry.gap:+.2f}"
        versus = "–" if entry.difference is None else f"{entry.difference} to {entry.versus}, n = {entry.difference.n}"
        setting = f"reduced{_mark(entry, marks)}" if entry.differences else "paper"
        ours = [entry.row, entry.column, entry.seeds, str(accuracy), _paper(entry.paper), gap, versus]
        rows.append([*ours, str(nll), str(ece), setting])
    return markdown_table(head, rows)


def _notes(
    grid: Grid,
    results: Results,
    needs: Mapping[str, Mapping[str, Any]],
    entries: Sequence[Entry],
    marks: Mapping[tuple[str, ...], str],
) -> list[str]:
    """What a reader must know so as not to compare what cannot be compared."""
    common = set.intersection(*(set(entry.differences) for entry in entries))
    lines = [f"- Common to all cells: {'; '.join(c for c in entries[0].differences if c in common)}"] if common else []
    for differences, mark in marks.items():
        own = [change for change in differences if change not in common]
        lines.append(f"- ({mark}) {'; '.join(own) or 'only what is common to all'}")
    if grid.tuned_path is not None:
        chosen: dict[str, list[str]] = {}  # values → columns
        for column, methods in grid.tuned.items():
            values = "; ".join(f"{method} {_settings(s)}" for method, s in methods.items() if s)
            chosen.setdefault(values, []).append(column)
        lines += [
            f"- Hyperparameters tuned on held-out training images of {grid.tuned_as or ', '.join(columns)}: {values}"
            for values, columns in chosen.items()
        ]
        if grid.untuned:
            lines.append(f"- Hyperparameters not tuned, but their sources' defaults, on {', '.join(grid.untuned)}.")
    elif not grid.tunes:
        lines.append(
            "- Hyperparameters of the regularizers: their sources' defaults where nothing else stands here, not tuned "
            "for these data."
        )
    for name, column in grid.columns.items():
        if column.stands_for != name and any(grid.paper_value(row, name) for row in grid.rows):
            how = "" if column.comparable else "; other data, so no difference is given"
            lines.append(f"- {name} stands in for the paper's {column.stands_for}{how}.")
    others = [
        name
        for name, column in grid.columns.items()
        if column.stands_for == name and not column.comparable and any(grid.paper_value(row, name) for row in grid.rows)
    ]
    if others:
        lines.append(
            f"- {', '.join(others)}: on other images than the paper's; its numbers are not comparable to ours."
        )
    lines += _images(results)
    versions = results.code_versions()
    if len(versions) > 1:
        lines.append(f"- **Cells of {len(versions)} versions of the code**: {', '.join(versions)}; the CSV says which.")
    elif versions:
        lines.append(f"- Code: {versions[0]}.")
    for id_, version in results.needs_of_other_code(needs).items():
        lines.append(f"- `{id_}` is of another version of the code: {version}.")
    lines += [f"- **{text}**." for text in results.several_makings()]
    if taken := sum("taken_from" in record for record in results.records.values()):
        were = "was" if taken == 1 else "were"
        lines.append(f"- {taken} of these trainings {were} run for another table or preset; the records say for which.")
    lines += [
        f"- Diverged: {row}, {column}, seed {seed}: {found['diverged']}."
        for (row, column, seed), found in results.diverged.items()
    ]
    missing = len(results.cells) - len(results.records) - len(results.diverged)
    if missing:
        lines.append(f"- {missing} of {len(results.cells)} cells have no result: not run yet, or failed.")
    return ["\n".join(lines)] if lines else []


def _images(results: Results) -> Iterable[str]:
    """Which images columns have, a line each."""
    by_images: dict[str, dict[str, None]] = {}
    for (_, column, _), record in results.records.items():
        if images := images_of(record["result"]):
            by_images.setdefault(images, {})[column] = None
    for images, columns in by_images.items():
        yield f"- {', '.join(columns)}: {images}."


def _meta_trainings(needs: Mapping[str, Mapping[str, Any]]) -> str:
    """Loss and time of each: what joint training saves over the lookahead, for one."""
    rows = []
    for id_, result in needs.items():
        if not {"source", "metrics", "seconds", "hardware"} <= result.keys():
            continue  # no meta-training, or a φ of which less is known
        config, m = result["config"], result["metrics"] or {}
        hardware = result["hardware"]
        rows.append(
            [
                result["need"],
                f"{result['source']['images']:,}",
                str(config["steps"]),
                f"{result['seconds'] / config['steps']:.2f}" if config["steps"] else "–",
                *(f"{m[key]:.3f}" if key in m else "–" for key in ("train_loss", "test_loss")),
                f"{hardware['device']}, {result['processes']} process{'es' * (result['processes'] > 1)}"
                f" ({hardware['cpu']}, {hardware['cores']} cores)",
                f"`{id_}`",
            ]
        )
    if not rows:
        return ""
    return markdown_table(["φ", "images", "steps", "s / step", "loss on D_tr", "loss on D_te", "hardware", "run"], rows)


def _marks(entries: Sequence[Entry]) -> dict[tuple[str, ...], str]:
    """A letter for each way of departing from the paper's setting."""
    ways = dict.fromkeys(entry.differences for entry in entries if entry.differences)
    return {way: _letter(i) for i, way in enumerate(ways)}


def _letter(i: int) -> str:
    return ("" if i < 26 else _letter(i // 26 - 1)) + chr(ord("a") + i % 26)


def _mark(entry: Entry, marks: Mapping[tuple[str, ...], str]) -> str:
    return f" ({marks[entry.differences]})" if entry.differences else ""


def _paper(value: str | None) -> str:
    return "–" if value is None else value.replace("±", " ± ")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; a `|` in a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
