"""The user's own images: `train/<class>/*`, `test/<class>/*`, optionally `val/<class>/*`; folder, zip or tar.

The classes are the sub-folders of `train`, sorted by name; the other splits may lack some but add none. Files in deeper
folders belong to the class above them. The images are ordered by class, then by path as plain text. `val/` may also be
called `valid/` or `validation/`.
"""

import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise

from metaperturb.data.arrays import Plan, Sample, plan_from_samples
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
    """One split of an image folder, with or without folders that enclose it.

    Raises:
        UserError: no split folder, a class without images or unknown to `train`, groups in place of classes.
    """
    root = place.root(name for names in SPLITS.values() for name in names)
    if root is None:
        found = sorted({name.split("/")[0] for name in [*place.files, *place.folders]})
        top = f"at its top: {_some(found)}" if found else "it is empty"
        raise UserError(f"{place.path}: holds no train/<class>/ folders with images; {top}")
    classes = sorted({s.class_name for s in _samples(place, root, "train")[0]})
    samples, remarks = _samples(place, root, split)
    for name in sorted({s.class_name for s in samples} - set(classes)):
        alike = [c for c in classes if c.casefold() == name.casefold()]
        hint = f", which has {alike[0]}" if alike else ""
        raise UserError(f"{place.path}: class {name} is in {root}{split}/ but not in {root}train/{hint}")
    for first, second in pairwise(sorted(classes, key=lambda c: (c.casefold(), c))):
        if first.casefold() == second.casefold():
            remarks.append(f"{place.path}: two classes differ only in case: {first} and {second}; are they one?")
    return plan_from_samples(samples, classes, remarks)


def _samples(place: Place, root: str, split: str) -> tuple[list[Sample], list[str]]:
    """The images of a split, and what to say of the rest that lies there."""
    found = {split: name for split, names in SPLITS.items() for name in names[::-1] if root + name in place.folders}
    if split not in found:
        other = f"; eval_split=val evaluates on its {found['val']}/" if split == "test" and "val" in found else ""
        raise UserError(f"{place.path}: no folder {root}{split}/; expected train/<class>/ and test/<class>/{other}")
    prefix = f"{root}{found[split]}/"
    depth, samples, left_out = prefix.count("/"), [], defaultdict(list)
    for name in place.files:
        parts = name.split("/")
        if not name.startswith(prefix):
            continue
        if len(parts) == depth + 1:
            left_out["of no class"].append(name)
        elif name.lower().endswith(_DOCUMENTS):
            left_out["not an image"].append(name)
        else:
            samples.append(Sample(place, name, _normal(parts[depth])))
    listed = {_normal(name.split("/")[depth]) for name in place.folders if name.startswith(prefix)}
    for name in sorted(listed - {s.class_name for s in samples}):
        raise UserError(f"{place.path}: {prefix}{name}: class folder without images; remove it or fill it")
    if not samples:
        raise UserError(f"{place.path}: {prefix} holds no <class>/ folders with images")
    for why, names in place.left_out.items():
        left_out[why] += [name for name in names if name.startswith(prefix) or why == "named outside the archive"]
    counted = [f"{why}: {_some(names)}" for why, names in left_out.items() if names]
    remarks = [f"{place.path}: left out: {'; '.join(counted)}"] if counted else []
    if groups := _groups(place, samples, prefix):
        remarks.append(f"{place.path}: taken for one class each, though they hold only folders: {_some(groups)}")
    return sorted(samples, key=lambda s: (s.class_name, _normal(s.member))), remarks


def _some(names: list[str]) -> str:
    return printable(f"{len(names)} ({', '.join(names[:3])}{', …' * (len(names) > 3)})")


def _normal(name: str) -> str:
    """One spelling of a name: Macs write ä as a and two dots (NFD), others as one letter (NFC)."""
    return unicodedata.normalize("NFC", name)


def _groups(place: Place, samples: list[Sample], prefix: str) -> list[str]:
    """Class folders that may be groups of classes: no images of their own, but several folders.

    Raises:
        UserError: no class folder has images of its own, and one holds folders whose names occur in no other:
            `<group>/<class>/…` was taken for classes.
    """
    paths = [sample.member[len(prefix) :].split("/") for sample in samples]
    own = {path[0] for path in paths if len(path) == 2}
    inner = {(path[0], path[1]) for path in paths if len(path) > 2}
    count, folders = Counter(name for _, name in inner), Counter(group for group, _ in inner)
    shared = {group for group, name in inner if count[name] > 1}
    doubtful = sorted(group for group, number in folders.items() if number > 1 and group not in own)
    groups = [group for group in doubtful if group not in shared]
    if groups and not own:
        some = ", ".join(sorted(name for group, name in inner if group == groups[0])[:3])
        raise UserError(
            f"{place.path}: {prefix}{groups[0]}/ holds no images but folders of them ({some}, …): if they are classes, "
            f"move them up to {prefix}; if {groups[0]} is one class, move its images up to it"
        )
    return [f"{prefix}{name}/" for name in doubtful]
