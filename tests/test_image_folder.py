"""Image folders, and the cache of decoded images that all data sets share."""

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from image_files import disk_full, expected_pixels, folder_layout, picture, refused, write_folder, write_tar, write_zip
from PIL import Image, ImageOps

from metaperturb.data import arrays, load
from metaperturb.data.arrays import to_pixels
from metaperturb.storage import load_json, save_json


def _load(images, root, **options):
    """Of a path, or of files that are written to a zip."""
    if isinstance(images, dict):
        images = write_zip(root / "x.zip", images)
    return load("folder", paths=[images], data_root=root, **options)


def _encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    image.copy().save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


@pytest.fixture
def open_path():
    """As tmp_path, but others may enter and write there."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def in_children(work, count=1, user=None) -> list[str]:
    """What `work` returns in as many processes at once, as text; `user`: who they are if this one is root."""
    readers, found = [], []
    for _ in range(count):
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                if user and os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid(user)
                    os.setuid(user)
                said = work()
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writer, str(said).encode())
            os._exit(0)
        os.close(writer)
        readers.append(reader)
    for reader in readers:
        with open(reader) as pipe:
            found.append(pipe.read())
        os.wait()
    return found


def as_nobody(work) -> None:
    """Run `work`, which says nothing or True, as a user who is neither root nor the owner of anything."""
    (failure,) = in_children(work, user=65534)
    assert failure in ("None", "True"), failure


def test_pixels_labels_and_order(tmp_path):
    files = folder_layout()
    files["train/cat/0.png"] = picture(7, (30, 40), "JPEG")
    files["train/cat/1.png"] = picture(8, (16, 16), mode="L")
    files["train/cat/2.png"] = picture(9, (9, 50), mode="RGBA")
    files["train/dog/0.png"] = picture(10, (20, 20), "GIF", mode="P")
    train, test = _load(write_folder(tmp_path / "x", files), tmp_path, image_size=16)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and train.labels.dtype == np.int64
    assert (len(train), train.num_classes, train.image_size, train.name) == (6, 2, 16, "folder-train")
    names = sorted(name for name in files if name.startswith("train/"))
    np.testing.assert_array_equal(train.images, np.stack([expected_pixels(files[n], 16) for n in names]))
    assert test.images.shape == (4, 3, 16, 16) and test.images.dtype == np.uint8
    assert isinstance(train.images, np.memmap)
    for array in (train.images, train.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def _fingerprint(files, mended=()):
    rows = ["folder", "train", "32", "cat", "dog"]
    for name in sorted(name for name in files if name.startswith("train/")):
        crc = f"{zlib.crc32(files[name]):08x}"
        rows.append(f"{int('dog' in name)}:{crc}{':mended' * (name in mended)}")
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def test_fingerprint_follows_the_content(tmp_path):
    """Of the files alone, in every form and place; two folders whose names, sizes and dates agree are two data sets."""
    files = folder_layout()
    enclosed = {f"my pets/{name}": content for name, content in files.items()}
    forms = [
        write_zip(tmp_path / "a.zip", {**enclosed, "my pets/README.md": b"read", "__MACOSX/my pets/._x": b"?"}),
        write_tar(tmp_path / "b.tar", {f"./{name}": content for name, content in files.items()}),
        write_tar(tmp_path / "absolute.tar.gz", {f"/home/{name}": content for name, content in enclosed.items()}),
        write_folder(tmp_path / "c", enclosed),
    ]
    first = _load(files, tmp_path)
    for i, path in enumerate(forms):
        train, test = _load(path, tmp_path / f"root{i}")
        assert train.fingerprint == _fingerprint(files)  # as results have it: it never changes
        assert test.fingerprint == first[1].fingerprint and np.array_equal(train.images, first[0].images)
    with Image.open(io.BytesIO(picture(0))) as image:
        image.putalpha(100)
    mended = {**files, "train/cat/0.png": _encoded(image)}  # read by a version that did not: other images
    assert _load(mended, tmp_path)[0].fingerprint == _fingerprint(mended, mended=["train/cat/0.png"])
    assert _load(files, tmp_path, image_size=16)[0].fingerprint != _fingerprint(files)
    for write in (write_folder, write_tar):
        pair = []
        for number in (1, 2):
            files = {name: picture(number + len(name), kind="BMP") for name in files}
            path = write(tmp_path / f"{write.__name__}{number}", files)
            for file in [path, *path.rglob("*")]:
                os.utime(file, (0, 0))
            pair.append(_load(path, tmp_path)[0])
        assert pair[0].fingerprint != pair[1].fingerprint and (pair[0].images != pair[1].images).any()


# --- decoding


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_photographs_are_turned_upright(kind, orientation):
    with Image.open(io.BytesIO(picture(3, (30, 20)))) as image:
        (exif := Image.Exif())[0x112] = orientation
        content = _encoded(image, kind, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image)).copy()
    pixels, mended = to_pixels(content, 30)
    np.testing.assert_array_equal(pixels, to_pixels(upright, 30)[0])
    assert mended == (kind == "JPEG" and 1 < orientation < 9)  # PIL itself turns TIFF


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_lie_on_white(mode):
    rng = np.random.default_rng(0)
    colour, alpha = rng.integers(0, 256, (8, 8, 1 if mode == "LA" else 3)), rng.integers(0, 256, (8, 8, 1))
    image, options = Image.fromarray(np.concatenate([colour, alpha], -1).astype(np.uint8)), {}
    if mode == "P":
        image = Image.fromarray(rng.integers(0, 2, (8, 8), dtype=np.uint8), "P")
        image.putpalette([200, 0, 0, 9, 9, 9])
        colour, alpha, options = np.full((8, 8, 3), 9), 255 * np.asarray(image)[..., None], {"transparency": 0}
    pixels, mended = to_pixels(_encoded(image, **options), 8)
    assert mended
    assert np.abs(pixels.transpose(1, 2, 0) - (colour * alpha + 255.0 * (255 - alpha)) / 255).max() <= 1
    image = Image.fromarray(np.full((8, 8, 4), 255, np.uint8))  # has alpha, but hides nothing
    assert not to_pixels(_encoded(image), 8)[1]


RGB = Image.open(io.BytesIO(picture(5)))
FIRST_OF_TWO = {"save_all": True, "append_images": [RGB.rotate(180)]}
KINDS = {
    "CMYK": _encoded(RGB.convert("CMYK"), "JPEG", quality=95),
    "two frames": _encoded(RGB, "WEBP", lossless=True, **FIRST_OF_TWO),
    "two frames of a GIF": _encoded(RGB.convert("P"), "GIF", **FIRST_OF_TWO),
    "two pictures of a camera": _encoded(RGB, "MPO", quality=95, **FIRST_OF_TWO),
    "one bit": _encoded(RGB.convert("1"), "PNG"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(kind):
    """Of several frames the first; the pixels are those of the picture."""
    pixels, mended = to_pixels(KINDS[kind], 20)
    wanted = RGB.convert("1") if kind == "one bit" else RGB
    error = np.abs(pixels.astype(float) - to_pixels(_encoded(wanted), 20)[0]).mean()
    assert error < 12 and not mended


def _chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")


GREY16 = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
HUGE = _chunk(b"IHDR", (20_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
UNREADABLE = {
    "text": (b"no image", "not an image in a format that PIL knows"),
    "nothing": (b"", "not an image in a format that PIL knows"),
    "cut off": (picture(0, (99, 99))[:900], "truncated"),
    "JPEG cut off": (picture(0, (99, 99), "JPEG")[:-400], "truncated"),
    "16 bits": (_encoded(GREY16), "more than 8 bits"),
    "floats": (_encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "more than 8 bits"),
    "bomb": (b"\x89PNG\r\n\x1a\n" + HUGE + _chunk(b"IDAT", b"") + _chunk(b"IEND", b""), "decompression bomb"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n", "is a program"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_images(tmp_path, case):
    content, says = UNREADABLE[case]
    files = {**folder_layout(), "train/cat/1\n.png": content}
    message = refused(rf"train/cat/1\\n\.png: unreadable image \(.*{says}", _load, files, tmp_path)
    assert message.endswith("set skip_unreadable=true to leave such files out") and "0x" not in message
    assert len(_load(files, tmp_path, skip_unreadable=True)[0]) == 6
    for size in (0, 5000, 32.0):
        refused("image_size", _load, folder_layout(), tmp_path, image_size=size)


# --- layouts


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_optional_val_that_may_lack_a_class_and_deeper_folders(tmp_path, name):
    files = {**folder_layout(), f"{name}/dog/0.png": picture(50), "train/dog/more/5.png": picture(51)}
    val, train = _load(files, tmp_path, splits=("val", "train"))
    assert val.labels.tolist() == [1] and val.classes == ("cat", "dog") and val.name == "folder-val"
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert _load(files, tmp_path, splits=("train",))[0].fingerprint == train.fingerprint


LAYOUT, ONE = folder_layout(), picture(1)
TRAIN, TEST = ({name: LAYOUT[name] for name in LAYOUT if name.startswith(split)} for split in ("train", "test"))
BAD_LAYOUTS = {
    "no folder test/": TRAIN,
    "no folder train/": TEST,
    "eval_split=val evaluates on its valid/": TRAIN | {"valid/cat/1.png": ONE},
    "holds no train/<class>/ folders with images; at its top: 1 (Train)": {"Train/cat/1.png": ONE},
    "train/ holds no <class>/ folders": {"train/1.png": ONE, "test/1.png": ONE},
    "class emu is in test/ but not in train/": LAYOUT | {"test/emu/1.png": ONE},
    "but not in train/, which has cat": LAYOUT | {"test/Cat/1.png": ONE},
    "several data sets inside (a, b)": {"a/train/x/1.png": ONE, "b/train/x/1.png": ONE},
    "train/emu: class folder without images": LAYOUT | {"train/emu/.hidden": b""},
    "train/pets/ holds no images but folders": {f"{s}/pets/{c}/1.png": ONE for s in ("train", "test") for c in "ab"},
    "test/cat/0.png: unreadable image": LAYOUT | {"test/cat/0.png": b""},
}


@pytest.mark.parametrize("says", BAD_LAYOUTS)
@pytest.mark.parametrize("write", [write_folder, write_zip, write_tar])
def test_bad_layout(tmp_path, says, write):
    path = write(tmp_path / "bad", BAD_LAYOUTS[says])
    message = refused("", _load, path, tmp_path / "root")
    assert message.startswith(str(path)) and says in message
    # A wrong layout is found before anything is decoded, and nothing half-built stays.
    built = [p.name.split("-")[1] for p in tmp_path.glob("root/cache/*") if p.is_dir()]
    assert built == ["train"] * ("unreadable" in says)


def test_skip_unreadable(tmp_path, capsys):
    files = folder_layout(train=4)
    bad = {"train/cat/1.png": b"no image", "train/dog/2.png": files["train/dog/2.png"][:60]}
    for _ in range(2):  # built, and from the cache: says so again
        train, _ = _load({**files, **bad}, tmp_path, skip_unreadable=True)
        assert "folder-train: 2 unreadable files left out" in capsys.readouterr().err
    refused(r"train/cat/1\.png: unreadable image", _load, {**files, **bad}, tmp_path)  # and the cache hides nothing
    clean, _ = _load({name: content for name, content in files.items() if name not in bad}, tmp_path)
    np.testing.assert_array_equal(train.images, clean.images)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and train.fingerprint == clean.fingerprint
    files["train/emu/1.png"] = b"?"
    refused("class emu has no readable image", _load, files, tmp_path, skip_unreadable=True)


def test_what_is_left_out_is_counted_aloud(tmp_path, capsys):
    """Strays, notes, what a NAS writes and a link to the folder above change neither images nor labels."""
    plain = _load(write_folder(tmp_path / "plain", folder_layout()), tmp_path)
    files = {**folder_layout(), "train/stray.png": picture(1), "train/cat/a\n.txt": b"?", "train/labels.csv": b"?"}
    files |= {"train/cat/@eaDir/0.png/SYNOPHOTO.jpg": picture(2), "train/@eaDir/x.jpg": picture(3)}
    files |= {"train/@tmp/x.jpg": picture(2), "train/cat/Icon\r": b"", "train/dog/README": b"?", "README": b"?"}
    folder = write_folder(tmp_path / "x", files)
    (folder / "train/cat/loop").symlink_to("..")
    os.mkfifo(folder / "train/cat/pipe.png")
    (folder / "train/cat/to the pipe.png").symlink_to("pipe.png")
    for _ in range(2):  # built, and from the cache: says so again
        capsys.readouterr()
        assert [part.fingerprint for part in _load(folder, tmp_path)] == [part.fingerprint for part in plain]
        (said,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
        assert "of no class: 2 (train/labels.csv, train/stray.png)" in said
        assert r"not an image: 2 (train/cat/a\n.txt, train/dog/README)" in said


def test_classes_that_differ_in_case_are_told(tmp_path, capsys):
    train, _ = _load({**folder_layout(), "train/Dog/1.png": picture(3)}, tmp_path)
    assert train.classes == ("Dog", "cat", "dog")
    assert "two classes differ only in case: Dog and dog; are they one?" in capsys.readouterr().err


def test_names_in_other_spellings(tmp_path, capsys):
    """A Mac writes ä as a and two dots; a name need not be Unicode, nor fit on a line."""
    files = {f"{split}/{name}/1.png": picture(1) for split, name in (("train", "k\u00e4fer"), ("test", "ka\u0308fer"))}
    files |= {"train/\udcff\n/b.png": picture(2), "train/\udcff\n/\udcfd.png": b"no"}
    for write in (write_folder, write_tar):
        found = [_load(write(tmp_path / write.__name__, files), tmp_path, skip_unreadable=True) for _ in range(2)]
        for train, test in found:
            assert train.classes == test.classes == ("k\u00e4fer", "\udcff\n") and len(train) == 2
        assert r"train/\udcff\n/\udcfd.png: unreadable" in capsys.readouterr().err
    save_json(list(train.classes), tmp_path / "classes.json")
    assert load_json(tmp_path / "classes.json") == list(train.classes)


# --- what the system refuses


def test_what_cannot_be_read_is_no_broken_image(open_path):
    """It belongs to the images once it can be read."""
    folder = write_folder(open_path / "x", folder_layout())
    secret, listing = folder / "train/cat/0.png", folder / "train/cat"

    def load_it():
        return [len(part) for part in _load(folder, open_path, skip_unreadable=True)] == [6, 4]

    secret.chmod(0)
    as_nobody(lambda: refused(r"train/cat/0\.png: cannot be read \(Permission denied\)", load_it) and None)
    secret.chmod(0o644)
    as_nobody(load_it)
    listing.chmod(0)
    as_nobody(lambda: refused(r"cat: cannot be listed \(Permission denied\)", load_it) and None)
    listing.chmod(0o755)


# --- the cache


def _cache_folder(root, split="train"):
    (folder,) = (root / "cache").glob(f"folder-{split}-*")
    return folder


def _flip(path):
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def _meta(**changes):
    return "meta.json", lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "images truncated": ("images.bin", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    "a bit of the images": ("images.bin", _flip),
    "fewer labels": _meta(labels=[0, 1]),
    "other labels": _meta(labels=[0] * 6),
    "meta truncated": ("meta.json", lambda path: path.write_text(path.read_text()[:40])),
    "meta without a field": ("meta.json", lambda path: path.write_text("{}")),
    "meta of other data": _meta(key="?"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_cache_is_built_again_and_a_whole_one_is_not(tmp_path, monkeypatch, case, capsys):
    first, _ = _load(folder_layout(), tmp_path)
    pixels = np.array(first.images)
    file, damage = DAMAGE[case]
    damage(_cache_folder(tmp_path) / file)
    for damaged in (True, False):
        capsys.readouterr()
        again, _ = _load(tmp_path / "x.zip", tmp_path)
        assert ("damaged cache" in capsys.readouterr().err) == damaged
        np.testing.assert_array_equal(again.images, pixels)
        assert (again.fingerprint, again.classes) == (first.fingerprint, first.classes)
        monkeypatch.setattr(arrays, "to_pixels", lambda *_: pytest.fail("decoded again"))


def test_disk_full(tmp_path):
    """And a folder that cannot be one."""
    (root := tmp_path / "root").write_text("a file where the folder should be")
    path = write_zip(tmp_path / "x.zip", folder_layout(train=10))
    refused(str(root), _load, path, root)
    with disk_full(50_000):
        refused(r"cannot write the image cache \(File too large\)", _load, path, tmp_path, image_size=64)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


@pytest.mark.parametrize("root_is", ["read-only", "with a cache of another user", "read-only with a cache for all"])
def test_a_cache_that_is_not_ours(open_path, capsys, root_is):
    path, root = write_zip(open_path / "x.zip", folder_layout()), open_path / "root"
    root.mkdir()
    wanted = _load(path, open_path if root_is == "read-only" else root)[0]
    pixels = np.array(wanted.images)
    for place in [*root.rglob("*"), root]:
        place.chmod(0 if "another" in root_is and place != root else 0o555 if place.is_dir() else 0o444)

    def load_it():
        capsys.readouterr()
        found, _ = _load(path, root)
        np.testing.assert_array_equal(found.images, pixels)
        assert found.fingerprint == wanted.fingerprint
        said = "decoded for this run alone; a data root of your own keeps them" in capsys.readouterr().err
        assert said == ("for all" not in root_is)

    try:
        as_nobody(load_it)
    finally:
        for place in [root, *root.glob("cache"), *root.glob("cache/*")]:
            place.chmod(0o755)


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    first, _ = _load(folder_layout(), tmp_path)
    assert "no locks here" in capsys.readouterr().err
    assert _load(folder_layout(), tmp_path)[0].fingerprint == first.fingerprint
    assert isinstance(first.images, np.memmap)


def test_processes_that_start_at_once_build_once(tmp_path, capfd):
    files = {f"train/{c}/{i}.png": picture(i, (64, 64)) for c in "ab" for i in range(100)}
    path = write_zip(tmp_path / "x.zip", files)

    def work():
        (train,) = _load(path, tmp_path / "root", splits=("train",))
        return train.fingerprint, int(train.images.sum(dtype="int64"))

    found = in_children(work, 3)
    assert len(set(found)) == 1 and found[0].startswith("('")
    assert capfd.readouterr().err.count("200/200") == 1
    assert len([p for p in (tmp_path / "root" / "cache").iterdir() if p.is_dir()]) == 1


def test_what_a_killed_builder_leaves_is_no_cache(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.zip", folder_layout())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(arrays, "to_pixels", Mock(side_effect=KeyboardInterrupt))
        patch.setattr(shutil, "rmtree", lambda *_, **options: None)  # nobody cleans up
        _load(path, tmp_path, splits=("train",))
    assert [p.name for p in _cache_folder(tmp_path).iterdir()] == ["images.bin"]
    parts = [_load(path, root, splits=("train",))[0].images for root in (tmp_path, tmp_path / "fresh")]
    np.testing.assert_array_equal(*parts)
    assert len([*_cache_folder(tmp_path).iterdir()]) == 2
