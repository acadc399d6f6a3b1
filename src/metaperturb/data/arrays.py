"""Decoded images as memory-mapped arrays, built once and shared by all processes.

A data set is described by a `Plan` (which images, which labels, how to read them). `cached`
decodes the images to RGB, resizes them to a square, and keeps them under `<data_root>/cache` as plain
`.npy` files.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from metaperturb.data.archives import Archive
from metaperturb.data.disk import Progress, disk_errors, file_lock
from metaperturb.errors import UserError
from metaperturb.provenance import available_cores

# Part of every cache key: raise it when the pixels written for the same input change.
_CACHE_FORMAT = 1
_SKIP_HINT = "repair or remove it, or set skip_unreadable=true to leave such files out"

Content = bytes | np.ndarray | Exception


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """A labelled set of square RGB images.

    Attributes:
        images: uint8 `[N, 3, H, W]`, H = W; read-only, memory-mapped from the cache (embedded sets: in memory).
        labels: int64 `[N]`, each in `0 … num_classes - 1`.
        classes: the class names; label `i` means `classes[i]`.
        fingerprint: hex digest of the content: set, split, image size, classes, and the label and CRC-32 of
            each image file in order. The same for the same files, be they in zips, a tar or a folder, and
            wherever the cache is.
        name: data set and split, `"cub-train"`; a part of it is `"cub-train-holdout"`.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str
    name: str

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
class Plan:
    """What a cache is built from.

    Attributes:
        where: what error messages call the whole, such as the archive's path.
        classes: class names.
        labels: one class index an image, N of them.
        names: what error messages call each of the N images, `"cub50.zip: cub50/train/001.Auklet/1.jpg"`.
        read: yields (index, content) for every image once, in any order. Content is an encoded file's bytes,
            decoded pixels (uint8 `[H, W, 3]` or `[H, W]`), or the exception that reading gave.
    """

    where: str
    classes: Sequence[str]
    labels: Sequence[int]
    names: Sequence[str]
    read: Callable[[], Iterable[tuple[int, Content]]]


@dataclass(frozen=True)
class Sample:
    """One image file: the archive that holds it, its name there, its class name."""

    archive: Archive
    member: str
    class_name: str


def plan_from_samples(samples: Sequence[Sample], classes: Sequence[str]) -> Plan:
    """A plan for images in archives, in the order given; `classes` orders the labels."""
    index = {name: i for i, name in enumerate(classes)}
    archives = list({id(s.archive): s.archive for s in samples}.values())
    positions = {(id(s.archive), s.member): i for i, s in enumerate(samples)}

    def read() -> Iterator[tuple[int, bytes | Exception]]:
        for archive in archives:
            for member, content in archive.read_each(m for a, m in positions if a == id(archive)):
                yield positions[id(archive), member], content

    return Plan(
        where=", ".join(str(a.path) for a in archives),
        classes=classes,
        labels=[index[s.class_name] for s in samples],
        names=[f"{s.archive.path}: {s.member}" for s in samples],
        read=read,
    )


def to_pixels(content: bytes | np.ndarray, image_size: int) -> np.ndarray:
    """Decode to RGB and squash to a square, as the paper does: PIL's bilinear filter, which antialiases.

    Transparency is dropped and an EXIF orientation ignored, as torchvision's image folders do.

    Returns:
        uint8 `[3, image_size, image_size]`.

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
        rgb = image.convert("RGB")
    if rgb.size != (image_size, image_size):
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)


def cached(
    data_root: Path,
    name: str,
    split: str,
    image_size: int,
    source_key: str,
    make_plan: Callable[[], Plan],
    skip_unreadable: bool = False,
) -> ImageArrays:
    """The arrays of one split, from the cache if it is there, else built and cached.

    Several processes may ask at once: one builds, the others wait and share its files. A build that is killed
    leaves nothing that could be taken for a cache.

    Args:
        data_root: holds `cache/<name>-<split>-<image_size>-<key>/{images.npy,labels.npy,meta.json}`.
        name: data set.
        split: `"train"`, `"val"` or `"test"`.
        image_size: height = width in pixels.
        source_key: changes when the source does (`Archive.key`).
        make_plan: called only to build.
        skip_unreadable: leave out files that are no readable images and say how many, instead of raising.

    Raises:
        UserError: an unreadable image, a full or read-only disk, and what `make_plan` raises.
    """
    if not isinstance(image_size, int) or not 1 <= image_size <= 4096:
        raise UserError(f"image_size {image_size!r}: must be a whole number of pixels from 1 to 4096")
    identity = [_CACHE_FORMAT, name, split, image_size, source_key]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = Path(data_root).expanduser() / "cache" / f"{name}-{split}-{image_size}-{key[:12]}"
    found = _open(folder, key)
    if found is None:
        with file_lock(folder.with_name(f".{folder.name}.lock")):
            found = _open(folder, key)  # another process may have built it while this one waited
            if found is None:
                # Only the holder of the lock builds, so whatever temporary folder there is belongs to a
                # killed one.
                for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
                    shutil.rmtree(stale, ignore_errors=True)
                _build(folder, key, name, split, image_size, make_plan(), skip_unreadable)
                found = _open(folder, key)
                if found is None:
                    raise UserError(f"{folder}: was removed while it was built; start again")
    arrays, left_out = found
    if left_out and not skip_unreadable:
        raise UserError(f"{left_out[0]}; {_SKIP_HINT}")
    if left_out:
        print(f"{name}-{split}: {len(left_out)} unreadable files left out", file=sys.stderr)
    return arrays


def _open(folder: Path, key: str) -> tuple[ImageArrays, list[str]] | None:
    """(arrays, files left out) of a finished cache; `None` if there is none, or a damaged one (said on stderr)."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        size, classes = meta["image_size"], tuple(meta["classes"])
        if meta["key"] != key:
            raise ValueError("meta.json belongs to other data")
        if images.dtype != np.uint8 or images.shape != (meta["count"], 3, size, size):
            raise ValueError(f"images.npy has shape {images.shape}")
        if labels.dtype != np.int64 or labels.shape != (meta["count"],):
            raise ValueError(f"labels.npy has shape {labels.shape}")
        labels.flags.writeable = False
        arrays = ImageArrays(images, labels, classes, meta["fingerprint"], f"{meta['name']}-{meta['split']}")
        return arrays, list(meta["left_out"])
    except PermissionError as error:
        raise UserError(f"{error.filename}: no permission to read it") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        print(f"{folder}: damaged cache ({error}), built again", file=sys.stderr)
        return None


def _build(folder: Path, key: str, name: str, split: str, image_size: int, plan: Plan, skip_unreadable: bool) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        with disk_errors(folder, "write the image cache"):
            temporary.mkdir()
            images = _create(temporary / "images.npy", (len(plan.labels), 3, image_size, image_size))
            crcs = np.zeros(len(plan.labels), dtype=np.uint32)
            with Progress(f"{name}-{split}: decode to {image_size} px", len(plan.labels), "images") as progress:
                unreadable = _decode(plan, images, crcs, skip_unreadable, progress)
            keep = np.array([i for i in range(len(plan.labels)) if i not in unreadable], dtype=np.int64)
            labels = np.asarray(plan.labels, dtype=np.int64)[keep]
            for index in np.setdiff1d(plan.labels, labels):
                raise UserError(f"{plan.where}: class {plan.classes[index]} has no readable image; {_SKIP_HINT}")
            if unreadable:
                images = _compact(temporary / "images.npy", images, keep)
            images.flush()
            np.save(temporary / "labels.npy", labels)
            rows = (f"{plan.labels[i]}:{crcs[i]:08x}" for i in keep)
            content = "\n".join([name, split, str(image_size), *plan.classes, *rows])
            meta = {
                "name": name,
                "split": split,
                "image_size": image_size,
                "count": len(keep),
                "classes": list(plan.classes),
                "fingerprint": hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest(),
                "left_out": [unreadable[i] for i in sorted(unreadable)],
                "key": key,
            }
            (temporary / "meta.json").write_text(json.dumps(meta))
            if folder.exists():  # damaged, see _open; those who still have it mapped keep their view of it
                shutil.rmtree(folder)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _create(path: Path, shape: tuple[int, ...]) -> np.memmap:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    # A memory map on a full disk ends in SIGBUS: claim the space now, where it is an ordinary error.
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _compact(path: Path, images: np.memmap, keep: np.ndarray) -> np.memmap:
    kept = _create(path.with_suffix(".kept"), (len(keep), *images.shape[1:]))
    for start in range(0, len(keep), 1024):
        kept[start : start + 1024] = images[keep[start : start + 1024]]
    path.with_suffix(".kept").rename(path)
    return kept


def _decode(
    plan: Plan, images: np.ndarray, crcs: np.ndarray, skip_unreadable: bool, progress: Progress
) -> dict[int, str]:
    """Fill `images` and `crcs`; this thread reads, a pool decodes. Returns {index: why} of unreadable images."""
    unreadable: dict[int, str] = {}

    def work(chunk: Sequence[tuple[int, Content]]) -> list[tuple[int, Exception]]:
        failed = []
        for index, content in chunk:
            try:
                if isinstance(content, Exception):
                    raise content
                images[index] = to_pixels(content, images.shape[-1])
                crcs[index] = zlib.crc32(content)
            except MemoryError:
                raise
            except Exception as error:  # PIL raises nearly anything on broken images
                failed.append((index, error))
        return failed

    def finish(size: int, future: Future[list[tuple[int, Exception]]]) -> None:
        for index, error in future.result():
            reason = " ".join(str(error).split()) or type(error).__name__
            if "cannot identify image file" in reason:  # PIL appends the address of an in-memory buffer
                reason = "not an image in a format that PIL knows"
            unreadable[index] = f"{plan.names[index]}: unreadable image ({reason})"
            if not skip_unreadable:
                raise UserError(f"{unreadable[index]}; {_SKIP_HINT}") from error
        progress.add(size)

    workers = min(8, available_cores())
    pending: deque[tuple[int, Future[list[tuple[int, Exception]]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for chunk in _chunks(plan.read()):
                pending.append((len(chunk), pool.submit(work, chunk)))
                if len(pending) >= 2 * workers:  # bounds the memory
                    finish(*pending.popleft())
            while pending:
                finish(*pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return unreadable


def _chunks(items: Iterable[tuple[int, Content]]) -> Iterator[list[tuple[int, Content]]]:
    """Groups of 16 images, fewer if they are large: handing small images to threads one by one halves the speed."""
    chunk: list[tuple[int, Content]] = []
    size = 0
    for index, content in items:
        chunk.append((index, content))
        size += 0 if isinstance(content, Exception) else memoryview(content).nbytes
        if len(chunk) == 16 or size > 2**20:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def subset(arrays: ImageArrays, indices: np.ndarray, part: str) -> ImageArrays:
    """Some of a set's images, copied into memory, with a fingerprint of their own.

    Args:
        arrays: the whole set.
        indices: which images, int64 `[n]`.
        part: what the part is called: the name of `cub-train` becomes `cub-train-<part>`.
    """
    indices = np.asarray(indices, dtype=np.int64)
    digest = hashlib.sha256(f"{arrays.fingerprint} {part}\n".encode() + indices.astype("<i8").tobytes())
    images, labels = arrays.images[indices], arrays.labels[indices]
    images.flags.writeable = labels.flags.writeable = False
    return ImageArrays(images, labels, arrays.classes, digest.hexdigest(), f"{arrays.name}-{part}")


def from_memory(name: str, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> ImageArrays:
    """Wrap decoded images (uint8 `[N, 3, H, W]`) and labels (`[N]`) that need no cache."""
    labels = np.asarray(labels, dtype=np.int64)
    digest = hashlib.sha256("\n".join([name, str(images.shape), *classes]).encode())
    digest.update(np.ascontiguousarray(images))
    digest.update(labels)
    images = np.ascontiguousarray(images).view()
    images.flags.writeable = labels.flags.writeable = False
    return ImageArrays(images, labels, tuple(classes), digest.hexdigest(), name)
