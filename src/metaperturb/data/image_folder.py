"""The user's own images: `train/<class>/*`, `test/<class>/*`, optionally `val/<class>/*`; folder or archive."""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from metaperturb.data.archives import Archive, open_archive, subfolder_root
from metaperturb.data.arrays import ImageArrays, Plan, Sample, cached, plan_from_samples
from metaperturb.errors import UserError

SPLITS = ("train", "val", "test")


def load_image_folder(
    path: str | Path,
    *,
    data_root: Path,
    image_size: int = 32,
    splits: Sequence[str] = ("train", "test"),
    skip_unreadable: bool = False,
) -> tuple[ImageArrays, ...]:
    """Load an image folder, or a zip or tar of one, with or without one enclosing folder.

    The classes are the sub-folders of `train`, sorted by name; the other splits may lack some but add none.
    Files in deeper folders belong to the class above them. The images are ordered by class, then by path as
    plain text.

    Args:
        path: the folder or archive.
        data_root: holds the cache.
        image_size: height = width in pixels.
        splits: which of `"train"`, `"val"`, `"test"` to load, in this order.
        skip_unreadable: leave broken images out instead of raising.

    Raises:
        UserError: no such path, no split folder, a class without images or unknown to `train`, a broken
            image.

    Example:
        >>> train, test = load_image_folder("cub50.zip", data_root="data", image_size=84)  # doctest: +SKIP
        >>> train.images.shape  # doctest: +SKIP
        (1500, 3, 84, 84)
    """
    with open_archive(path) as archive:
        key = archive.key()
        # All splits are looked through before the images of the first are decoded, which may take minutes.
        plans = cache(lambda: {split: _plan(archive, split) for split in splits})
        return tuple(
            cached(
                data_root,
                "folder",
                split,
                image_size,
                key,
                lambda s=split: plans()[s],
                skip_unreadable,
            )
            for split in splits
        )


def _plan(archive: Archive, split: str) -> Plan:
    root = subfolder_root(archive, SPLITS)
    if root is None:
        raise UserError(f"{archive.path}: holds no train/<class>/ folders with images")
    classes = sorted({s.class_name for s in _samples(archive, root, "train")})
    samples = _samples(archive, root, split)
    folder = f"{root}{split}/"
    if stray := sum(name.startswith(folder) and "/" not in name[len(folder) :] for name in archive.files):
        print(f"{archive.path}: {stray} files in {folder} itself are of no class, not used", file=sys.stderr)
    for name in sorted({s.class_name for s in samples} - set(classes)):
        raise UserError(f"{archive.path}: class {name} is in {root}{split}/ but not in {root}train/")
    return plan_from_samples(samples, classes)


def _samples(archive: Archive, root: str, split: str) -> list[Sample]:
    prefix = f"{root}{split}/"
    if not any(name.startswith(prefix) for name in [*archive.files, *archive.folders]):
        raise UserError(f"{archive.path}: no folder {prefix}; expected train/<class>/ and test/<class>/")
    depth = prefix.count("/")
    found = []
    for name in archive.files:
        parts = name.split("/")
        if name.startswith(prefix) and len(parts) > depth + 1:
            found.append(Sample(archive, name, parts[depth]))
    listed = {name.split("/")[depth] for name in archive.folders if name.startswith(prefix)}
    for name in sorted(listed - {s.class_name for s in found}):
        raise UserError(f"{archive.path}: {prefix}{name}: class folder without images; remove it or fill it")
    if not found:
        raise UserError(f"{archive.path}: {prefix} holds no <class>/ folders with images")
    return sorted(found, key=lambda s: (s.class_name, s.member))
