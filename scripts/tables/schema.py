"""What the YAML file of a grid may hold: checked as a whole before anything is made of it.

A check takes a place (`configs/table1.yaml: rows: Base`) and what stands there. It returns that, or raises `UserError`.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from metaperturb.config import MetaTestConfig, MetaTrainConfig, read_yaml
from metaperturb.errors import UserError

Check = Callable[[str, Any], Any]
PROGRAMS = {"meta_train": MetaTrainConfig, "meta_test": MetaTestConfig}


def read_grid(path: Path) -> dict[str, Any]:
    """The content, with every part that a grid may leave out filled in.

    Raises:
        UserError: unreadable; a part that is missing, unknown, of another type, or names what is not there.
    """
    empty = {key: {} for key in ("set", "needs", "rows", "candidates", "paper")} | {"baselines": []}
    content = keys(GRID, required=GRID)(str(path), empty | read_yaml(path))
    columns = content["columns"]
    for row, numbers in content["paper"].items():
        if len(numbers) != len(columns):
            raise UserError(f"{path}: paper: {row}: has {len(numbers)} values for {len(columns)} columns")
    for preset in (content, *content["presets"].values()):
        chosen = preset.get("columns", {})
        for column in chosen.values() if isinstance(chosen, Mapping) else ():
            if "stands_for" in column:
                check_known(f"{path}: stands_for: column", [column["stands_for"]], columns)
    return content


def check_known(what: str, names: Iterable[Any], known: Iterable[Any]) -> None:
    """Refuse a name that is not among those that are known, and say which may be meant."""
    known = [*known]
    for name in names:
        if name not in known:
            texts = [str(one) for one in known]
            near = difflib.get_close_matches(str(name), texts, n=1)
            raise UserError(
                f"{what} {name!r} is unknown" + (f"; did you mean {near[0]!r}?" if near else f" ({', '.join(texts)})")
            )


# --- kinds of values


def a(kind: type, description: str) -> Check:
    def check(where: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise UserError(f"{where}: expected {description}, got {value!r:.60}")
        return value

    return check


text, truth, values = a(str, "text"), a(bool, "true or false"), a(list, "a list of values")


def settings(where: str, value: Any) -> dict[str, Any]:
    content = a(Mapping, "'name: value' lines")(where, {} if value is None else value)
    for name in content:
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: {name!r} is no text; put names like this in quotes")
    return dict(content)


def named(each: Check) -> Check:
    return lambda where, value: {name: each(f"{where}: {name}", v) for name, v in settings(where, value).items()}


def keys(parts: Mapping[str, Check], required: Collection[str] = ()) -> Check:
    def check(where: str, value: Any) -> dict[str, Any]:
        content = settings(where, value)
        check_known(f"{where}: key", content, parts)
        if lacking := [key for key in required if key not in content]:
            raise UserError(f"{where}: lacks {lacking[0]!r}")
        return {key: parts[key](f"{where}: {key}", value) for key, value in content.items()}

    return check


def texts(where: str, value: Any) -> list[str]:
    return [text(where, item) for item in a(list, "a list of names")(where, value)]


def chosen(each: Check) -> Check:
    """Names, or others in their place."""
    return lambda where, value: (named(each) if isinstance(value, Mapping) else texts)(where, value)


def seeds(where: str, value: Any) -> list[int]:
    if isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value):
        return list(dict.fromkeys(value))
    raise UserError(f"{where}: expected a list of whole numbers, got {value!r}")


def numbers(where: str, value: Any) -> list[str | None]:
    """What the paper reports: `66.78±0.59`, or null."""
    found = a(list, "a list")(where, value)
    for number in found:
        try:
            float(str(0 if number is None else number).partition("±")[0])
        except ValueError:
            raise UserError(f"{where}: expected numbers such as 66.78±0.59, got {number!r}") from None
    return [None if number is None else str(number) for number in found]


def program(where: str, value: Any) -> str:
    if value not in (*PROGRAMS,):
        raise UserError(f"{where}: expected one of {', '.join(PROGRAMS)}, got {value!r}")
    return value


def need(where: str, value: Any) -> dict[str, Any]:
    of_file = "file" in settings(where, value)
    return (keys(FILE, required=FILE) if of_file else keys(RUN, required=("program", "config")))(where, value)


def column(where: str, value: Any) -> dict[str, Any]:
    content = settings(where, value)
    return content | {key: check(f"{where}: {key}", content[key]) for key, check in COLUMN.items() if key in content}


# --- the parts of a file

FILE = dict.fromkeys(("file", "sha256", "hint"), text)
RUN = {"program": program, "config": text, "set": settings, "like": texts}
COLUMN = {"stands_for": text, "comparable": truth}  # beside its settings
PRESET = {
    **{"set": settings, "seeds": seeds, "needs": named(settings), "columns": chosen(column)},
    **{"rows": chosen(settings), "also": named(settings), "comparable": truth, "tuned": text},
}
GRID = {
    **{"title": text, "config": text, "set": settings, "seeds": seeds, "needs": named(need), "columns": named(column)},
    **{"rows": named(settings), "candidates": named(named(values)), "baselines": texts, "paper": named(numbers)},
    "presets": named(keys(PRESET)),
}
