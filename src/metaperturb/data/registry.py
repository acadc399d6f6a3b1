"""Loading data sets by name, and the images of one run as its settings name them."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import numpy as np

from metaperturb.config import MetaTestConfig, MetaTrainConfig
from metaperturb.data.arrays import ImageArrays, Plan, cached, from_memory, subset
from metaperturb.data.files import Place
from metaperturb.data.image_folder import folder_plan
from metaperturb.data.splits import few_classes, few_per_class, holdout_split
from metaperturb.data_sets import DATA_SETS, SOURCES
from metaperturb.errors import UserError

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
            (which has no usual place) and `cub`, one or several for `tiny_imagenet`; for the others the folder that
            holds what `data_root` would.
        image_size: height = width in pixels; the set's own default if `None`.
        download: fetch what is absent, where it can be fetched.
        skip_unreadable: leave broken images out and say how many, instead of raising.
        splits: which of the set's splits, in this order.

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
        if split not in spec.images:
            raise UserError(f"{name}: no split {split!r}; it has {', '.join(spec.images)}")
    size = spec.image_size if image_size is None else image_size
    if spec.how == "drawn":
        if paths:
            raise UserError(f"{name}: its images are drawn, so it takes no path (got {paths[0]})")
        from metaperturb.data.embedded import embedded

        parts = ["source"] if name == "embedded_source" else splits
        return tuple(from_memory(f"embedded-{part}", *embedded(part, size)) for part in parts)
    found = []
    with ExitStack() as stack:
        key, plan = _opened(name, paths, data_root, download, stack)
        # All splits are looked through before the images of the first are decoded, which may take minutes.
        plans = cache(lambda: {split: plan(split) for split in splits})
        for split in splits:
            stored = "val" if (name, split) == (IN_PARTS, "test") else split  # as caches and fingerprints have it
            make = lambda s=split: plans()[s]  # noqa: E731
            arrays = cached(data_root, name, stored, size, make, key(split), skip_unreadable)
            if name == IN_PARTS and len(arrays) != spec.images[split]:
                of = f"{spec.images[split]:,} images of {spec.num_classes} classes"
                print(f"{arrays.name}: {len(arrays):,} of the {of} of {spec.title}", file=sys.stderr)
            found.append(arrays)
    return tuple(found)


@contextlib.contextmanager
def open_plan(name: str, split: str, *, data_root: Path) -> Iterator[Plan]:
    """One split of an official set as it is published, in official order; it can be read while the context is open."""
    with ExitStack() as stack:
        yield _opened(name, (), Path(data_root).expanduser(), True, stack)[1](split)


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
    places = partial(official.places, paths[0] if paths else data_root, download)
    where = () if official.pixels else paths if paths and official.itself else places("train")
    opened = [Place(path, stack) for path in where]
    keys = {place.key for place in opened}

    def plan(split: str) -> Plan:
        made = official.pixel_plan(*places(split), split) if official.pixels else official.plan(opened, split)
        wanted, found = (spec.images[split], spec.num_classes), (len(made.pictures), len(made.classes))
        if found != wanted and name != IN_PARTS:
            raise UserError(
                f"{made.where}: expected {wanted[0]} {split} images of {wanted[1]} classes for {spec.title}, "
                f"found {found[0]} of {found[1]}; is the data complete?"
            )
        return made

    key = None if None in keys else " ".join(sorted(keys))
    return official.key if official.pixels else lambda split: key, plan


def load_parts(config: MetaTestConfig) -> tuple[ImageArrays, ImageArrays]:
    """What the network is trained on and what it is evaluated on; with `eval_split=holdout` no test image is read.

    Raises:
        UserError: as `load` and `holdout_split`, or a class has fewer images than `train_per_class`.
    """
    hold_out, count = config.eval_split == "holdout", config.train_per_class
    splits = ("train",) if hold_out else ("train", config.eval_split)
    train, *rest = _load(config, config.target, config.target_paths, config.image_size, splits)
    if hold_out:
        kept, held_out = holdout_split(train.labels, config.holdout, train.classes)
        train, rest = subset(train, kept, "rest"), [subset(train, held_out, "holdout")]
    if count is not None:  # of what is not held out: other images than without holdout
        found = np.bincount(train.labels)
        if found.min() < count:
            has = "has, without those held out," if hold_out else "has"
            short = f"class {train.classes[found.argmin()]} {has} {found.min()} training images"
            raise UserError(f"train_per_class {count}: {short}")
        train = subset(train, few_per_class(train.labels, count), f"{count}-a-class")
    return train, *rest


def load_source_images(config: MetaTrainConfig, image_size: int | None = None) -> ImageArrays:
    """What φ is meta-trained on, before its split into tasks; in the first of several sizes if none is asked for.

    Raises:
        UserError: as `load` and `few_classes`.
    """
    size = image_size or config.image_sizes[0]
    (source,) = _load(config, SOURCES[config.source], config.source_paths, size, ("train",))
    if config.classes is None:
        return source
    return subset(source, few_classes(source.labels, config.classes), f"{config.classes}-classes")


def _load(
    config: MetaTestConfig | MetaTrainConfig, name: str, paths: list[str], size: int | None, splits: tuple
) -> tuple[ImageArrays, ...]:
    how = {key: getattr(config, key) for key in ("data_root", "download", "skip_unreadable")}
    return load(name, paths=paths, image_size=size, splits=splits, **how)
