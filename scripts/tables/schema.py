"""What the YAML file of a grid may hold: checked as a whole before anything is made of it.

A kind is a type; `[kind]`: a list; `{...: kind}`: lines of any names; `Keys`: of these; a function of place and value.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metaperturb.config import MetaTestConfig, MetaTrainConfig, read_yaml
from metaperturb.errors import UserError

PROGRAMS = {"meta_train": MetaTrainConfig, "meta_test": MetaTestConfig}
EXPECTED = {str: "text", bool: "true or false", list: "a list of names", Mapping: "'name: value' lines"}


class Keys(NamedTuple):
    """Lines of these names; `others`: any, of a kind of their own."""

    kinds: Mapping[str, Any]
    required: Iterable[str] = ()
    others: Any = None


def read_grid(path: Path) -> dict[str, Any]:
    """The content, with every part that a grid may leave out filled in.

    Raises:
        UserError: unreadable; a part that is missing, unknown, of another type, or names what is not there.
    """
    empty = {key: {} for key in ("set", "needs", "rows", "candidates", "paper")} | {"baselines": []}
    content = checked(str(path), empty | read_yaml(path), GRID)
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


def checked(where: str, value: Any, kind: Any) -> Any:
    """The value at this place (`configs/table1.yaml: rows: Base`), which must be of this kind."""
    if isinstance(kind, list):
        return [checked(where, item, kind[0]) for item in checked(where, value, list)]
    if isinstance(kind, dict):
        kind = Keys({}, others=kind[...])
    if isinstance(kind, Keys):
        content = checked(where, {} if value is None else value, Mapping)
        if wrong := [name for name in content if not isinstance(name, str) or not name]:
            raise UserError(f"{where}: {wrong[0]!r} is no text; put names like this in quotes")
        if kind.others is None:
            check_known(f"{where}: key", content, kind.kinds)
        if lacking := [key for key in kind.required if key not in content]:
            raise UserError(f"{where}: lacks {lacking[0]!r}")
        return {key: checked(f"{where}: {key}", of, kind.kinds.get(key, kind.others)) for key, of in content.items()}
    if not isinstance(kind, type):
        return kind(where, value)
    if not isinstance(value, kind):
        raise UserError(f"{where}: expected {EXPECTED[kind]}, got {value!r:.60}")
    return value


def chosen(each: Any) -> Any:
    """Names, or others in their place."""
    return lambda where, value: checked(where, value, {...: each} if isinstance(value, Mapping) else [str])


def seeds(where: str, value: Any) -> list[int]:
    if isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value):
        return list(dict.fromkeys(value))
    raise UserError(f"{where}: expected a list of whole numbers, got {value!r}")


def number(where: str, value: Any) -> str | None:
    """What the paper reports: `66.78±0.59`, or null."""
    try:
        float(str(0 if value is None else value).partition("±")[0])
    except ValueError:
        raise UserError(f"{where}: expected numbers such as 66.78±0.59, got {value!r}") from None
    return None if value is None else str(value)


def need(where: str, value: Any) -> dict[str, Any]:
    file = dict.fromkeys(("file", "sha256", "hint"), str)
    run = {"program": str, "config": str, "set": SETTINGS, "like": [str]}
    of_file = isinstance(value, Mapping) and "file" in value
    content = checked(where, value, Keys(file, file) if of_file else Keys(run, ("program", "config")))
    check_known(f"{where}: program", [] if of_file else [content["program"]], PROGRAMS)
    return content


SETTINGS = {...: object}
COLUMN = {"stands_for": str, "comparable": bool}  # beside its settings
OF_COLUMN = Keys(COLUMN, others=object)
PRESET = {
    **{"set": SETTINGS, "seeds": seeds, "needs": {...: SETTINGS}, "columns": chosen(OF_COLUMN)},
    **{"rows": chosen(SETTINGS), "also": {...: SETTINGS}, "comparable": bool, "tuned": str},
}
PARTS = {
    **{"title": str, "config": str, "set": SETTINGS, "seeds": seeds, "needs": {...: need}, "columns": {...: OF_COLUMN}},
    **{"rows": {...: SETTINGS}, "candidates": {...: {...: [object]}}, "baselines": [str], "paper": {...: [number]}},
    "presets": {...: Keys(PRESET)},
}
GRID = Keys(PARTS, required=PARTS)
