"""Decoded images as memory-mapped arrays, built once and shared by all processes.

A data set is described by a `Plan` (which images, which labels, how to read them). `cached` decodes the images to RGB,
resizes them to a square, and keeps them under `<data_root>/cache` as plain `.npy` files, under a name that follows
from their content.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image

from metaperturb.data.disk import NOT_OURS, disk_errors, file_lock, progress
from metaperturb.data.files import Place, is_passing, printable, read_file
from metaperturb.errors import UserError
from metaperturb.provenance import available_cores
from metaperturb.storage import reason

# Part of every cache key: raise it when what is written for the same input changes.
_CACHE_FORMAT = 3
_SKIP_HINT = "repair or remove it, or set skip_unreadable=true to leave such files out"
_BACKGROUND = "white"  # behind transparent images: what they are drawn for, mostly
# EXIF orientation → what undoes it.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS.split(), 2)}

S, T = TypeVar("S"), TypeVar("T")
Allocate = Callable[[tuple[int, ...]], np.ndarray]  # uint8, of a shape


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """A labelled set of square RGB images.

    Attributes:
        images: uint8 `[N, 3, H, W]`, H = W; read-only, memory-mapped from the cache (embedded sets: in memory).
        labels: int64 `[N]`, each in `0 … num_classes - 1`.
        classes: the class names; label `i` means `classes[i]`.
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
        for field in ("images", "labels"):
            array = getattr(self, field).view()  # the caller may still write to his
            array.flags.writeable = False
            object.__setattr__(self, field, array)

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
class _Found:
    """What a cache holds: the arrays, of each image left out why, and what to say."""

    arrays: ImageArrays
    left_out: list[str]
    remarks: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """An image that is still to be decoded.

    Attributes:
        label: class index.
        name: what error messages call it, `"cub50.zip: cub50/train/001.Auklet/1.jpg"`.
        read: gives an encoded file's bytes, or decoded pixels (uint8 `[H, W, 3]` or `[H, W]`).
        crc: CRC-32 of its content in hex, where that has been read through; of what is damaged, why.
    """

    label: int
    name: str
    read: Callable[[], bytes | np.ndarray]
    crc: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a cache is built from.

    Attributes:
        where: what error messages call the whole, such as the archive's path.
        classes: class names.
        pictures: the images, in order.
        remarks: lines to say whenever these images are used.
    """

    where: str
    classes: Sequence[str]
    pictures: Sequence[Picture]
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Sample:
    """One image file: the place that holds it, its name there, its class name."""

    place: Place
    member: str
    class_name: str

    def read(self) -> bytes:
        return read_file(self.place.files[self.member])


def plan_from_samples(samples: Sequence[Sample], classes: Sequence[str], remarks: Sequence[str] = ()) -> Plan:
    """A plan for image files, in the order given; `classes` orders the labels."""
    index = {name: i for i, name in enumerate(classes)}
    pictures = [Picture(index[s.class_name], printable(f"{s.place.path}: {s.member}"), s.read) for s in samples]
    return Plan(", ".join(dict.fromkeys(str(s.place.path) for s in samples)), classes, pictures, remarks)


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
    done without: the images are decoded into memory, which is said aloud.

    Args:
        data_root: holds `cache/<name>-<split>-<image_size>-<key>/{images.npy,labels.npy,meta.json}`.
        name: data set.
        split: `"train"`, `"val"` or `"test"`.
        image_size: height = width in pixels.
        make_plan: describes the images; with a `key`, called only to build.
        key: tells these images from all others, an official checksum; `None`: found from the images' own.
        skip_unreadable: leave out files that are no readable images and say how many, instead of raising.

    Raises:
        UserError: an unreadable image, a full disk, and what `make_plan` raises.
    """
    if not isinstance(image_size, int) or not 1 <= image_size <= 4096:
        raise UserError(f"image_size {image_size!r}: must be a whole number of pixels from 1 to 4096")
    plan, lines = None, []
    if key is None:
        plan = _read_through(make_plan(), skip_unreadable)
        key = _digest([*plan.classes, *(f"{picture.label}:{picture.crc}" for picture in plan.pictures)])
        make_plan = lambda: plan  # noqa: E731
    key = _digest([json.dumps([_CACHE_FORMAT, name, split, image_size, key])])
    folder = Path(data_root).expanduser() / "cache" / f"{name}-{split}-{image_size}-{key[:12]}"
    decode = partial(_decoded, f"{name}-{split}", [name, split], image_size, skip_unreadable)
    try:
        found = _open(folder, key) or _built(folder, key, make_plan, decode)
    except OSError as error:
        found = decode(make_plan(), partial(np.empty, dtype=np.uint8))
        kept = f"{folder.parent}: cannot be used ({reason(error)}), so the images are decoded for this run alone"
        lines.append(f"{kept}; a data root of your own keeps them")
    if found.left_out:
        if not skip_unreadable:
            raise UserError(f"{found.left_out[0]}; {_SKIP_HINT}")
        lines.append(f"{name}-{split}: {len(found.left_out)} unreadable files left out (first: {found.left_out[0]})")
    for line in [*lines, *(found if plan is None else plan).remarks]:
        print(line, file=sys.stderr)
    return found.arrays


def _read_through(plan: Plan, skip_unreadable: bool) -> Plan:
    """The images that can be read now, with the CRC-32 of each: it tells them from others, and decoding takes longer.

    Raises:
        UserError: one cannot be read and is not to be skipped, or is the last of a class.
    """

    def read_through(picture: Picture) -> Picture | OSError:
        try:
            return replace(picture, crc=f"{zlib.crc32(picture.read()):08x}")
        except ValueError as error:  # a property of the image, of which decoding will tell
            return replace(picture, crc=str(error))
        except OSError as error:
            return error

    found = [*zip(plan.pictures, _in_threads(read_through, plan.pictures), strict=True)]
    readable = [after for _, after in found if isinstance(after, Picture)]
    failed = [(before, error) for before, error in found if isinstance(error, OSError)]
    if not failed:
        return replace(plan, pictures=readable)
    why = f"{failed[0][0].name}: cannot be read ({reason(failed[0][1])})"
    if not skip_unreadable:
        raise UserError(f"{why}; {_SKIP_HINT}")
    for label in sorted({picture.label for picture, _ in failed} - {picture.label for picture in readable}):
        raise UserError(f"{plan.where}: class {plan.classes[label]} has no readable image ({why})")
    remark = f"{len(failed)} files that cannot be read now left out (first: {why})"
    return replace(plan, pictures=readable, remarks=[*plan.remarks, remark])


def _in_threads(work: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """`work` on each, in order; a thread takes 16 at a time, and at most 1,024 results wait."""
    with ThreadPoolExecutor(min(8, available_cores())) as pool:
        try:
            for start in range(0, len(items), 1024):
                parts = [items[i : i + 16] for i in range(start, min(start + 1024, len(items)), 16)]
                for done in pool.map(lambda part: [*map(work, part)], parts):
                    yield from done
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _digest(rows: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()


def _open(folder: Path, key: str) -> _Found | None:
    """What a finished cache holds; `None` if there is none, or a damaged one (said on stderr).

    Raises:
        PermissionError: it is another user's.
    """
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        count, size = meta["count"], meta["image_size"]
        if (images.dtype, images.shape) != (np.uint8, (count, 3, size, size)) or meta["key"] != key:
            raise ValueError("images.npy and meta.json belong to other data")
        if (labels.dtype, labels.shape) != (np.int64, (count,)) or _crc(images, labels) != meta["crc"]:
            raise ValueError("its bytes do not match their checksum")
        arrays = ImageArrays(images, labels, tuple(meta["classes"]), meta["fingerprint"], meta["name"])
        return _Found(arrays, list(meta["left_out"]), list(meta["remarks"]))
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        print(f"{folder}: damaged cache ({error}), built again", file=sys.stderr)
        return None


def _built(folder: Path, key: str, make_plan: Callable[[], Plan], decode: Callable[[Plan, Allocate], _Found]) -> _Found:
    """Builds the cache, unless another process has, in a folder that takes its name when all is there."""
    with file_lock(folder.with_name(f".{folder.name}.lock")) as locked:
        if locked:
            if found := _open(folder, key):  # another process built it while this one waited
                return found
            # Only the holder of the lock builds, so whatever temporary folder there is belongs to a killed one.
            for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
        plan = make_plan()
        temporary = folder.with_name(f".{folder.name}.tmp-{secrets.token_hex(4)}")
        try:
            with disk_errors(folder, "write the image cache", but=NOT_OURS):
                temporary.mkdir(parents=True)
                made = decode(plan, partial(_create, temporary / "images.npy"))
                arrays = made.arrays
                if made.left_out:  # the file has room for these, too
                    np.save(temporary / "kept.npy", arrays.images)
                    (temporary / "kept.npy").rename(temporary / "images.npy")
                np.save(temporary / "labels.npy", arrays.labels)
                meta = {field: getattr(arrays, field) for field in ("name", "image_size", "classes", "fingerprint")}
                meta |= {"key": key, "count": len(arrays), "left_out": made.left_out, "remarks": list(made.remarks)}
                meta["crc"] = _crc(arrays.images, arrays.labels)
                (temporary / "meta.json").write_text(json.dumps(meta))
                if folder.exists() and (locked or _open(folder, key) is None):
                    shutil.rmtree(folder)  # it is damaged; those who still have it mapped keep their view of it
                with contextlib.suppress(OSError) if folder.exists() else contextlib.nullcontext():
                    temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if (found := _open(folder, key)) is None:
            raise UserError(f"{folder}: was removed while it was built; start again")
        return found


def _crc(images: np.ndarray, labels: np.ndarray) -> int:
    """Gigabytes a second, and training reads all of it anyway."""
    return zlib.crc32(labels, zlib.crc32(images))


def _create(path: Path, shape: tuple[int, ...]) -> np.memmap:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    # A memory map on a full disk ends in SIGBUS: claim the space now, where it is an ordinary error.
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _decoded(
    name: str, head: list[str], image_size: int, skip_unreadable: bool, plan: Plan, allocate: Allocate
) -> _Found:
    """A plan's images as arrays.

    Args:
        name: of the arrays.
        head: what the fingerprint begins with.
        image_size, skip_unreadable: see `cached`.
        plan: the images.
        allocate: makes the array of images.
    """

    def decode(picture: Picture) -> tuple[np.ndarray, str] | Exception:
        """The pixels, and what the fingerprint has of the image."""
        try:
            content = picture.read()
            crc = f"{zlib.crc32(content):08x}"
            if picture.crc not in (None, crc):
                raise OSError(errno.ESTALE, "it changed a moment ago")
            pixels, mended = to_pixels(content, image_size)
            return pixels, f"{picture.label}:{crc}{':mended' * mended}"
        except MemoryError:
            raise
        except Exception as error:  # PIL raises nearly anything on broken images
            return error

    count, kept, rows, left_out = len(plan.pictures), [], [], []
    images = allocate((count, 3, image_size, image_size))
    with (
        progress(f"{name}: decode to {image_size} px", count, "images") as one_more,
        contextlib.closing(_in_threads(decode, plan.pictures)) as results,
    ):
        for picture, found in zip(plan.pictures, results, strict=True):
            one_more()
            if not isinstance(found, Exception):
                images[len(kept)], row = found
                kept.append(picture.label)
                rows.append(row)
                continue
            why = reason(found)
            if is_passing(found):  # of the system, not of the image: nothing to remember
                raise UserError(f"{picture.name}: cannot be read ({why}); try again") from found
            if "cannot identify image file" in why:  # PIL appends the address of an in-memory buffer
                why = "not an image in a format that PIL knows"
            left_out.append(f"{picture.name}: unreadable image ({why})")
            if not skip_unreadable:
                raise UserError(f"{left_out[0]}; {_SKIP_HINT}") from found
    for label in sorted({picture.label for picture in plan.pictures} - {*kept}):
        raise UserError(f"{plan.where}: class {plan.classes[label]} has no readable image; {_SKIP_HINT}")
    if isinstance(images, np.memmap):
        images.flush()
    fingerprint = _digest([*head, str(image_size), *plan.classes, *rows])
    labels = np.array(kept, dtype=np.int64)
    arrays = ImageArrays(images[: len(kept)], labels, tuple(plan.classes), fingerprint, name)
    return _Found(arrays, left_out, plan.remarks)


def subset(arrays: ImageArrays, indices: np.ndarray, part: str) -> ImageArrays:
    """Some of a set's images, copied into memory, with a fingerprint of their own.

    Args:
        arrays: the whole set.
        indices: which images, int64 `[n]`.
        part: what the part is called: the name of `cub-train` becomes `cub-train-<part>`.
    """
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
