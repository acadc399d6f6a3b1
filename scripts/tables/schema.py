"""What the YAML file of a grid may hold: checked as a whole before anything is made of it."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from metaperturb.config import MetaTestConfig, MetaTrainConfig, read_yaml
from metaperturb.errors import UserError

PROGRAMS = {"meta_train": MetaTrainConfig, "meta_test": MetaTestConfig}


def read_grid(path: Path) -> dict[str, Any]:
    """The content, with every part that a grid may leave out filled in.

    Raises:
        UserError: unreadable; a part that is missing, unknown, of another type, or names what is not there.
    """
    return _Checker(path).grid(read_yaml(path))


def unknown(what: str, name: Any, known: Iterable[Any]) -> UserError:
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), known, n=1)
    return UserError(
        f"{what} {name!r} is unknown" + (f"; did you mean {near[0]!r}?" if near else f" ({', '.join(known)})")
    )


class _Checker:
    """Each method takes what stands at a place of the file and returns it checked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def grid(self, content: Mapping[str, Any]) -> dict[str, Any]:
        parts = {
            "title": self.text,
            "config": self.text,
            "set": self.settings,
            "seeds": self.seeds,
            "needs": lambda where, value: self.named(where, value, self.need),
            "columns": lambda where, value: self.named(where, value, self.column),
            "rows": lambda where, value: self.named(where, value, self.settings),
            "candidates": lambda where, value: self.named(where, value, self.candidates),
            "baselines": self.texts,
            "paper": lambda where, value: self.named(where, value, self.numbers),
            "presets": lambda where, value: self.named(where, value, self.preset),
        }
        empty = {key: {} for key in ("set", "needs", "rows", "candidates", "paper")} | {"baselines": []}
        checked = self.keys("", empty | dict(content), parts, required=parts)
        columns = checked["columns"]
        for row, numbers in checked["paper"].items():
            if len(numbers) != len(columns):
                raise UserError(f"{self.path}: paper: {row}: has {len(numbers)} values for {len(columns)} columns")
        for preset in (checked, *checked["presets"].values()):
            chosen = preset.get("columns", {})
            for column in chosen.values() if isinstance(chosen, Mapping) else ():
                if column.get("stands_for", next(iter(columns))) not in columns:
                    raise unknown(f"{self.path}: stands_for: column", column["stands_for"], columns)
        return checked

    def preset(self, where: str, value: Any) -> dict[str, Any]:
        parts = {
            "set": self.settings,
            "seeds": self.seeds,
            "needs": lambda where, value: self.named(where, value, self.settings),
            "columns": lambda where, value: self.chosen(where, value, self.column),
            "rows": lambda where, value: self.chosen(where, value, self.settings),
            "also": lambda where, value: self.named(where, value, self.settings),
            "comparable": self.truth,
            "tuned": self.text,
        }
        return self.keys(where, self.settings(where, value), parts)

    def need(self, where: str, value: Any) -> dict[str, Any]:
        content = self.settings(where, value)
        if "file" in content:
            parts = dict.fromkeys(("file", "sha256", "hint"), self.text)
            return self.keys(where, content, parts, required=parts)
        parts = {"program": self.program, "config": self.text, "set": self.settings, "like": self.texts}
        return self.keys(where, content, parts, required=("program", "config"))

    def column(self, where: str, value: Any) -> dict[str, Any]:
        return self.settings(where, value) | self.keys(
            where,
            {key: v for key, v in self.settings(where, value).items() if key in ("stands_for", "comparable")},
            {"stands_for": self.text, "comparable": self.truth},
        )

    def candidates(self, where: str, value: Any) -> dict[str, list[Any]]:
        return self.named(where, value, lambda place, v: self.a(place, v, list, "a list of values"))

    def chosen(self, where: str, value: Any, each: Callable[[str, Any], Any]) -> Any:
        """Names, or others in their place."""
        return self.named(where, value, each) if isinstance(value, Mapping) else self.texts(where, value)

    def numbers(self, where: str, value: Any) -> list[str | None]:
        """What the paper reports: `66.78±0.59`, or null."""
        values = self.a(where, value, list, "a list")
        for number in values:
            try:
                float(str(0 if number is None else number).partition("±")[0])
            except ValueError:
                raise UserError(f"{self.path}: {where}: expected numbers such as 66.78±0.59, got {number!r}") from None
        return [None if number is None else str(number) for number in values]

    # --- kinds of values

    def keys(self, where: str, content: Mapping, parts: Mapping[str, Callable], required: Iterable[str] = ()) -> dict:
        place = f"{where}: " if where else ""
        for key in content:
            if key not in parts:
                raise unknown(f"{self.path}: {place}key", key, parts)
        for key in required:
            if key not in content:
                raise UserError(f"{self.path}: {place}lacks {key!r}")
        return {key: parts[key](f"{place}{key}", value) for key, value in content.items()}

    def named(self, where: str, value: Any, each: Callable[[str, Any], Any]) -> dict[str, Any]:
        return {name: each(f"{where}: {name}", v) for name, v in self.settings(where, value).items()}

    def settings(self, where: str, value: Any) -> dict[str, Any]:
        content = self.a(where, {} if value is None else value, Mapping, "'name: value' lines")
        for name in content:
            if not isinstance(name, str) or not name:
                raise UserError(f"{self.path}: {where}: {name!r} is no text; put names like this in quotes")
        return dict(content)

    def seeds(self, where: str, value: Any) -> list[int]:
        if isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value):
            return list(dict.fromkeys(value))
        raise UserError(f"{self.path}: {where}: expected a list of whole numbers, got {value!r}")

    def texts(self, where: str, value: Any) -> list[str]:
        return [self.text(where, item) for item in self.a(where, value, list, "a list of names")]

    def program(self, where: str, value: Any) -> str:
        if value not in (*PROGRAMS,):
            raise UserError(f"{self.path}: {where}: expected one of {', '.join(PROGRAMS)}, got {value!r}")
        return value

    def text(self, where: str, value: Any) -> str:
        return self.a(where, value, str, "text")

    def truth(self, where: str, value: Any) -> bool:
        return self.a(where, value, bool, "true or false")

    def a(self, where: str, value: Any, kind: type, description: str) -> Any:
        if not isinstance(value, kind):
            raise UserError(f"{self.path}: {where}: expected {description}, got {value!r:.60}")
        return value
