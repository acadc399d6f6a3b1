"""Decoded images as memory-mapped arrays, built once and shared by all processes.

A data set is described by a `Plan` (which images, which classes, how to read them). `cached` decodes the images to RGB,
resizes them to a square, and keeps them under `<data_root>/cache`, under a name that follows from their content.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from metaperturb.data.files import Place, printable
from metaperturb.errors import UserError
from metaperturb.provenance import available_cores
from metaperturb.storage import hold, reason, write_atomically

# Part of every cache key: raise it when what is written for the same input changes.
_CACHE_FORMAT = 4
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)  # of another user, or read-only
_SKIP_HINT = "repair or remove it, or set skip_unreadable=true to leave such files out"
_BACKGROUND = "white"  # behind transparent images: what they are drawn for, mostly
# EXIF orientation → what undoes it.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS.split(), 2)}


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """A labelled set of square RGB images.

    Attributes:
        images: uint8 `[N, 3, H, W]`, H = W; read-only, memory-mapped from the cache (embedded sets: in memory).
        labels: int64 `[N]`; label `i` means `classes[i]`.
        classes: the class names.
        fingerprint: hex digest of the content: set, split, image size, classes, and of each image in order the label
            and the CRC-32 of its file (and whether it was turned upright or laid over white). The same for the same
            files, be they in zips, a tar or a folder, and wherever the cache is.
        name: data set and split, `"cub-train"`; a part of it is `"cub-train-holdout"`.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str
    name: str

    def __post_init__(self) -> None:
        for name in ("images", "labels"):
            array = getattr(self, name).view()  # the caller may still write to his
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Height = width, in pixels."""
        return int(self.images.shape[-1])


@dataclass(frozen=True)
class Picture:
    """An image that is still to be decoded."""

    class_name: str
    name: str  # what error messages call it, "cub50.zip: cub50/train/001.Auklet/1.jpg"
    read: Callable[[], bytes | np.ndarray]  # an encoded file's bytes, or decoded pixels (uint8 [H, W, 3] or [H, W])


@dataclass
class Plan:
    """What a cache is built from."""

    where: str  # what error messages call the whole, such as the archive's path
    classes: Sequence[str]  # in the order of the labels
    pictures: Sequence[Picture]
    remarks: list[str] = field(default_factory=list)  # lines to say whenever these images are used


def file_picture(place: Place, member: str, class_name: str) -> Picture:
    """One of the files of a place; `UserError`: an official list names it, but it is not there."""
    if member not in place.files:
        raise UserError(f"{place.path}: {member} is listed but missing; delete this and fetch it again")
    return Picture(class_name, printable(f"{place.path}: {member}"), place.files[member].read_bytes)


def to_pixels(content: bytes | np.ndarray, image_size: int) -> tuple[np.ndarray, bool]:
    """Decode to RGB and squash to a square, as the paper does: PIL's bilinear filter, which antialiases.

    An image with an EXIF orientation is turned upright first, a transparent one laid over white.

    Returns:
        uint8 `[3, image_size, image_size]`, and whether it was turned, mirrored or laid over white.

    Raises:
        ValueError: more than 8 bits a channel: a conversion would clip instead of scale; or PostScript, a program
            that PIL would have Ghostscript run.
        Exception: whatever PIL raises on a broken image.
    """
    image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else Image.fromarray(content)
    with image:
        if image.format == "EPS":
            raise ValueError("PostScript is a program, which is not run; convert it to an image")
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixel mode {image.mode}: more than 8 bits a channel, convert to 8")
        image.load()  # PIL turns TIFFs upright here
        turn = None
        with contextlib.suppress(Exception):  # damaged EXIF data: the image is as good as one without
            turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        mended = turn is not None
        rgb = image.convert("RGBA") if image.has_transparency_data else image
        if rgb.mode == "RGBA" and rgb.getchannel("A").getextrema()[0] < 255:
            rgb, mended = Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), rgb), True
        rgb = rgb.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    if rgb.size != (image_size, image_size):
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1), mended


def cached(
    data_root: Path,
    name: str,
    split: str,
    image_size: int,
    make_plan: Callable[[], Plan],
    key: str | None = None,
    skip_unreadable: bool = False,
) -> ImageArrays:
    """The arrays of one split, from the cache if it is there, else built and cached.

    Several processes may ask at once: one builds, the others wait and share its files. A build that is killed leaves
    nothing that could be taken for a cache. A cache that another user keeps to himself, or that cannot be written, is
    done without: the images are decoded into memory, which is said aloud. `key` tells these images from all others,
    and then `make_plan` is called only to build; without one it is found from the images' own checksums.
    """
    if not isinstance(image_size, int) or not 1 <= image_size <= 4096:
        raise UserError(f"image_size {image_size!r}: must be a whole number of pixels from 1 to 4096")
    if key is None:
        plan = make_plan()
        make_plan, key = lambda: plan, _key_of(plan)
    key = _digest([json.dumps([_CACHE_FORMAT, name, split, image_size, key, skip_unreadable])])
    cache = _Cache(Path(data_root).expanduser(), name, split, image_size, key, skip_unreadable)
    try:
        arrays, remarks = cache.open() or cache.build(make_plan)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            cannot = f"cannot write the image cache ({reason(error)})"
            raise UserError(f"{cache.folder}: {cannot}; free some space or set another data root") from error
        arrays, remarks = cache.decode(make_plan(), partial(np.empty, dtype=np.uint8))
        cannot = f"cannot be used ({reason(error)}), so the images are decoded for this run alone"
        remarks = [f"{cache.folder.parent}: {cannot}; a data root of your own keeps them", *remarks]
    for line in remarks:
        print(line, file=sys.stderr)
    return arrays


def _key_of(plan: Plan) -> str:
    """From the CRC-32 of each image, which tells it from others; decoding takes longer."""

    def read_through(picture: Picture) -> str:
        return f"{picture.class_name}:{zlib.crc32(_content(picture)):08x}"

    return _digest([*plan.classes, *_in_threads(read_through, plan.pictures), *plan.remarks])


def _content(picture: Picture) -> bytes | np.ndarray:
    try:
        return picture.read()
    except OSError as error:  # of the system, not of the image
        raise UserError(f"{picture.name}: cannot be read ({reason(error)})") from error


def _in_threads(work: Callable[[Picture], Any], pictures: Sequence[Picture]) -> Iterator[Any]:
    """`work` on each, in order; a thread takes 16 at a time, and at most 1,024 results wait."""
    parts = [pictures[i : i + 16] for i in range(0, len(pictures), 16)]
    with ThreadPoolExecutor(min(8, available_cores())) as pool:
        for start in range(0, len(parts), 64):
            for done in pool.map(lambda part: [*map(work, part)], parts[start : start + 64]):
                yield from done


def _digest(rows: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()


_Found = tuple[ImageArrays, list[str]]  # and what to say of them


class _Cache:
    """Where the arrays of one split are kept: pixel after pixel in one file; the other one is there when all is."""

    def __init__(
        self, data_root: Path, name: str, split: str, image_size: int, key: str, skip_unreadable: bool
    ) -> None:
        self.name, self.key, self.skip_unreadable = f"{name}-{split}", key, skip_unreadable
        self.head, self.shape = [name, split, str(image_size)], (3, image_size, image_size)
        self.folder = data_root / "cache" / f"{self.name}-{image_size}-{key[:12]}"
        self.images, self.meta = self.folder / "images.bin", self.folder / "meta.json"

    def open(self) -> _Found | None:
        """What a finished cache holds; `None` if there is none, or a damaged one (said on stderr)."""
        try:
            meta = json.loads(self.meta.read_text())
            labels = np.array(meta["labels"], dtype=np.int64)
            images = np.memmap(self.images, np.uint8, "r", shape=(len(labels), *self.shape))
            if meta["key"] != self.key or _crc(images, labels) != meta["crc"]:
                raise ValueError("its bytes do not match their checksum")
            arrays = ImageArrays(images, labels, tuple(meta["classes"]), meta["fingerprint"], self.name)
            return arrays, [*meta["remarks"]]
        except FileNotFoundError:
            return None
        except PermissionError:  # another user's
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{self.folder}: damaged cache ({error}), built again", file=sys.stderr)
            return None

    def build(self, make_plan: Callable[[], Plan]) -> _Found:
        """Decodes the images into a new cache, unless another process has meanwhile."""
        lock = self.folder.with_name(f".{self.folder.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(lock if lock.exists() else lock.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with hold(lock, wait=True):
            if found := self.open():
                return found
            plan = make_plan()
            try:
                arrays, remarks = self.decode(plan, self._allocate)
                meta = {"key": self.key, "labels": arrays.labels.tolist(), "classes": arrays.classes}
                meta |= {"fingerprint": arrays.fingerprint, "crc": _crc(arrays.images, arrays.labels)}
                content = json.dumps({**meta, "remarks": remarks})
                write_atomically(self.meta, lambda file: file.write(content.encode()))
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
            return arrays, remarks

    def _allocate(self, shape: tuple[int, ...]) -> np.memmap:
        self.folder.mkdir(exist_ok=True)
        self.images.unlink(missing_ok=True)  # it is damaged; those who still have it mapped keep their view of it
        with self.images.open("wb") as file:
            # A memory map on a full disk ends in SIGBUS: claim the space now, where it is an ordinary error.
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        return np.memmap(self.images, np.uint8, "r+", shape=shape)

    def decode(self, plan: Plan, allocate: Callable[[tuple[int, ...]], np.ndarray]) -> _Found:
        """A plan's images as arrays, for which `allocate` makes room."""
        index = {name: label for label, name in enumerate(plan.classes)}

        def decode(picture: Picture) -> tuple[np.ndarray, str] | str:
            """The pixels, and what the fingerprint has of the image; or what is wrong with it."""
            try:
                content = _content(picture)
                pixels, mended = to_pixels(content, self.shape[-1])
                return pixels, f"{index[picture.class_name]}:{zlib.crc32(content):08x}{':mended' * mended}"
            except (UserError, MemoryError):
                raise
            except Exception as error:  # PIL raises nearly anything on broken images
                why = reason(error)
            if "cannot identify image file" in why:  # PIL appends the address of an in-memory buffer
                why = "not an image in a format that PIL knows"
            return f"{picture.name}: unreadable image ({why})"

        images, labels, rows, left_out = allocate((len(plan.pictures), *self.shape)), [], [], []
        # Closed at once when an image stops it: the threads of a generator that waits for collection may block others.
        with contextlib.closing(_in_threads(decode, plan.pictures)) as results:
            done = progress(results, f"{self.name}: decode to {self.shape[-1]} px", len(plan.pictures))
            for picture, found in zip(plan.pictures, done, strict=True):
                if not isinstance(found, str):
                    images[len(labels)], row = found
                    labels.append(index[picture.class_name])
                    rows.append(row)
                elif self.skip_unreadable:
                    left_out.append(found)
                else:
                    raise UserError(f"{found}; {_SKIP_HINT}")
        for name in sorted({picture.class_name for picture in plan.pictures} - {plan.classes[i] for i in labels}):
            raise UserError(f"{plan.where}: class {name} has no readable image; {_SKIP_HINT}")
        remarks = [f"{self.name}: {len(left_out)} unreadable files left out (first: {left_out[0]})"] if left_out else []
        fingerprint = _digest([*self.head, *plan.classes, *rows])
        labels = np.array(labels, dtype=np.int64)
        arrays = ImageArrays(images[: len(labels)], labels, tuple(plan.classes), fingerprint, self.name)
        return arrays, [*remarks, *plan.remarks]


def progress(results: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    """The same, with a bar of progress; in a log file it is written every 30 s."""
    return tqdm(results, what, count, unit=" images", mininterval=0.1 if sys.stderr.isatty() else 30)


def _crc(images: np.ndarray, labels: np.ndarray) -> int:
    """Gigabytes a second, and training reads all of it anyway."""
    return zlib.crc32(labels, zlib.crc32(images))


def subset(arrays: ImageArrays, indices: np.ndarray, part: str) -> ImageArrays:
    """The images at `indices` `[n]`, copied into memory, with a fingerprint and a name of their own."""
    indices = np.asarray(indices, dtype=np.int64)
    digest = hashlib.sha256(f"{arrays.fingerprint} {part}\n".encode() + indices.astype("<i8").tobytes())
    chosen = arrays.images[indices], arrays.labels[indices]
    return ImageArrays(*chosen, arrays.classes, digest.hexdigest(), f"{arrays.name}-{part}")


def from_memory(name: str, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> ImageArrays:
    """Wrap decoded images (uint8 `[N, 3, H, W]`) and labels (`[N]`) that need no cache."""
    images, labels = np.ascontiguousarray(images), np.asarray(labels, dtype=np.int64)
    digest = hashlib.sha256("\n".join([name, str(images.shape), *classes]).encode())
    digest.update(images)
    digest.update(labels)
    return ImageArrays(images, labels, tuple(classes), digest.hexdigest(), name)
