"""The images behind `results/`, made again from the official data sets: the zips that its commands name.

cub50.zip                    the first 50 classes of CUB in the official split, 84×84: the same photographs as behind
                             the published numbers, but how those were scaled is not known
s-cifar100.zip               50 and 25 training images a class of CIFAR-100 and all test images: the same pixels in the
                             same order
tiny-imagenet-200.part1.zip  of Tiny ImageNet, images 0 to 99 of each class, and of each class the first ten validation
                             images of the official list: the same files
tiny-imagenet-200.part2.zip  images 100 to 199 of each class: the same files
"""

import hashlib
import io
import re
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from metaperturb.data.arrays import progress, to_pixels
from metaperturb.data.files import Place
from metaperturb.data.official import OFFICIAL
from metaperturb.data.registry import open_plan
from metaperturb.errors import UserError
from metaperturb.storage import write_atomically

Members = Iterator[tuple[str, bytes]]
CUB_CLASSES, CUB_SIZE, JPEG_QUALITY = 50, 84, 95
S_CIFAR100 = Path(__file__).with_name("s-cifar100.crc32")
IMAGES_A_PART, VALIDATION_IMAGES = 100, 10  # of each class of Tiny ImageNet


def _encoded(pixels: np.ndarray, kind: str, **options: int) -> bytes:
    """An image file of pixels (uint8 `[H, W, 3]`)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _cub50(data_root: Path) -> Members:
    for split in ("train", "test"):
        with open_plan("cub", split, data_root=data_root) as plan:
            for picture in plan.pictures:
                if picture.class_name in plan.classes[:CUB_CLASSES]:
                    try:
                        pixels = to_pixels(picture.read(), CUB_SIZE)[0].transpose(1, 2, 0)
                    except Exception as error:  # PIL raises nearly anything on broken images
                        raise UserError(f"{picture.name}: unreadable image ({error})") from error
                    name = picture.name.rsplit("/", 1)[-1]
                    content = _encoded(np.ascontiguousarray(pixels), "JPEG", quality=JPEG_QUALITY)
                    yield f"cub50/{split}/{picture.class_name}/{name}", content


def _s_cifar100(data_root: Path) -> Members:
    rows = [line.split() for line in S_CIFAR100.read_text().splitlines() if not line.startswith("#")]
    for source, parts in (("train", ("train", "val")), ("test", ("test",))):
        with open_plan("cifar100", source, data_root=data_root) as plan:
            images = [(picture.class_name, picture.read()) for picture in plan.pictures]
            found = {(name, f"{zlib.crc32(pixels):08x}"): pixels for name, pixels in images}
        for folder, *wanted in rows:
            part, class_name = folder.split("/")
            for number, crc in enumerate(wanted if part in parts else []):
                if (class_name, crc) not in found:
                    raise UserError(f"{plan.where}: image {crc} of {folder} is not among its {source} images")
                yield f"s-cifar100/{folder}/{number:03}.png", _encoded(found[class_name, crc], "PNG")


def _tiny_imagenet(data_root: Path, part: int) -> Members:
    numbers = range(part * IMAGES_A_PART, (part + 1) * IMAGES_A_PART)
    with ExitStack() as stack:
        (path,) = OFFICIAL["tiny_imagenet"].places(data_root, True, "train")
        archive = Place(path, stack)
        top = "" if archive.path.is_dir() else "tiny-imagenet-200/"
        names = [re.fullmatch(rf"{top}train/\w+/images/\w+_(\d+)\.JPEG", member) for member in archive.files]
        members = [name[0] for name in names if name and int(name[1]) in numbers]
        if part == 0:
            table = f"{top}val/val_annotations.txt"
            kept: dict[str, list[str]] = defaultdict(list)
            for line in archive.read(table).decode("utf-8", "replace").splitlines(keepends=True):
                if line.count("\t") and len(of_class := kept[line.split("\t")[1]]) < VALIDATION_IMAGES:
                    of_class.append(line)
            lines = [line for of_class in kept.values() for line in of_class]
            members += [f"{top}val/images/{line.split()[0]}" for line in lines]
            yield "tiny-imagenet-200/val/val_annotations.txt", "".join(lines).encode()
        if missing := sorted(set(members) - set(archive.files)):
            raise UserError(f"{archive.path}: {missing[0]} is listed but missing")
        for member in members:
            yield f"tiny-imagenet-200/{member.removeprefix(top)}", archive.read(member)


@dataclass(frozen=True)
class ImageZip:
    """A zip that can be made: how many images it has, where they come from, the `digest` of its files if known."""

    images: int
    members: Callable[[Path], Members]
    digest: str | None = None


ZIPS = {
    "cub50.zip": ImageZip(2889, _cub50),
    "s-cifar100.zip": ImageZip(17500, _s_cifar100),
    "tiny-imagenet-200.part1.zip": ImageZip(
        22000, partial(_tiny_imagenet, part=0), "7cd6de9b1813cd5c7ffe99ba043007669636cedc1ae6b9cb191e3c3d36db6840"
    ),
    "tiny-imagenet-200.part2.zip": ImageZip(
        20000, partial(_tiny_imagenet, part=1), "327863798a135b27223918ec5c40db5d806cd66045bd2241877ef483f727929e"
    ),
}


def digest(crcs: dict[str, int]) -> str:
    """Hex digest of image files: of their names in the zip and the CRC-32 of their content."""
    rows = sorted(f"{member}:{crc:08x}" for member, crc in crcs.items())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def make_zip(name: str, data_root: Path) -> Path:
    """Write `<data_root>/<name>`, one of `ZIPS`, unless it is there; fetches the official data set if it is absent.

    Raises:
        UserError: anything wrong with the official data, another number of images than there must be, a full disk.
    """
    made = ZIPS[name]
    path = Path(data_root).expanduser() / name
    if path.exists():
        print(f"{path}: is there already", file=sys.stderr)
        return path

    def write(file: BinaryIO) -> None:
        crcs = {}
        with zipfile.ZipFile(file, "w") as archive:
            for member, content in progress(made.members(path.parent), str(path), made.images):
                archive.writestr(zipfile.ZipInfo(member), content)  # its date is 1980: the same zip every time
                if not member.endswith(".txt"):
                    crcs[member] = zlib.crc32(content)
            if len(crcs) != made.images:
                raise UserError(
                    f"{path}: expected {made.images:,} images, found {len(crcs):,}; is the official data complete?"
                )
            if made.digest not in (None, digest(crcs)):
                raise UserError(
                    f"{path}: not the images behind the published results; is the data set the official one?"
                )

    write_atomically(path, write)
    return path
