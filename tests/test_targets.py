"""Target sets in miniature official layouts, and what is said when they are absent or damaged."""

import builtins
import gzip
import io
import sys

import numpy as np
import prepare_data
import pytest
import torchvision.datasets as tv
from image_files import (
    cifar_archive,
    cub_files,
    expect_counts,
    expected_pixels,
    md5,
    picture,
    refusal,
    refused,
    served,
    write_folder,
    write_tar,
)

from metaperturb.data import DATA_SETS, load, official
from metaperturb.data.batches import crop_padding

DEAD = "http://127.0.0.1:9/"  # nothing listens there


def _mat(**content) -> bytes:
    scipy_io = pytest.importorskip("scipy.io")
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, content)
    return buffer.getvalue()


def _refused(says, name, root, **options):
    return refused(says, load, name, data_root=root, **options)


def _check_images(arrays, contents, size=84):
    np.testing.assert_array_equal(arrays.images, np.stack([expected_pixels(content, size) for content in contents]))


def test_specs_are_those_of_the_paper():
    found = {
        name: (s.num_classes, s.images.get("train"), s.images.get("test"), s.image_size, crop_padding(s.image_size))
        for name, s in DATA_SETS.items()
    }
    assert found["stl10"] == (10, 5000, 8000, 96, 8)
    assert found["s_cifar100"] == (100, 5000, 10000, 32, 4)
    assert found["dogs"] == (120, 12000, 8580, 84, 8)
    assert found["cars"] == (196, 8144, 8041, 84, 8)
    assert found["aircraft"] == (100, 6667, 3333, 84, 8)
    assert found["cub"] == (200, 5994, 5794, 84, 8)
    assert found["small_svhn"] == (10, 5000, 26032, 32, 4)
    assert found["tiny_imagenet"] == (200, 100_000, 10_000, 32, 4)
    assert (crop_padding(32), crop_padding(33)) == (4, 8)


BAD_REQUESTS = [
    ("cubs", {}, r"unknown data set 'cubs'; known: stl10, .*folder"),
    ("cub", {"splits": ("train", "val")}, "cub: no split 'val'; it has train, test"),
    ("embedded_source", {}, "embedded_source: no split 'test'; it has train"),
    ("folder", {}, r"folder: needs the path of one folder or archive .*\(target_path or source_paths names it\)"),
    ("folder", {"paths": ["a", "b"]}, r"folder: needs the path of one folder or archive .*\(got 2\)"),
    ("embedded", {"paths": ["a"]}, r"embedded: its images are drawn, so it takes no path \(got a\)"),
    *((name, {"paths": ["typo"]}, f"{name}: typo: no such file") for name in ("cub", "dogs", "stl10", "s_cifar100")),
]


@pytest.mark.parametrize(("name", "options", "says"), BAD_REQUESTS)
def test_bad_requests(tmp_path, name, options, says):
    """Nothing is downloaded to a path that may be misspelt."""
    refused(says, load, name, data_root=tmp_path, **options)
    assert not [*tmp_path.iterdir()]


# --- CUB


@pytest.mark.parametrize("form", ["archive", "folder", "parent", "named"])
def test_cub(tmp_path, monkeypatch, form):
    expect_counts(monkeypatch, "cub", 3, 6, 6)
    files, path = cub_files(), None
    if form == "archive":
        archive = write_tar(tmp_path / "CUB_200_2011.tgz", files)
        monkeypatch.setattr(official, "CUB_MD5", md5(archive.read_bytes()))
    elif form == "named":
        path = write_tar(tmp_path / "birds.tgz", files)
    else:
        write_folder(tmp_path, files)
        path = tmp_path if form == "parent" else None
    paths = [path] if path else []
    train, test = load("cub", data_root=tmp_path, paths=paths, download=False)
    assert train.classes == ("001.Bird_0", "002.Bird_1", "003.Bird_2")
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    contents = [content for name, content in files.items() if name.endswith(".jpg")]
    _check_images(train, [contents[i] for i in (0, 1, 4, 5, 8, 9)])
    _check_images(test, [contents[i] for i in (2, 3, 6, 7, 10, 11)])
    assert load("cub", data_root=tmp_path, paths=paths)[0].fingerprint == train.fingerprint


def test_cub_counts_are_verified(tmp_path):
    path = write_tar(tmp_path / "birds.tgz", cub_files())
    _refused(
        r"birds\.tgz: expected 5994 train images of 200 classes for CUB-200-2011, found 6 of 3",
        "cub",
        tmp_path,
        paths=[path],
    )


BROKEN_CUB = {
    "image missing": ("images/001.Bird_0/b0.jpg", None, "b0.jpg is listed but missing"),
    "table missing": ("classes.txt", None, "classes.txt is missing"),
    "no split table": ("train_test_split.txt", None, "not CUB-200-2011"),
    "table broken": ("classes.txt", b"\xff\xfe nonsense", "classes.txt: not a table"),
    "table too short": ("image_class_labels.txt", b"1 1\n", "no entry '2' in one of its tables"),
}


@pytest.mark.parametrize("case", BROKEN_CUB)
def test_broken_cub(tmp_path, monkeypatch, case):
    expect_counts(monkeypatch, "cub", 3, 6, 6)
    name, content, says = BROKEN_CUB[case]
    files = cub_files()
    files[f"CUB_200_2011/{name}"] = content
    files = {name: content for name, content in files.items() if content is not None}
    message = refusal(load, "cub", data_root=tmp_path, paths=[write_tar(tmp_path / "x.tgz", files)])
    assert says in message and "x.tgz" in message


ABSENT = {
    "cub": (r"CUB_200_2011\.tgz from https", ("CUB_URL", "CUB_200_2011.tgz")),
    "dogs": (r"images\.tar from http://vision", ("DOGS_URL", "images.tar")),
    "aircraft": (r"fgvc-aircraft-2013b\.tar\.gz from https://www.robots", ("AIRCRAFT_URL", "fgvc.tgz")),
    "stl10": (r"stl10_binary\.tar\.gz from http", ("", "stl10_binary.tar.gz")),
    "tiny_imagenet": (r"tiny-imagenet-200\.zip from http", ("TINY_URL", "tiny-imagenet-200.zip")),
}


@pytest.mark.parametrize("name", ABSENT)
def test_absent(tmp_path, monkeypatch, name):
    says, (address, file) = ABSENT[name]
    _refused(f"no such file or folder; fetch {says}", name, tmp_path, download=False)
    monkeypatch.setattr(*(official, address) if address else (tv.STL10, "url"), DEAD + file * (name != "dogs"))
    message = _refused(rf"download from {DEAD}{file} failed; fetch \S+ by other means to", name, tmp_path)
    assert str(tmp_path) in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


# --- Dogs


def _dogs_files():
    names = [f"n0{c}-Dog_{c}/n0{c}_{i}.jpg" for c in (2, 1) for i in range(4)]
    images = {f"Images/{name}": picture(i, (60, 50), "JPEG") for i, name in enumerate(names)}
    lists = {}
    for split, numbers in (("train", (0, 1, 4, 5)), ("test", (2, 3, 6, 7))):
        file_list = np.array([[names[i]] for i in numbers], dtype=object)
        lists[f"{split}_list.mat"] = _mat(file_list=file_list, labels=np.array([[1 + i // 4] for i in numbers]))
    return images, lists


@pytest.mark.parametrize("form", ["archives", "extracted"])
def test_dogs(tmp_path, monkeypatch, form):
    expect_counts(monkeypatch, "dogs", 2, 4, 4)
    images, lists = _dogs_files()
    place = tmp_path / "stanford_dogs"
    place.mkdir()
    if form == "archives":
        write_tar(place / "images.tar", images)
        write_tar(place / "lists.tar", lists)
    else:
        write_folder(place, {**images, **lists})
    train, test = load("dogs", data_root=tmp_path, download=False)
    assert train.classes == ("n02-Dog_2", "n01-Dog_1")  # the order of the official labels
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1]
    contents = list(images.values())
    _check_images(train, [contents[i] for i in (0, 1, 4, 5)])
    _check_images(test, [contents[i] for i in (2, 3, 6, 7)])


def test_dogs_broken(tmp_path):
    images, lists = _dogs_files()
    (place := tmp_path / "stanford_dogs").mkdir()
    write_tar(place / "images.tar", images)
    write_tar(place / "lists.tar", {**lists, "train_list.mat": b"no mat file at all" * 50})
    _refused(r"lists\.tar: train_list\.mat: not a Stanford Dogs list", "dogs", tmp_path)


@pytest.mark.parametrize("name", ["dogs", "cars", "small_svhn"])
def test_without_scipy(tmp_path, monkeypatch, name):
    real = builtins.__import__

    def no_scipy(module, *args, **kwargs):
        if module.startswith("scipy"):
            raise ImportError(f"No module named {module!r}")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_scipy)
    _refused("-m pip install scipy", name, tmp_path)


# --- torchvision


def _cars_files():
    annotations, contents = {}, {}
    for split, numbers in (("train", range(4)), ("test", range(4, 7))):
        rows = np.zeros((1, len(numbers)), dtype=[("fname", object), ("class", object)])
        for column, i in enumerate(numbers):
            rows[0, column] = (f"{i:05}.jpg", 1 + i % 2)
            contents[f"cars_{split}/{i:05}.jpg"] = picture(i, (60, 50), "JPEG")
        annotations[split] = _mat(annotations=rows)
    return {
        **contents,
        "devkit/cars_train_annos.mat": annotations["train"],
        "cars_test_annos_withlabels.mat": annotations["test"],
        "devkit/cars_meta.mat": _mat(class_names=np.array(["Acura", "BMW"], dtype=object)[None]),
    }


def test_cars(tmp_path, monkeypatch):
    expect_counts(monkeypatch, "cars", 2, 4, 3)
    files = _cars_files()
    write_folder(tmp_path / "stanford_cars", files)
    train, test = load("cars", data_root=tmp_path)
    assert train.classes == ("Acura", "BMW")
    assert train.labels.tolist() == [0, 1, 0, 1] and test.labels.tolist() == [0, 1, 0]
    _check_images(train, [files[f"cars_train/{i:05}.jpg"] for i in range(4)])
    (tmp_path / "stanford_cars" / "cars_test_annos_withlabels.mat").unlink()
    message = _refused(r"cars_test_annos_withlabels\.mat missing; Stanford Cars can no longer", "cars", tmp_path)
    assert all(part in message for part in ("cars_train/", "cars_test/", "devkit/cars_meta.mat", str(tmp_path)))


def _aircraft_files():
    files = {f"data/images/{i:07}.jpg": picture(i, (60, 50), "JPEG") for i in range(6)}
    files["data/variants.txt"] = b"707-320\nF-16A/B\n"
    rows = [f"{i:07} {('707-320', 'F-16A/B')[i % 2]}" for i in range(6)]
    files["data/images_variant_trainval.txt"] = "\n".join(rows[:4]).encode()
    files["data/images_variant_test.txt"] = "\n".join(rows[4:]).encode()
    return {f"fgvc-aircraft-2013b/{name}": content for name, content in files.items()}


@pytest.mark.parametrize("form", ["extracted", "archive", "download"])
def test_aircraft(tmp_path, monkeypatch, form):
    expect_counts(monkeypatch, "aircraft", 2, 4, 2)
    files, root = _aircraft_files(), tmp_path / "root"
    root.mkdir()
    if form == "extracted":
        write_folder(root, files)
    else:
        archive = write_tar((tmp_path if form == "download" else root) / "fgvc-aircraft-2013b.tar.gz", files)
        monkeypatch.setattr(official, "AIRCRAFT_MD5", md5(archive.read_bytes()))
    with served(tmp_path) as (url, asked):
        monkeypatch.setattr(official, "AIRCRAFT_URL", f"{url}/fgvc-aircraft-2013b.tar.gz")
        train, test = load("aircraft", data_root=root, download=form == "download")
    assert bool(asked) == (form == "download")
    assert train.classes == ("707-320", "F-16A/B")
    assert train.labels.tolist() == [0, 1, 0, 1] and test.labels.tolist() == [0, 1]
    _check_images(test, [files[f"fgvc-aircraft-2013b/data/images/{i:07}.jpg"] for i in (4, 5)])
    assert not list(root.glob(".*.tmp")) and (form == "extracted" or archive.exists())
    (root / "fgvc-aircraft-2013b/data/images/0000001.jpg").unlink()
    _refused(r"0000001\.jpg is listed but missing", "aircraft", root)


def test_aircraft_cut_off(tmp_path, monkeypatch):
    archive = write_tar(tmp_path / "fgvc-aircraft-2013b.tar.gz", _aircraft_files())
    _refused(r"fgvc-aircraft-2013b\.tar\.gz: wrong MD5", "aircraft", tmp_path)
    archive.write_bytes(archive.read_bytes()[:3000])
    monkeypatch.setattr(official, "AIRCRAFT_MD5", md5(archive.read_bytes()))
    _refused("failed", "aircraft", tmp_path)
    assert archive.exists() and not (tmp_path / "fgvc-aircraft-2013b").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def _dtd_files():
    names = [f"{c}/{c}_{i}.jpg" for i in range(6) for c in ("banded", "woven")]
    files = {f"dtd/images/{name}": picture(i, (60, 50), "JPEG") for i, name in enumerate(names)}
    for split, part in (("train", names[:4]), ("val", names[4:8]), ("test", names[8:])):
        files[f"dtd/labels/{split}1.txt"] = "\n".join(part).encode()
    return files


@pytest.mark.parametrize("form", ["extracted", "archive"])
def test_dtd(tmp_path, monkeypatch, form):
    expect_counts(monkeypatch, "dtd", 2, 8, 4)
    files = _dtd_files()
    if form == "extracted":
        write_folder(tmp_path / "dtd", files)
    else:
        archive = write_tar(tmp_path / "dtd-r1.0.1.tar.gz", files)
        monkeypatch.setattr(tv.DTD, "_MD5", md5(archive.read_bytes()))
    train, test = load("dtd", data_root=tmp_path, download=False)
    assert train.classes == ("banded", "woven")
    assert train.labels.tolist() == [0, 1] * 4 and test.labels.tolist() == [0, 1] * 2
    _check_images(train, list(files.values())[:8])
    _check_images(test, list(files.values())[8:12])
    assert not list((tmp_path / "dtd").glob("*.tar.gz"))


def test_s_cifar100(tmp_path, monkeypatch):
    expect_counts(monkeypatch, "s_cifar100", 2, 100, 6, val=50)
    data = cifar_archive(tmp_path, monkeypatch)
    train, val, test = load("s_cifar100", data_root=tmp_path, splits=("train", "val", "test"))
    assert train.classes == ("apple", "bee") and test.labels.tolist() == [0, 1] * 3
    np.testing.assert_array_equal(test.images, data["test"])
    position = {image.tobytes(): i for i, image in enumerate(data["train"])}
    chosen = [[position[np.array(image).tobytes()] for image in arrays.images] for arrays in (train, val)]
    assert not set(chosen[0]) & set(chosen[1])
    for arrays, indices, count in ((train, chosen[0], 50), (val, chosen[1], 25)):
        assert arrays.labels.tolist() == [i % 2 for i in indices]
        assert np.bincount(arrays.labels).tolist() == [count, count]
    # The checksums say what the data is: once cached, the original is not needed.
    for file in (tmp_path / "cifar-100-python").iterdir():
        file.unlink()
    assert load("s_cifar100", data_root=tmp_path)[0].fingerprint == train.fingerprint
    _refused(r"cifar-100-python: incomplete or damaged; delete it", "s_cifar100", tmp_path, image_size=16)


def test_small_svhn(tmp_path, monkeypatch):
    expect_counts(monkeypatch, "small_svhn", 10, 5000, 20)
    rng = np.random.default_rng(0)
    data = {}
    for split, count in (("train", 5100), ("test", 20)):
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)  # 10 stands for the digit 0
        content = _mat(X=images, y=labels[:, None])
        data[split] = images.transpose(3, 2, 0, 1)
        (tmp_path / f"{split}_32x32.mat").write_bytes(content)
        monkeypatch.setitem(tv.SVHN.split_list, split, [DEAD, f"{split}_32x32.mat", md5(content)])
    train, test = load("small_svhn", data_root=tmp_path, download=False)
    assert np.bincount(train.labels).tolist() == [500] * 10
    np.testing.assert_array_equal(test.images, data["test"])
    assert test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2 and test.classes[0] == "0"


def test_stl10(tmp_path, monkeypatch):
    expect_counts(monkeypatch, "stl10", 2, 4, 2)
    rng = np.random.default_rng(0)
    files, data = {"class_names.txt": b"airplane\nbird\n", "unlabeled_X.bin": b""}, {}
    for split, count in (("train", 4), ("test", 2)):
        data[split] = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        files[f"{split}_X.bin"] = data[split].transpose(0, 1, 3, 2).tobytes()  # stored column by column
        files[f"{split}_y.bin"] = bytes(1 + i % 2 for i in range(count))
    write_folder(tmp_path / "stl10_binary", files)
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(tv.STL10, table, [[name, md5(files[name])] for name, _ in getattr(tv.STL10, table)])
    train, _ = load("stl10", data_root=tmp_path)
    assert train.classes == ("airplane", "bird") and train.labels.tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(train.images, data["train"])
    small, _ = load("stl10", data_root=tmp_path, image_size=32)
    assert small.images.shape == (4, 3, 32, 32)


def test_fashion_mnist(tmp_path, monkeypatch):
    expect_counts(monkeypatch, "fashion_mnist", 10, 6, 3)
    rng = np.random.default_rng(0)
    resources, data = [], {}
    for split, count in (("train", 6), ("t10k", 3)):
        data[split] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        labels = (0x801).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(range(count))
        for kind, content in (("images-idx3", header + data[split].tobytes()), ("labels-idx1", labels)):
            packed = gzip.compress(content)
            (tmp_path / f"{split}-{kind}-ubyte.gz").write_bytes(packed)
            resources.append((f"{split}-{kind}-ubyte.gz", md5(packed)))
    monkeypatch.setattr(tv.FashionMNIST, "resources", resources)
    train, test = load("fashion_mnist", data_root=tmp_path, download=False)
    assert train.images.shape == (6, 3, 32, 32) and test.labels.tolist() == [0, 1, 2]
    assert train.classes[0] == "T-shirt/top"
    np.testing.assert_array_equal(train.images[:, 0], train.images[:, 2])
    (tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte").write_bytes(b"cut off")
    _refused("FashionMNIST: incomplete or damaged", "fashion_mnist", tmp_path, image_size=28)


# --- preparing several, and what is drawn


def test_what_cannot_be_prepared_does_not_keep_the_others(tmp_path, monkeypatch, capsys):
    expect_counts(monkeypatch, "cub", 3, 6, 6)
    write_folder(tmp_path, cub_files())
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--data-root", str(tmp_path), "cars", "cub"])
    assert prepare_data.main() == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"cub-{split}: 6 images of 3 classes, 84×84" for split in ("train", "test")]
    assert said.err.splitlines()[-1] == "error: not prepared: cars (why: above)"
    assert any(line.startswith("cars: ") for line in said.err.splitlines())


def test_drawn_images(tmp_path):
    train, test = load("embedded", data_root=tmp_path, image_size=8)
    assert train.classes == test.classes and train.images.shape[1:] == (3, 8, 8)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int64
    again, _ = load("embedded", data_root=tmp_path, image_size=8)
    assert again.fingerprint == train.fingerprint != test.fingerprint
    (source,) = load("embedded_source", data_root=tmp_path, image_size=8, splits=("train",))
    assert source.image_size == 8 and len(source) == 4800
    assert not list(tmp_path.iterdir())
