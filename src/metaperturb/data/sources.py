"""Source data sets: what φ is meta-trained on."""

from collections.abc import Sequence
from pathlib import Path

from metaperturb.data.arrays import ImageArrays, from_memory
from metaperturb.data.image_folder import load_image_folder
from metaperturb.data.tiny_imagenet import load_tiny_imagenet
from metaperturb.errors import UserError

SOURCES = ("tiny_imagenet", "embedded", "folder")


def load_source(
    name: str,
    *,
    data_root: Path,
    paths: Sequence[str | Path] = (),
    image_size: int = 32,
    download: bool = True,
    skip_unreadable: bool = False,
) -> ImageArrays:
    """Load the training images of a source data set.

    Args:
        name: one of `SOURCES`: `"tiny_imagenet"` (the paper's), `"embedded"` (drawn, no files needed),
            or `"folder"` (the `train` part of an image folder).
        data_root: where data sets and the image cache are.
        paths: where the data is, if not at its usual place under `data_root`: one or several archives or
            folders for `tiny_imagenet`, one for `folder`.
        image_size: height = width in pixels.
        download: fetch what is absent.
        skip_unreadable: leave broken images out and say how many, instead of raising.

    Raises:
        UserError: an unknown name, or anything wrong with the data.

    Example:
        >>> source = load_source("embedded", data_root=Path("data"))  # doctest: +SKIP
        >>> source.images.shape[1:]  # doctest: +SKIP
        (3, 32, 32)
    """
    if name not in SOURCES:
        raise UserError(f"unknown source {name!r}; known: {', '.join(SOURCES)}")
    if isinstance(paths, (str, Path)):
        paths = [paths]
    data_root = Path(data_root).expanduser()
    if name == "embedded":
        if paths:
            raise UserError(f"source embedded: its images are drawn, so it takes no path (got {paths[0]})")
        from metaperturb.data.embedded import embedded_source

        return from_memory("embedded-source", *embedded_source(image_size=image_size))
    if name == "folder":
        if len(paths) != 1:
            raise UserError(f"source folder: needs the path of one image folder or archive, got {len(paths)}")
        return load_image_folder(
            paths[0],
            data_root=data_root,
            image_size=image_size,
            splits=("train",),
            skip_unreadable=skip_unreadable,
        )[0]
    return load_tiny_imagenet(
        data_root=data_root,
        paths=paths,
        image_size=image_size,
        fetch=download,
        skip_unreadable=skip_unreadable,
    )
