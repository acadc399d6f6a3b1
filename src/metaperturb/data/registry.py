"""Which data sets there are, and loading them by name: the sources of φ, and the targets that networks are trained on
with it (section 4 of the paper)."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from metaperturb.data.arrays import ImageArrays, Plan, cached, from_memory
from metaperturb.data.files import Place
from metaperturb.data.image_folder import folder_plan
from metaperturb.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before it is loaded.

    Attributes:
        title: its name in tables.
        num_classes: how many; `None`: as many as are found.
        images: split → how many images it must have, or `None`.
        image_size: default height = width in pixels.
        how: it is had: `"downloaded"`, `"by hand"`, `"drawn"` when asked for, or `"named"` by a path.
    """

    title: str
    num_classes: int | None
    images: dict[str, int | None]
    image_size: int
    how: str = "downloaded"

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.images)


# Counts: appendix of the paper and the sets' own pages. DTD: partition 1, train and val together for training. "test"
# of Tiny ImageNet: its validation images.
DATA_SETS: dict[str, DataSet] = {
    "stl10": DataSet("STL10", 10, {"train": 5000, "test": 8000}, 96),
    "s_cifar100": DataSet("s-CIFAR100", 100, {"train": 5000, "val": 2500, "test": 10000}, 32),
    "cifar100": DataSet("CIFAR-100", 100, {"train": 50000, "test": 10000}, 32),
    "dogs": DataSet("Stanford Dogs", 120, {"train": 12000, "test": 8580}, 84),
    "cars": DataSet("Stanford Cars", 196, {"train": 8144, "test": 8041}, 84, "by hand"),
    "aircraft": DataSet("FGVC Aircraft", 100, {"train": 6667, "test": 3333}, 84),
    "cub": DataSet("CUB-200-2011", 200, {"train": 5994, "test": 5794}, 84),
    "small_svhn": DataSet("small SVHN", 10, {"train": 5000, "test": 26032}, 32),
    "fashion_mnist": DataSet("Fashion-MNIST", 10, {"train": 60000, "test": 10000}, 32),
    "dtd": DataSet("DTD", 47, {"train": 3760, "test": 1880}, 84),
    "folder": DataSet("image folder", None, {"train": None, "val": None, "test": None}, 32, "named"),
    "embedded": DataSet("embedded", 16, {"train": 400, "test": 1008}, 32, "drawn"),
    "tiny_imagenet": DataSet("Tiny ImageNet", 200, {"train": 100_000, "test": 10_000}, 32),
    "embedded_source": DataSet("embedded source", 40, {"train": 4800}, 32, "drawn"),
}
# What φ is meta-trained on, by the names that `source` has for it.
SOURCES = {"tiny_imagenet": "tiny_imagenet", "embedded": "embedded_source", "folder": "folder"}
# Parts of it are published beside the results: what is missing is said, not refused.
IN_PARTS = "tiny_imagenet"


def load(
    name: str,
    *,
    data_root: str | Path,
    paths: Sequence[str | Path] = (),
    image_size: int | None = None,
    download: bool = True,
    skip_unreadable: bool = False,
    splits: Sequence[str] = ("train", "test"),
) -> tuple[ImageArrays, ...]:
    """Load splits of a data set.

    Args:
        name: one of `DATA_SETS`.
        data_root: where data sets and the image cache are.
        paths: where this data set is, if not at its usual place under `data_root`: the folder or archive for `folder`
            (which has no usual place), `cub` and `dogs`, one or several for `tiny_imagenet`; for the others the folder
            that torchvision calls `root`.
        image_size: height = width in pixels; the set's own default if `None`.
        download: fetch what is absent, where it can be fetched.
        skip_unreadable: leave broken images out and say how many, instead of raising.
        splits: which of the set's splits, in this order; `"val"` is offered by `s_cifar100` (25 training images a
            class of CIFAR-100 that are not in its `train`, to choose among several φ) and by `folder`.

    Raises:
        UserError: an unknown name or split, anything wrong with the data, or other counts than the official ones.

    Example:
        >>> train, test = load("folder", data_root="data", paths=["cub50.zip"], image_size=84)  # doctest: +SKIP
        >>> train.images.shape  # doctest: +SKIP
        (1500, 3, 84, 84)
    """
    if name not in DATA_SETS:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(DATA_SETS)}")
    spec, data_root = DATA_SETS[name], Path(data_root).expanduser()
    for split in splits:
        if split not in spec.splits:
            raise UserError(f"{name}: no split {split!r}; it has {', '.join(spec.splits)}")
    size = spec.image_size if image_size is None else image_size
    if spec.how == "drawn":
        if paths:
            raise UserError(f"{name}: its images are drawn, so it takes no path (got {paths[0]})")
        return tuple(_drawn(name, size)[split] for split in splits)
    with ExitStack() as stack:
        key, plan = _opened(name, paths, data_root, download, stack)
        # All splits are looked through before the images of the first are decoded, which may take minutes.
        plans = cache(lambda: {split: plan(split) for split in splits})
        found = []
        for split in splits:
            stored = "val" if (name, split) == (IN_PARTS, "test") else split  # as caches and fingerprints have it
            make = lambda s=split: plans()[s]  # noqa: E731
            found.append(cached(data_root, name, stored, size, make, key(split), skip_unreadable))
    for split, arrays in zip(splits, found, strict=True):
        if name == IN_PARTS and len(arrays) != spec.images[split]:
            of = f"{spec.images[split]:,} images of {spec.num_classes} classes"
            print(f"{arrays.name}: {len(arrays):,} of the {of} of {spec.title}", file=sys.stderr)
    return tuple(found)


@contextlib.contextmanager
def open_plan(name: str, split: str, *, data_root: Path) -> Iterator[Plan]:
    """One split of an official set as it is published: encoded files or pixels at their own sizes, in official order.

    They can be read while the context is open.

    Raises:
        UserError: anything wrong with the data, or other counts than the official ones.
    """
    with ExitStack() as stack:
        yield _opened(name, (), Path(data_root).expanduser(), True, stack)[1](split)


def _drawn(name: str, image_size: int) -> dict[str, ImageArrays]:
    from metaperturb.data.embedded import embedded_source, embedded_target

    if name == "embedded_source":
        return {"train": from_memory("embedded-source", *embedded_source(image_size=image_size))}
    train, test = embedded_target(image_size=image_size)
    return {"train": from_memory("embedded-train", *train), "test": from_memory("embedded-test", *test)}


def _opened(
    name: str, paths: Sequence[str | Path], data_root: Path, download: bool, stack: ExitStack
) -> tuple[Callable[[str], str | None], Callable[[str], Plan]]:
    """Of each split: what tells its images from others without reading them (`None`: nothing), and its plan."""
    spec, paths = DATA_SETS[name], [Path(path).expanduser() for path in paths]
    if len(paths) != 1 and (spec.how == "named" or (paths and name != IN_PARTS)):
        named = f"got {len(paths)}" if paths else "target_path or source_paths names it"
        raise UserError(f"{name}: needs the path of one folder or archive with train/<class>/, test/<class>/ ({named})")
    if name == "folder":
        place = Place(paths[0], stack)
        return lambda split: place.key, lambda split: folder_plan(place, split)
    from metaperturb.data.official import OFFICIAL  # imports torchvision

    official = OFFICIAL[name]
    for path in paths:
        if not path.exists():  # nothing is downloaded to it: the name may be misspelt
            raise UserError(f"{name}: {path}: no such file or folder")
    root = paths[0] if paths else data_root / official.home
    if official.find is None:
        return official.key, lambda split: _complete(official.plan(root, download, split), name, split)
    places = [Place(path, stack) for path in (paths if paths and official.itself else official.find(root, download))]
    key = " ".join(sorted({place.key for place in places})) if all(place.key for place in places) else None
    return lambda split: key, lambda split: _complete(official.plan(places, split), name, split)


def _complete(plan: Plan, name: str, split: str) -> Plan:
    spec = DATA_SETS[name]
    wanted, found = (spec.images[split], spec.num_classes), (len(plan.labels), len(plan.classes))
    if found != wanted and name != IN_PARTS:
        raise UserError(
            f"{plan.where}: expected {wanted[0]} {split} images of {wanted[1]} classes for {spec.title}, "
            f"found {found[0]} of {found[1]}; is the data complete?"
        )
    return plan
