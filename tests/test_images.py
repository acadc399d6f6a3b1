"""The zips of the published results, made of miniatures of the official data sets."""

import hashlib
import io
import re
import sys
import zipfile
import zlib
from pathlib import Path

import images
import numpy as np
import prepare_data
import pytest
from image_files import (
    cifar_archive,
    cub_files,
    expect_counts,
    expected_pixels,
    refusal,
    refused,
    tiny_imagenet,
    write_folder,
    write_zip,
)
from PIL import Image

from metaperturb.data import load


def _expect(monkeypatch, name, count, digest=None):
    monkeypatch.setitem(images.ZIPS, name, images.ImageZip(count, images.ZIPS[name].members, digest))


def test_cub50(tmp_path, monkeypatch):
    expect_counts(monkeypatch, "cub", 3, 6, 6)
    files = cub_files()
    write_folder(tmp_path, files)
    monkeypatch.setattr(images, "CUB_CLASSES", 2)
    _expect(monkeypatch, "cub50.zip", 8)
    path = images.make_zip("cub50.zip", tmp_path)
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            original = files[f"CUB_200_2011/images/{member.split('/', 2)[2]}"]
            with Image.open(io.BytesIO(archive.read(member))) as image:
                assert image.format == "JPEG" and image.size == (84, 84)
                found = np.asarray(image, dtype=float).transpose(2, 0, 1)
            assert np.abs(found - expected_pixels(original, 84)).mean() < 4  # what JPEG loses
    for split, numbers in (("train", (0, 1)), ("test", (2, 3))):
        names = [f"cub50/{split}/00{c + 1}.Bird_{c}/b{4 * c + i}.jpg" for c in (0, 1) for i in numbers]
        assert [member for member in archive.namelist() if split in member] == names
    train, test = load("folder", paths=[path], data_root=tmp_path, image_size=32)
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1]


def test_s_cifar100_in_the_listed_order(tmp_path, monkeypatch):
    expect_counts(monkeypatch, "cifar100", 2, 160, 6)
    data = cifar_archive(tmp_path, monkeypatch)
    data["val"] = data["train"]
    chosen = {"train": ([6, 2, 8], [1, 9, 3]), "val": ([0], [159]), "test": ([4, 0], [5, 1])}  # of either class
    rows = ["# a comment"]
    for split, classes in chosen.items():
        for name, wanted in zip(("apple", "bee"), classes, strict=True):
            crcs = [zlib.crc32(data[split][i].transpose(1, 2, 0).tobytes()) for i in wanted]
            rows.append(" ".join([f"{split}/{name}", *(f"{crc:08x}" for crc in crcs)]))
    listed = tmp_path / "listed.crc32"
    listed.write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(images, "S_CIFAR100", listed)
    _expect(monkeypatch, "s-cifar100.zip", 12)
    path = images.make_zip("s-cifar100.zip", tmp_path)
    parts = load("folder", paths=[path], data_root=tmp_path, splits=("train", "val", "test"))
    for split, arrays in zip(("train", "val", "test"), parts, strict=True):
        apples, bees = chosen[split]
        np.testing.assert_array_equal(arrays.images, data[split][apples + bees])
        assert arrays.classes == ("apple", "bee") and arrays.labels.tolist() == [0] * len(apples) + [1] * len(bees)
    listed.write_text("train/bee 00000000\n")
    path.unlink()
    says = "cifar-100-python: image 00000000 of train/bee is not among its train images"
    refused(says, images.make_zip, "s-cifar100.zip", tmp_path)
    assert not list(tmp_path.glob("*s-cifar100*"))


def test_the_list_of_s_cifar100():
    rows = [line.split() for line in images.S_CIFAR100.read_text().splitlines() if not line.startswith("#")]
    assert len({folder for folder, *_ in rows}) == 300
    assert {(folder.split("/")[0], len(crcs)) for folder, *crcs in rows} == {("train", 50), ("val", 25), ("test", 100)}
    chosen = [crc for folder, *crcs in rows if not folder.startswith("test/") for crc in crcs]
    assert len(chosen) == len({*chosen}) == 7500 and all(re.fullmatch("[0-9a-f]{8}", crc) for crc in chosen)


@pytest.fixture
def tiny(monkeypatch):
    """Files of a small Tiny ImageNet, whose parts have two images of each class, and the first a validation image."""
    monkeypatch.setattr(images, "IMAGES_A_PART", 2)
    monkeypatch.setattr(images, "VALIDATION_IMAGES", 1)
    return tiny_imagenet(("n01", "n02"), range(6), val=("n01", "n01", "n02", "n01", "n02"))


@pytest.mark.parametrize("as_folder", [False, True])
def test_parts_of_tiny_imagenet_are_the_files_themselves(tiny, tmp_path, monkeypatch, as_folder):
    write_folder(tmp_path, tiny) if as_folder else write_zip(tmp_path / "tiny-imagenet-200.zip", tiny)
    for part, numbers, validation in ((1, (0, 1), (0, 2)), (2, (2, 3), ())):
        name = f"tiny-imagenet-200.part{part}.zip"
        wanted = [f"tiny-imagenet-200/train/{w}/images/{w}_{i}.JPEG" for w in ("n01", "n02") for i in numbers]
        wanted += [f"tiny-imagenet-200/val/images/val_{i}.JPEG" for i in validation]
        rows = "\n".join(sorted(f"{member}:{zlib.crc32(tiny[member]):08x}" for member in wanted))
        _expect(monkeypatch, name, len(wanted), hashlib.sha256(rows.encode()).hexdigest())
        with zipfile.ZipFile(images.make_zip(name, tmp_path)) as archive:
            found = {member: archive.read(member) for member in archive.namelist()}
        table = found.pop("tiny-imagenet-200/val/val_annotations.txt", b"")
        assert found == {member: tiny[member] for member in wanted}
        assert [line.split()[:2] for line in table.decode().splitlines()] == (
            [["val_0.JPEG", "n01"], ["val_2.JPEG", "n02"]] if part == 1 else []
        )


@pytest.mark.parametrize(
    ("images_there", "digest", "says"),
    [
        (7, None, "expected 7 images, found 6; is the official data complete?"),
        (6, "0" * 64, "not the images behind the published results; is the data set the official one?"),
    ],
)
def test_other_images_than_the_official_ones(tiny, tmp_path, monkeypatch, images_there, digest, says):
    write_zip(tmp_path / "tiny-imagenet-200.zip", tiny)
    _expect(monkeypatch, "tiny-imagenet-200.part1.zip", images_there, digest)
    message = refusal(images.make_zip, "tiny-imagenet-200.part1.zip", tmp_path)
    assert says in message and "part1.zip" in message
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-imagenet-200.zip"]


def _prepare(monkeypatch, root: Path, *names: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--data-root", str(root), *names])
    return prepare_data.main()


def test_a_validation_image_that_is_missing_does_not_keep_the_others(tiny, tmp_path, monkeypatch, capsys):
    del tiny["tiny-imagenet-200/val/images/val_2.JPEG"]
    write_zip(tmp_path / "tiny-imagenet-200.zip", tiny)
    expect_counts(monkeypatch, "cub", 3, 6, 6)
    write_folder(tmp_path, cub_files())
    assert _prepare(monkeypatch, tmp_path, "tiny-imagenet-200.part1.zip", "cub") == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"cub-{split}: 6 images of 3 classes, 84×84" for split in ("train", "test")]
    assert "val/images/val_2.JPEG is listed but missing" in said.err
    assert said.err.splitlines()[-1] == "error: not prepared: tiny-imagenet-200.part1.zip (why: above)"
    write_folder(tmp_path, {"CUB_200_2011/images/001.Bird_0/b0.jpg": b"no image"})
    refused("001.Bird_0/b0.jpg: unreadable image", images.make_zip, "cub50.zip", tmp_path)


def test_the_command(tiny, tmp_path, monkeypatch, capsys):
    write_zip(tmp_path / "tiny-imagenet-200.zip", tiny)
    _expect(monkeypatch, "tiny-imagenet-200.part2.zip", 4)
    made = tmp_path / "tiny-imagenet-200.part2.zip"
    assert _prepare(monkeypatch, tmp_path, made.name) == 0
    said = capsys.readouterr()
    assert said.out == f"{made}\n" and "4/4" in said.err
    content, when = made.read_bytes(), made.stat().st_mtime_ns
    assert _prepare(monkeypatch, tmp_path, made.name) == 0
    assert "is there already" in capsys.readouterr().err and made.stat().st_mtime_ns == when
    made.unlink()
    assert _prepare(monkeypatch, tmp_path, made.name) == 0 and made.read_bytes() == content
    with pytest.raises(SystemExit):
        _prepare(monkeypatch, tmp_path, "cub50.zip", "cub500.zip")
    assert "invalid choice: 'cub500.zip'" in capsys.readouterr().err
    monkeypatch.setattr(prepare_data, "load", lambda name, **_: [])
    assert _prepare(monkeypatch, tmp_path, "all", made.name) == 0  # all: of the official sets, and this one, too
