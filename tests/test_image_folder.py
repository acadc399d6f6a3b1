"""Image folders, and the cache of decoded images that all data sets share."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import expected_pixels, folder_layout, one_line, picture, write_folder, write_tar, write_zip
from PIL import Image, ImageOps

from metaperturb.data import load
from metaperturb.data.arrays import to_pixels
from metaperturb.errors import UserError


def _load(path, root, **options):
    return load("folder", paths=[path], data_root=root, **options)


@pytest.fixture
def open_path():
    """As tmp_path, but others may enter and write there."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def as_nobody(work) -> None:
    """Run `work` as a user who is neither root nor the owner of anything."""
    if os.geteuid() != 0:  # nor are we
        work()
        return
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            work()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        failure = pipe.read()
    os.waitpid(child, 0)
    assert not failure, failure


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


def test_arrays_are_mapped_and_read_only(tmp_path):
    train, _ = _load(write_folder(tmp_path / "x", folder_layout()), tmp_path)
    assert isinstance(train.images, np.memmap)
    for array in (train.images, train.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_same_fingerprint_in_every_form_and_place(tmp_path):
    files = folder_layout()
    enclosed = {f"my pets/{name}": content for name, content in files.items()}
    forms = [
        write_zip(tmp_path / "a.zip", files),
        write_zip(tmp_path / "b.zip", {**enclosed, "my pets/README.md": b"read", "__MACOSX/my pets/._x": b"?"}),
        write_tar(tmp_path / "c.tar", {f"./{name}": content for name, content in files.items()}),
        write_tar(tmp_path / "d.tgz", enclosed),
        write_folder(tmp_path / "e", files),
        write_folder(tmp_path / "f", enclosed),
    ]
    found = [_load(path, tmp_path / f"root{i}") for i, path in enumerate(forms)]
    assert len({pair[0].fingerprint for pair in found}) == 1
    assert len({pair[1].fingerprint for pair in found}) == 1
    assert found[0][0].fingerprint != found[0][1].fingerprint
    for pair in found[1:]:
        np.testing.assert_array_equal(pair[0].images, found[0][0].images)


def _fingerprint(files, mended=()):
    rows = ["folder", "train", "32", "cat", "dog"]
    for name in sorted(name for name in files if name.startswith("train/")):
        crc = f"{zlib.crc32(files[name]):08x}"
        rows.append(f"{int('dog' in name)}:{crc}{':mended' * (name in mended)}")
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def test_fingerprint_follows_the_content(tmp_path):
    """Of the files alone: two folders whose names, sizes and dates agree are still two data sets."""
    files = folder_layout()
    path = write_zip(tmp_path / "a.zip", files)
    train = _load(path, tmp_path)[0]
    rows = [
        f"{label}:{zlib.crc32(files[f'train/{c}/{i}.png']):08x}"
        for label, c in enumerate(train.classes)
        for i in range(3)
    ]
    text = "\n".join(["folder", "train", "32", "cat", "dog", *rows])
    assert train.fingerprint == hashlib.sha256(text.encode()).hexdigest()  # as results have it: it never changes
    assert _load(path, tmp_path, image_size=16)[0].fingerprint != train.fingerprint
    files["train/cat/0.png"] = picture(99)
    assert _load(write_zip(path, files), tmp_path)[0].fingerprint != train.fingerprint
    for write in (write_folder, write_tar):
        found = []
        for number in (1, 2):
            files = {name: picture(number + len(name), kind="BMP") for name in files}
            (path := tmp_path / f"{write.__name__}{number}").parent.mkdir(exist_ok=True)
            write(path, files)
            for file in [path, *path.rglob("*")]:
                os.utime(file, (0, 0))
            found.append(_load(path, tmp_path)[0])
        assert found[0].fingerprint != found[1].fingerprint and (found[0].images != found[1].images).any()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(kind, orientation):
    with Image.open(io.BytesIO(picture(3, (30, 20)))) as image:
        (exif := Image.Exif())[0x112] = orientation
        image.save(buffer := io.BytesIO(), kind, exif=exif)
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        upright = np.asarray(ImageOps.exif_transpose(image)).copy()
    pixels, mended = to_pixels(buffer.getvalue(), 30)
    np.testing.assert_array_equal(pixels, to_pixels(upright, 30)[0])
    assert mended == (kind == "JPEG" and orientation > 1)  # PIL itself turns TIFF


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_lie_on_white(mode):
    rng = np.random.default_rng(0)
    colour, alpha = rng.integers(0, 256, (8, 8, 3)), rng.integers(0, 256, (8, 8, 1))
    if mode == "LA":
        colour = colour[..., :1]
    image = Image.fromarray(np.concatenate([colour, alpha], -1).astype(np.uint8))
    options = {}
    if mode == "P":
        image, colour = Image.fromarray(rng.integers(0, 2, (8, 8), dtype=np.uint8), "P"), np.array([[9, 9, 9]] * 64)
        image.putpalette([200, 0, 0, 9, 9, 9])
        alpha, options = 255 * np.asarray(image)[..., None], {"transparency": 0}
        colour = colour.reshape(8, 8, 3)
    image.save(buffer := io.BytesIO(), "PNG", **options)
    expected = (colour * alpha + 255.0 * (255 - alpha)) / 255
    pixels, mended = to_pixels(buffer.getvalue(), 8)
    assert mended and np.abs(pixels.transpose(1, 2, 0) - expected).max() <= 1
    image = Image.fromarray(np.full((8, 8, 4), 255, np.uint8))  # has alpha, but hides nothing
    image.save(buffer := io.BytesIO(), "PNG")
    assert not to_pixels(buffer.getvalue(), 8)[1]


def test_mended_images_have_another_fingerprint(tmp_path):
    """The same files, read by a version that did not mend them, are other images."""
    files = folder_layout()
    with Image.open(io.BytesIO(files["train/cat/0.png"])) as image:
        image.putalpha(100)
        image.save(buffer := io.BytesIO(), "PNG")
    files["train/cat/0.png"] = buffer.getvalue()
    found = _load(write_folder(tmp_path / "x", files), tmp_path)[0].fingerprint
    assert found == _fingerprint(files, mended=["train/cat/0.png"])


def test_optional_val_deeper_folders_and_source(tmp_path):
    files = {**folder_layout(), "val/cat/0.png": picture(50), "train/dog/more/5.png": picture(51)}
    path = write_zip(tmp_path / "x.zip", files)
    val, train = _load(path, tmp_path, splits=("val", "train"))
    assert val.labels.tolist() == [0] and val.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    source = load("folder", paths=[path], data_root=tmp_path, splits=("train",))[0]
    assert source.fingerprint == train.fingerprint


def test_test_may_lack_a_class(tmp_path):
    files = folder_layout(classes=("ant", "bee", "cat"))
    files = {name: content for name, content in files.items() if not name.startswith("test/bee")}
    _, test = _load(write_zip(tmp_path / "x.zip", files), tmp_path)
    assert test.classes == ("ant", "bee", "cat") and set(test.labels.tolist()) == {0, 2}


def _without(files, prefix):
    return {name: content for name, content in files.items() if not name.startswith(prefix)}


BAD_LAYOUTS = {
    "no test": (_without(folder_layout(), "test/"), "no folder test/"),
    "no train": (_without(folder_layout(), "train/"), "no folder train/"),
    "foreign": ({"pictures/cat/1.png": picture(1)}, "holds no train/<class>/"),
    "flat": ({"train/1.png": picture(1), "test/1.png": picture(1)}, "train/ holds no <class>/ folders"),
    "unknown class": ({**folder_layout(), "test/emu/1.png": picture(1)}, "class emu is in test/ but not in train/"),
    "two sets": ({"a/train/x/1.png": picture(1), "b/train/x/1.png": picture(1)}, "several data sets inside (a, b)"),
    "no image": ({**folder_layout(), "train/cat/notes": b"my cats"}, "train/cat/notes: unreadable image"),
    "groups": (
        {f"{s}/pets/{c}/1.png": picture(1) for s in ("train", "test") for c in "ab"},
        "train/pets/ holds no images but folders",
    ),
    "only val": (
        {**_without(folder_layout(), "test/"), "val/cat/1.png": picture(1)},
        "eval_split=val evaluates on its val/",
    ),
    "cut off": ({**folder_layout(), "train/cat/0.png": picture(0, (99, 99))[:900]}, "train/cat/0.png: unreadable"),
    "empty file": ({**folder_layout(), "test/cat/0.png": b""}, "test/cat/0.png: unreadable image"),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
@pytest.mark.parametrize("form", ["folder", "zip", "tar"])
def test_bad_layout(tmp_path, case, form):
    files, says = BAD_LAYOUTS[case]
    write = {"folder": write_folder, "zip": write_zip, "tar": write_tar}[form]
    path = write(tmp_path / f"bad.{form}", files)
    with pytest.raises(UserError) as error:
        _load(path, tmp_path / "root")
    message = one_line(error)
    assert message.startswith(str(path)) and says in message and "0x" not in message
    if "unreadable" in says:
        assert "skip_unreadable=true" in message
    # Nothing half-built stays, and a wrong layout is found before anything is decoded.
    built = [p.name for p in tmp_path.glob("root/cache/*") if p.is_dir()]
    assert not [name for name in built if ".tmp-" in name] and (not built or case == "empty file")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_empty_class_folder(tmp_path, form):
    if form == "folder":
        path = write_folder(tmp_path / "x", folder_layout())
        (path / "train" / "emu").mkdir()
        (path / "train" / "emu" / ".hidden").write_bytes(b"")
    else:
        path = write_zip(tmp_path / "x.zip", {**folder_layout(), "train/emu/": b""})
    with pytest.raises(UserError, match="train/emu: class folder without images") as error:
        _load(path, tmp_path)
    one_line(error)


def test_skip_unreadable(tmp_path, capsys):
    files = folder_layout(train=4)
    bad = {"train/cat/1.png": b"no image", "train/dog/2.png": files["train/dog/2.png"][:60]}
    path = write_zip(tmp_path / "x.zip", {**files, **bad})
    train, _ = _load(path, tmp_path, skip_unreadable=True)
    names = sorted(name for name in files if name.startswith("train/") and name not in bad)
    np.testing.assert_array_equal(train.images, np.stack([expected_pixels(files[n], 32) for n in names]))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "folder-train: 2 unreadable files left out" in capsys.readouterr().err
    _load(path, tmp_path, skip_unreadable=True)  # from the cache: says so again
    assert "2 unreadable files left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"train/cat/1\.png: unreadable image"):  # and the cache hides nothing
        _load(path, tmp_path)
    clean = _load(write_zip(tmp_path / "y.zip", _minus(files, bad)), tmp_path)[0]
    assert clean.fingerprint == train.fingerprint


def _minus(files, names):
    return {name: content for name, content in files.items() if name not in names}


def test_class_whose_images_are_all_unreadable(tmp_path):
    files = {**folder_layout(), "train/emu/1.png": b"?"}
    with pytest.raises(UserError, match="class emu has no readable image") as error:
        _load(write_zip(tmp_path / "x.zip", files), tmp_path, skip_unreadable=True)
    one_line(error)


def test_postscript_is_not_run(tmp_path):
    """Under whatever name: PIL hands it to Ghostscript."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    path = write_zip(tmp_path / "x.zip", {**folder_layout(), "train/cat/1.png": program})
    with pytest.raises(UserError, match=r"train/cat/1\.png: unreadable image \(PostScript is a program") as error:
        _load(path, tmp_path)
    one_line(error)


def test_what_is_left_out_is_counted_aloud(tmp_path, capsys):
    """Strays, notes, what a NAS writes and a link to the folder above change neither images nor labels."""
    plain = _load(write_folder(tmp_path / "plain", folder_layout()), tmp_path)
    files = {**folder_layout(), "train/stray.png": picture(1), "train/cat/notes.txt": b"?", "train/labels.csv": b"?"}
    files |= {"train/cat/@eaDir/0.png/SYNOPHOTO.jpg": picture(2), "train/@eaDir/x.jpg": picture(3)}
    folder = write_folder(tmp_path / "x", files)
    (folder / "train/cat/loop").symlink_to("..")
    capsys.readouterr()
    found = _load(folder, tmp_path)
    assert [part.fingerprint for part in found] == [part.fingerprint for part in plain]
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    for part in (
        "of no class: 2 (train/labels.csv, train/stray.png)",
        "not an image: 1 (train/cat/notes.txt)",
        "hidden or of the system: 2 (train/@eaDir, train/cat/@eaDir)",
        "link to a folder above it: 1 (train/cat/loop)",
    ):
        assert part in said
    _load(folder, tmp_path)
    assert said in capsys.readouterr().err  # from the cache: says so again


def test_one_group_among_classes_is_told(tmp_path, capsys):
    files = {**folder_layout(), "train/more/emu/1.png": picture(1), "train/more/fox/1.png": picture(2)}
    train, _ = _load(write_folder(tmp_path / "x", files), tmp_path)
    assert train.classes == ("cat", "dog", "more")
    assert "taken for one class each, though they hold only folders: 1 (train/more/)" in capsys.readouterr().err


def test_names_written_by_a_mac(tmp_path):
    """It writes ä as a and two dots."""
    files = {f"{split}/{name}/1.png": picture(1) for split, name in (("train", "k\u00e4fer"), ("test", "ka\u0308fer"))}
    train, test = _load(write_folder(tmp_path / "x", files), tmp_path)
    assert train.classes == test.classes == ("k\u00e4fer",)


def test_a_passing_error_is_not_kept(open_path, capsys):
    """A file that cannot be read now belongs to the images once it can."""
    folder = write_folder(open_path / "x", folder_layout())
    secret = folder / "train/cat/0.png"
    secret.chmod(0)

    def without():
        with pytest.raises(UserError, match=r"train/cat/0\.png: cannot be read \(Permission denied\); repair"):
            _load(folder, open_path)
        capsys.readouterr()
        train, _ = _load(folder, open_path, skip_unreadable=True)
        assert len(train) == 5 and "1 files that cannot be read now left out" in capsys.readouterr().err

    as_nobody(without)
    secret.chmod(0o644)
    as_nobody(lambda: [len(part) for part in _load(folder, open_path, skip_unreadable=True)] == [6, 4] or 1 / 0)
    as_nobody(lambda: len(_load(folder, open_path)[0]) == 6 or 1 / 0)


def test_decompression_bomb_and_deep_pixels(tmp_path, monkeypatch):
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    deep.save(tmp_path / "deep.png")
    files = {**folder_layout(), "train/cat/1.png": (tmp_path / "deep.png").read_bytes()}
    with pytest.raises(UserError, match=r"train/cat/1\.png: unreadable image .*more than 8 bits") as error:
        _load(write_zip(tmp_path / "deep.zip", files), tmp_path)
    one_line(error)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = write_zip(tmp_path / "x.zip", {**folder_layout(), "train/cat/1.png": picture(1, (100, 100))})
    with pytest.raises(UserError, match=r"train/cat/1\.png: unreadable image .*decompression bomb") as error:
        _load(path, tmp_path)
    one_line(error)


def test_to_pixels_leaves_the_right_size_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found, mended = to_pixels(pixels, 32)
    np.testing.assert_array_equal(found, pixels.transpose(2, 0, 1))
    assert not mended


@pytest.mark.parametrize("size", [0, -3, 5000, 32.0])
def test_impossible_image_size(tmp_path, size):
    with pytest.raises(UserError, match="image_size") as error:
        _load(write_zip(tmp_path / "x.zip", folder_layout()), tmp_path, image_size=size)
    one_line(error)


# --- the cache


def _cache_folder(root, split="train"):
    (folder,) = (root / "cache").glob(f"folder-{split}-*")
    return folder


def test_second_load_decodes_nothing(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.zip", folder_layout())
    first, _ = _load(path, tmp_path)

    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("metaperturb.data.arrays.to_pixels", fail)
    again, _ = _load(path, tmp_path)
    assert again.fingerprint == first.fingerprint and again.classes == first.classes
    np.testing.assert_array_equal(again.images, first.images)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _reshape(path):
    np.save(path, np.zeros((2, 3, 32, 32), dtype=np.uint8))


DAMAGE = {
    "images missing": ("images.npy", Path.unlink),
    "images truncated": ("images.npy", _truncate),
    "images of other shape": ("images.npy", _reshape),
    "labels missing": ("labels.npy", Path.unlink),
    "labels empty": ("labels.npy", lambda path: path.write_bytes(b"")),
    "labels of other shape": ("labels.npy", _reshape),
    "meta missing": ("meta.json", Path.unlink),
    "meta truncated": ("meta.json", lambda path: path.write_text(path.read_text()[:40])),
    "meta without a field": ("meta.json", lambda path: path.write_text("{}")),
    "meta of other data": ("meta.json", lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "key": "?"}))),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_cache_is_built_again(tmp_path, case, capsys):
    path = write_zip(tmp_path / "x.zip", folder_layout())
    first, _ = _load(path, tmp_path)
    pixels = np.array(first.images)
    file, damage = DAMAGE[case]
    damage(_cache_folder(tmp_path) / file)
    capsys.readouterr()
    again, _ = _load(path, tmp_path)
    assert "damaged cache" in capsys.readouterr().err
    np.testing.assert_array_equal(again.images, pixels)
    assert again.fingerprint == first.fingerprint
    _load(path, tmp_path)
    assert "damaged" not in capsys.readouterr().err


def test_disk_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot write the image cache: the disk is full") as error:
        _load(write_zip(tmp_path / "x.zip", folder_layout()), tmp_path)
    one_line(error)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_file_size_limit(tmp_path):
    """A real refusal by the kernel, in the middle of claiming the space."""
    files = {f"train/a/{i}.png": picture(i) for i in range(30)}
    path = write_zip(tmp_path / "x.zip", files)
    script = f"""
import resource
from metaperturb.data import load
from metaperturb.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    load("folder", paths=[{str(path)!r}], data_root={str(tmp_path)!r}, image_size=64, splits=("train",))
except UserError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "refused:" in done.stdout and "cannot write the image cache" in done.stdout


def test_no_folder_for_the_cache(tmp_path):
    (root := tmp_path / "root").write_text("a file where the folder should be")
    with pytest.raises(UserError) as error:
        _load(write_zip(tmp_path / "x.zip", folder_layout()), root)
    assert str(root) in one_line(error)


@pytest.mark.parametrize("root_is", ["read-only", "with a cache of another user"])
def test_a_cache_that_is_not_ours_is_done_without(open_path, capsys, root_is):
    path, root = write_zip(open_path / "x.zip", folder_layout()), open_path / "root"
    root.mkdir()
    wanted = _load(path, root if "cache" in root_is else open_path)[0]
    pixels = np.array(wanted.images)
    for place in [root, *root.rglob("*")]:
        place.chmod(0o555 if place == root and "cache" not in root_is else 0o755 if place == root else 0)

    def load_it():
        capsys.readouterr()
        found, _ = _load(path, root)
        np.testing.assert_array_equal(found.images, pixels)
        assert found.fingerprint == wanted.fingerprint
        assert "decoded for this run alone; a data root of your own keeps them" in capsys.readouterr().err

    try:
        as_nobody(load_it)
    finally:
        for place in [root, *root.glob("cache"), *root.glob("cache/*")]:
            place.chmod(0o755)


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    path = write_zip(tmp_path / "x.zip", folder_layout())
    first, _ = _load(path, tmp_path)
    assert "no locks here" in capsys.readouterr().err
    assert _load(path, tmp_path)[0].fingerprint == first.fingerprint and isinstance(first.images, np.memmap)


def test_read_only_cache_that_is_built_can_be_used(tmp_path):
    path = write_zip(tmp_path / "x.zip", folder_layout())
    first, _ = _load(path, tmp_path)
    for file in (tmp_path / "cache").rglob("*"):
        file.chmod(0o500 if file.is_dir() else 0o400)
    (tmp_path / "cache").chmod(0o500)
    try:
        assert _load(path, tmp_path)[0].fingerprint == first.fingerprint
    finally:
        for file in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
            file.chmod(0o700)


def test_processes_that_start_at_once_build_once(tmp_path):
    files = {f"train/{c}/{i}.png": picture(i, (64, 64)) for c in "ab" for i in range(150)}
    path = write_zip(tmp_path / "x.zip", files)
    script = f"""
import sys, time
from pathlib import Path
from metaperturb.data import load
print("ready", flush=True)
sys.stdin.readline()
train, = load("folder", paths=[{str(path)!r}], data_root={str(tmp_path / "root")!r}, splits=("train",))
print(train.fingerprint, int(train.images.sum(dtype="int64")))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len({out for out, _ in outputs}) == 1
    assert sum("images in" in err for _, err in outputs) == 1
    assert len([p for p in (tmp_path / "root" / "cache").iterdir() if p.is_dir()]) == 1


def test_killed_builder_leaves_no_cache_and_its_rest_is_removed(tmp_path):
    path = write_zip(tmp_path / "x.zip", folder_layout(train=40))
    root = tmp_path / "root"
    script = f"""
import time
from metaperturb.data import arrays, load
real, count = arrays.to_pixels, 0
def slow(*args):
    global count
    count += 1
    if count == 20:
        print("half-way", flush=True)
        time.sleep(600)
    return real(*args)
arrays.to_pixels = slow
load("folder", paths=[{str(path)!r}], data_root={str(root)!r}, splits=("train",))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half-way\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    folders = [p.name for p in (root / "cache").iterdir() if p.is_dir()]
    assert len(folders) == 1 and ".tmp-" in folders[0]
    start = time.monotonic()
    (train,) = load("folder", paths=[path], data_root=root, splits=("train",))
    assert time.monotonic() - start < 20  # the dead builder's lock is gone
    (fresh,) = load("folder", paths=[path], data_root=tmp_path / "fresh", splits=("train",))
    np.testing.assert_array_equal(train.images, fresh.images)
    assert [p for p in (root / "cache").iterdir() if p.is_dir()] == [_cache_folder(root)]
