"""The user's own images: `train/<class>/*`, `test/<class>/*`, optionally `val/<class>/*`; folder, zip or tar.

The classes are the sub-folders of `train`, sorted by name; the other splits may lack some but add none. Files in deeper
folders belong to the class above them. The images are ordered by class, then by path as plain text. `val/` may also be
called `valid/` or `validation/`.
"""

import unicodedata
from collections import Counter
from itertools import pairwise

from metaperturb.data.arrays import Plan, file_picture
from metaperturb.data.files import Place, printable
from metaperturb.errors import UserError

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
# What lies beside images and is none; any other file that is no image is an error, or left out by `skip_unreadable`.
_DOCUMENTS = (
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".rst", ".html", ".yaml", ".yml", ".toml", ".ini"),
    *(".pdf", ".doc", ".docx", ".xls", ".xlsx", ".log", ".db", ".cache", ".py", ".ipynb", ".sh", ".m", ".mat"),
    *(".npy", ".npz", ".pkl", ".pt", ".h5", ".parquet", ".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"),
    *("/readme", "/license", "/licence", "/copying"),
)


def folder_plan(place: Place, split: str) -> Plan:
    """One split of an image folder, with or without folders that enclose it."""
    root = place.root(name for names in SPLITS.values() for name in names)
    if root is None:
        found = sorted({name.split("/")[0] for name in [*place.files, *place.folders]})
        top = f"at its top: {_some(found)}" if found else "it is empty"
        raise UserError(f"{place.path}: holds no train/<class>/ folders with images; {top}")
    classes = sorted({picture.class_name for picture in _split(place, root, "train").pictures})
    plan = _split(place, root, split)
    for name in sorted({picture.class_name for picture in plan.pictures}.difference(classes)):
        alike = [c for c in classes if c.casefold() == name.casefold()]
        hint = f", which has {alike[0]}" if alike else ""
        raise UserError(f"{place.path}: class {name} is in {root}{split}/ but not in {root}train/{hint}")
    plan.classes = classes
    for first, second in pairwise(sorted(classes, key=lambda c: (c.casefold(), c))):
        if first.casefold() == second.casefold():
            plan.remarks.append(f"{place.path}: two classes differ only in case: {first} and {second}; are they one?")
    return plan


def _split(place: Place, root: str, split: str) -> Plan:
    """The images of a split, and what to say of the rest that lies there."""
    found = {split: name for split, names in SPLITS.items() for name in names[::-1] if root + name in place.folders}
    if split not in found:
        other = f"; eval_split=val evaluates on its {found['val']}/" if split == "test" and "val" in found else ""
        raise UserError(f"{place.path}: no folder {root}{split}/; expected train/<class>/ and test/<class>/{other}")
    prefix = f"{root}{found[split]}/"
    inside = [name.removeprefix(prefix) for name in place.files if name.startswith(prefix)]
    strays = [name for name in inside if "/" not in name]
    notes = [name for name in inside if "/" in name and f"/{name}".lower().endswith(_DOCUMENTS)]
    images = sorted({*inside}.difference(strays, notes), key=lambda name: (_class(name), _normal(name)))
    listed = {_class(name.removeprefix(prefix)) for name in place.folders if name.startswith(prefix)}
    for name in sorted(listed.difference(map(_class, images))):
        raise UserError(f"{place.path}: {prefix}{name}: class folder without images; remove it or fill it")
    if not images:
        raise UserError(f"{place.path}: {prefix} holds no <class>/ folders with images")
    _refuse_groups(f"{place.path}: ", prefix, [name.split("/") for name in images])
    left_out = {"of no class": strays, "not an image": notes}
    counted = [f"{why}: {_some([prefix + name for name in names])}" for why, names in left_out.items() if names]
    remarks = [f"{place.path}: left out: {'; '.join(counted)}"] if counted else []
    pictures = [file_picture(place, prefix + name, _class(name)) for name in images]
    return Plan(str(place.path), [], pictures, remarks)


def _some(names: list[str]) -> str:
    return printable(f"{len(names)} ({', '.join(names[:3])}{', …' * (len(names) > 3)})")


def _normal(name: str) -> str:
    """One spelling of a name: Macs write ä as a and two dots (NFD), others as one letter (NFC)."""
    return unicodedata.normalize("NFC", name)


def _class(name: str) -> str:
    return _normal(name.split("/")[0])


def _refuse_groups(where: str, prefix: str, paths: list[list[str]]) -> None:
    """Refuse `<group>/<class>/…`: no class has images of its own, and one holds several folders of names of its own."""
    inner = {(path[0], path[1]) for path in paths}
    count = Counter(name for _, name in inner)
    for group in sorted({path[0] for path in paths} if all(len(path) > 2 for path in paths) else ()):
        names = sorted(name for of, name in inner if of == group)
        if len(names) > 1 and all(count[name] == 1 for name in names):
            holds = f"{prefix}{group}/ holds no images but folders of them ({', '.join(names[:3])}, …)"
            move = f"if they are classes, move them up to {prefix}; if {group} is one class, move its images up to it"
            raise UserError(f"{where}{holds}: {move}")
