"""Small real image files and archives for the tests of the data package."""

import contextlib
import dataclasses
import hashlib
import io
import pickle
import re
import resource
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torchvision.datasets as tv
from PIL import Image

from metaperturb.data import DATA_SETS
from metaperturb.data.official import FILES
from metaperturb.errors import UserError


def picture(seed: int, size: tuple[int, int] = (24, 20), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded image of random low-frequency content; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind)
    return buffer.getvalue()


def expected_pixels(content: bytes, size: int) -> np.ndarray:
    """An independent decode: uint8 [3, size, size]."""
    with Image.open(io.BytesIO(content)) as image:
        rgb = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.moveaxis(np.array(rgb), -1, 0)


def folder_layout(train: int = 3, test: int = 2, classes: tuple[str, ...] = ("cat", "dog")) -> dict[str, bytes]:
    """Files of an image folder, {name: content}."""
    files = {}
    for c, name in enumerate(classes):
        for split, count in (("train", train), ("test", test)):
            for i in range(count):
                files[f"{split}/{name}/{i}.png"] = picture(1000 * c + 100 * (split == "test") + i)
    return files


class Link(NamedTuple):
    """In place of a file's content; a hard link's target is named from the top."""

    target: str
    hard: bool = False


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def write_tar(path: Path, files: dict[str, bytes | Link]) -> Path:
    mode = "w:gz" if path.suffix in (".gz", ".tgz") else "w"
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, Link):
                member.type = tarfile.LNKTYPE if content.hard else tarfile.SYMTYPE
                member.linkname, content = content.target, b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path: Path, files: dict[str, bytes | Link]) -> Path:
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.hardlink_to(path / content.target) if content.hard else file.symlink_to(content.target)
    return path


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def expect_counts(monkeypatch, name, num_classes, train, test, val=None):
    """Expect the counts of the miniature instead of the official ones."""
    images = {"train": train, "test": test} | ({} if val is None else {"val": val})
    spec = dataclasses.replace(DATA_SETS[name], num_classes=num_classes, images=images)
    monkeypatch.setitem(DATA_SETS, name, spec)


def cub_files():
    images = [f"00{1 + i // 4}.Bird_{i // 4}/b{i}.jpg" for i in range(12)]
    files = {f"images/{name}": picture(i, (60, 50), "JPEG") for i, name in enumerate(images)}
    files["images.txt"] = "".join(f"{i + 1} {name}\n" for i, name in enumerate(images)).encode()
    files["image_class_labels.txt"] = "".join(f"{i + 1} {1 + i // 4}\n" for i in range(12)).encode()
    files["train_test_split.txt"] = "".join(f"{i + 1} {int(i % 4 < 2)}\n" for i in range(12)).encode()
    files["classes.txt"] = b"1 001.Bird_0\n2 002.Bird_1\n3 003.Bird_2\n"
    return {**{f"CUB_200_2011/{name}": content for name, content in files.items()}, "attributes.txt": b"1 x"}


def tiny_imagenet(wnids: Sequence[str], numbers: Iterable[int], val: Sequence[str] = (), there: int = 99) -> dict:
    """Images of these numbers of each class, and validation images of these classes, of which the first are there."""
    files = {"wnids.txt": "\n".join(wnids).encode(), "words.txt": b"n01\tcat"}
    files["test/images/test_0.JPEG"] = picture(5, (64, 64), "JPEG")
    for c, wnid in enumerate(wnids):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = f"{wnid}_0.JPEG\t0\t0\t63\t63".encode()
        files |= {f"train/{wnid}/images/{wnid}_{i}.JPEG": picture(100 * c + i, (64, 64), "JPEG") for i in numbers}
    if val:
        rows = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(val)]
        files["val/val_annotations.txt"] = "".join(rows).encode()
        files |= {f"val/images/val_{i}.JPEG": picture(900 + i, (64, 64), "JPEG") for i in range(len(val))[:there]}
    return {f"tiny-imagenet-200/{name}": content for name, content in files.items()}


def cifar_archive(tmp_path, monkeypatch):
    """A miniature of CIFAR-100 as it is published; returns its pixels."""
    rng, data = np.random.default_rng(0), {}
    files = {"meta": pickle.dumps({"fine_label_names": ["apple", "bee"]})}
    for split, count in (("train", 160), ("test", 6)):
        data[split] = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = [i % 2 for i in range(count)]
        files[split] = pickle.dumps({"data": data[split].reshape(count, -1), "fine_labels": labels})
    members = {f"cifar-100-python/{name}": content for name, content in files.items()}
    archive = write_tar(tmp_path / "cifar-100-python.tar.gz", members)
    monkeypatch.setitem(FILES, "cifar-100-python", {tv.CIFAR100.url: md5(archive.read_bytes())})
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return data


@contextlib.contextmanager
def disk_full(size: int):
    """A real refusal by the kernel to write more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refusal(call, *arguments, **options) -> str:
    """The message of the UserError that a call ends with: see `one_line`."""
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    return one_line(error)


def refused(says: str, call, *arguments, **options) -> str:
    """As `refusal`, of a message that a pattern is found in."""
    message = refusal(call, *arguments, **options)
    assert re.search(says, message), message
    return message


def one_line(error) -> str:
    """The message of a caught UserError, which must be a single line without a traceback's or a repr's noise."""
    message = str(error.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message
