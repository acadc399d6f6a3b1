"""Target sets in miniature official layouts, and what is said when they are absent or damaged."""

import dataclasses
import gzip
import io
import sys
import zlib

import numpy as np
import pytest
import torchvision.datasets as tv
from image_files import (
    cifar_archive,
    cub_files,
    expect_counts,
    expected_pixels,
    md5,
    picture,
    refused,
    write_folder,
    write_tar,
)

from metaperturb.data import DATA_SETS, load, official
from metaperturb.data.batches import crop_padding

DEAD = "http://127.0.0.1:9/"  # nothing listens there
BIRDS, CARS, DOGS, PLANES = "CUB_200_2011/", "stanford_cars/", "stanford_dogs/", "fgvc-aircraft-2013b/"


def _mat(**content) -> bytes:
    scipy_io = pytest.importorskip("scipy.io")
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, content)
    return buffer.getvalue()


def _refused(says, name, root, **options):
    return refused(says, load, name, data_root=root, **options)


PAPER = {  # classes, images to train on and to test on, pixels, border of the crop
    "stl10": (10, 5000, 8000, 96, 8),
    "s_cifar100": (100, 5000, 10000, 32, 4),
    "dogs": (120, 12000, 8580, 84, 8),
    "cars": (196, 8144, 8041, 84, 8),
    "aircraft": (100, 6667, 3333, 84, 8),
    "cub": (200, 5994, 5794, 84, 8),
    "small_svhn": (10, 5000, 26032, 32, 4),
    "tiny_imagenet": (200, 100_000, 10_000, 32, 4),
}


def test_specs_are_those_of_the_paper():
    for name, expected in PAPER.items():
        spec = DATA_SETS[name]
        size = spec.image_size, crop_padding(spec.image_size)
        assert (spec.num_classes, spec.images["train"], spec.images["test"], *size) == expected
    for name, of_each in (("s_cifar100", {"train": (50, 0), "val": (25, 50)}), ("small_svhn", {"train": (500, 0)})):
        assert official.OFFICIAL[name].few == of_each
        assert official.OFFICIAL[name].key("train").endswith(" choice 0")  # of another one, the cache would be another


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


# --- the official layouts


@dataclasses.dataclass
class Miniature:
    """What lies under the root, and what must be found: images, as files or pixels, and labels."""

    files: dict[str, bytes]
    classes: tuple[str, ...]
    train: list
    test: list
    labels: tuple[list[int], list[int]]
    packed: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)  # archive → where and how files begin
    place: str = ""  # what it is unpacked to


def _photographs(names) -> dict[str, bytes]:
    return {name: picture(i, (60, 50), "JPEG") for i, name in enumerate(names)}


def _cub():
    files = cub_files()
    photographs = [content for name, content in files.items() if name.endswith(".jpg")]
    train, test = ([photographs[i] for i in numbers] for numbers in ((0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11)))
    classes = ("001.Bird_0", "002.Bird_1", "003.Bird_2")
    packed = {"CUB_200_2011.tgz": ("", "")}
    return Miniature(files, classes, train, test, ([0, 0, 1, 1, 2, 2],) * 2, packed, "CUB_200_2011")


def _dogs():
    names = [f"n0{c}-Dog_{c}/n0{c}_{i}.jpg" for c in (2, 1) for i in range(4)]
    files, found = _photographs(f"Images/{name}" for name in names), []
    for split, numbers in (("train", (0, 1, 4, 5)), ("test", (2, 3, 6, 7))):
        found.append([files[f"Images/{names[i]}"] for i in numbers])
        file_list = np.array([[names[i]] for i in numbers], dtype=object)
        files[f"{split}_list.mat"] = _mat(file_list=file_list, labels=np.array([[1 + i // 4] for i in numbers]))
    classes = ("n02-Dog_2", "n01-Dog_1")  # the order of the official labels
    files = {f"{DOGS}{name}": content for name, content in files.items()}
    packed = {f"{DOGS}images.tar": (DOGS, "Images/"), f"{DOGS}lists.tar": (DOGS, "t")}
    return Miniature(files, classes, *found, ([0, 0, 1, 1],) * 2, packed)


def _cars():
    files = _photographs(f"cars_{'train' if i < 4 else 'test'}/{i:05}.jpg" for i in range(7))
    found = [list(files.values())[:4], list(files.values())[4:]]
    for table, numbers in (("devkit/cars_train_annos", range(4)), ("cars_test_annos_withlabels", range(4, 7))):
        rows = np.zeros((1, len(numbers)), dtype=[("fname", object), ("class", object)])
        rows[0] = [(f"{i:05}.jpg", 1 + i % 2) for i in numbers]
        files[f"{table}.mat"] = _mat(annotations=rows)
    files["devkit/cars_meta.mat"] = _mat(class_names=np.array(["Acura", "BMW"], dtype=object)[None])
    files = {f"{CARS}{name}": content for name, content in files.items()}
    return Miniature(files, ("Acura", "BMW"), *found, ([0, 1, 0, 1], [0, 1, 0]))


def _aircraft():
    files = _photographs(f"data/images/{i:07}.jpg" for i in range(6))
    found = [list(files.values())[:4], list(files.values())[4:]]
    classes = ("707-320", "F-16A/B")
    files["data/variants.txt"] = "\n".join(classes).encode()
    for part, numbers in (("trainval", range(4)), ("test", (4, 5))):
        rows = [f"{i:07} {classes[i % 2]}" for i in numbers]
        files[f"data/images_variant_{part}.txt"] = "\n".join(rows).encode()
    files = {f"{PLANES}{name}": content for name, content in files.items()}
    packed = {"fgvc-aircraft-2013b.tar.gz": ("", "")}
    return Miniature(files, classes, *found, ([0, 1, 0, 1], [0, 1]), packed, "fgvc-aircraft-2013b")


def _dtd():
    names = [f"{c}/{c}_{i}.jpg" for i in range(6) for c in ("banded", "woven")]
    files = _photographs(f"dtd/dtd/images/{name}" for name in names)
    found = [list(files.values())[:8], list(files.values())[8:]]
    for split, part in (("train", names[:4]), ("val", names[4:8]), ("test", names[8:])):
        files[f"dtd/dtd/labels/{split}1.txt"] = "\n".join(part).encode()
    packed = {"dtd-r1.0.1.tar.gz": ("dtd/", "")}
    return Miniature(files, ("banded", "woven"), *found, ([0, 1] * 4, [0, 1] * 2), packed, "dtd")


def _stl10():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 96, 96), dtype=np.uint8)
    files = {"class_names.txt": b"airplane\nbird\n", "unlabeled_X.bin": b""}
    for split, part in (("train", pixels[:4]), ("test", pixels[4:])):
        files[f"{split}_X.bin"] = part.transpose(0, 1, 3, 2).tobytes()  # stored column by column
        files[f"{split}_y.bin"] = bytes(1 + i % 2 for i in range(len(part)))
    files = {f"stl10_binary/{name}": content for name, content in files.items()}
    return Miniature(files, ("airplane", "bird"), pixels[:4], pixels[4:], ([0, 1] * 2, [0, 1]))


def _fashion_mnist():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    files = {}
    for split, part in (("train", pixels[:6]), ("t10k", pixels[6:])):
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, *part.shape))
        files[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(header + part.tobytes())
        labels = b"".join(n.to_bytes(4, "big") for n in (0x801, len(part))) + bytes(range(len(part)))
        files[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    rgb = np.repeat(pixels[:, None], 3, axis=1)
    return Miniature(files, tuple(tv.FashionMNIST.classes), rgb[:6], rgb[6:], ([*range(6)], [*range(3)]))


def _small_svhn():
    """One image of each digit, where 10 stands for the digit 0."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    files, labels = {}, np.arange(1, 11, dtype=np.uint8)
    for split, part in (("train", pixels[:10]), ("test", pixels[10:])):
        files[f"{split}_32x32.mat"] = _mat(X=part.transpose(2, 3, 1, 0), y=labels[:, None])
    return Miniature(files, tuple("0123456789"), pixels[:10], pixels[10:], ([*range(1, 10), 0],) * 2)


SETS = {"cub": _cub, "dogs": _dogs, "cars": _cars, "aircraft": _aircraft, "dtd": _dtd}
SETS |= {"stl10": _stl10, "fashion_mnist": _fashion_mnist, "small_svhn": _small_svhn}


def _lay_out(name, root, monkeypatch, packed=False, **changes) -> Miniature:
    """Write a miniature, with other files or without some, and expect its counts and checksums."""
    made = SETS[name]()
    files = {file: content for file, content in {**made.files, **changes}.items() if content is not None}
    expect_counts(monkeypatch, name, len(made.classes), len(made.train), len(made.test))
    for archive, (folder, begin) in made.packed.items() if packed else ():
        (root / archive).parent.mkdir(exist_ok=True)
        members = {file.removeprefix(folder): content for file, content in files.items()}
        write_tar(root / archive, {file: content for file, content in members.items() if file.startswith(begin)})
        if made.place:
            checksum = md5((root / archive).read_bytes())
            monkeypatch.setitem(official.FILES, made.place, {DEAD + archive: checksum})
    if not packed:
        write_folder(root, files)
    for module in ("stl10", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    if name == "small_svhn":
        few = dataclasses.replace(official.OFFICIAL[name], few={"train": (1, 0)})
        monkeypatch.setitem(official.OFFICIAL, name, few)
    if name == "fashion_mnist":
        checksums = {DEAD + file: md5(content) for file, content in files.items()}
        monkeypatch.setitem(official.FILES, "FashionMNIST", checksums)
    return made


def _check(made, parts, size):
    for part, wanted, labels in zip(parts, (made.train, made.test), made.labels, strict=True):
        assert part.classes == made.classes and part.labels.tolist() == labels
        pixels = [expected_pixels(image, size) if isinstance(image, bytes) else image for image in wanted]
        np.testing.assert_array_equal(part.images, np.stack(pixels))


FORMS = [*((name, False) for name in SETS), *((name, True) for name in ("cub", "dogs", "aircraft", "dtd"))]


@pytest.mark.parametrize(("name", "packed"), FORMS)
def test_official_layout(tmp_path, monkeypatch, name, packed):
    made = _lay_out(name, tmp_path, monkeypatch, packed)
    size = {"stl10": 96, "fashion_mnist": 28, "small_svhn": 32}.get(name, 84)
    parts = load(name, data_root=tmp_path, image_size=size, download=False)
    _check(made, parts, size)
    again = load(name, data_root=tmp_path, image_size=size, download=False)
    assert [part.fingerprint for part in again] == [part.fingerprint for part in parts]
    assert load(name, data_root=tmp_path, image_size=16)[0].images.shape[2:] == (16, 16)
    assert not packed or all((tmp_path / archive).exists() for archive in made.packed)
    assert not [*tmp_path.rglob(".*.tmp"), *(tmp_path / "dtd").rglob("*.gz")]


def test_cub_where_it_is_named_and_its_counts(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "birds.tgz", cub_files())
    says = r"birds\.tgz: expected 5994 train images of 200 classes for CUB-200-2011, found 6 of 3"
    _refused(says, "cub", tmp_path, paths=[path])
    made = _lay_out("cub", tmp_path, monkeypatch)
    for named in (tmp_path, path):
        _check(made, load("cub", data_root=tmp_path, paths=[named], image_size=84), 84)


BROKEN = [
    ("cub", f"{BIRDS}images/001.Bird_0/b0.jpg", None, "CUB_200_2011: images/001.Bird_0/b0.jpg is listed but missing"),
    ("cub", f"{BIRDS}classes.txt", None, "classes.txt is missing"),
    ("cub", f"{BIRDS}train_test_split.txt", None, "not CUB-200-2011"),
    ("cub", f"{BIRDS}classes.txt", b"\xff\xfe nonsense", r"its tables do not fit \(.*official"),
    ("cub", f"{BIRDS}image_class_labels.txt", b"1 1\n", r"its tables do not fit \(KeyError: 2"),
    ("aircraft", f"{PLANES}data/images/0000001.jpg", None, r"0000001\.jpg is listed but missing"),
    ("dogs", f"{DOGS}train_list.mat", b"no mat file" * 50, r"train_list\.mat: not a Stanford Dogs list"),
    *(
        ("cars", f"{CARS}{file}", None, r"Stanford Cars can no .* by hand cars_train/.* devkit/cars_meta\.mat")
        for file in ("cars_test_annos_withlabels.mat", "devkit/cars_meta.mat")
    ),
    ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte", b"cut off", "FashionMNIST: incomplete or damaged"),
]


@pytest.mark.parametrize(("name", "file", "content", "says"), BROKEN)
def test_broken(tmp_path, monkeypatch, name, file, content, says):
    _lay_out(name, tmp_path, monkeypatch, **{file: content})
    assert str(tmp_path) in _refused(says, name, tmp_path)


def test_an_archive_put_there_that_is_not_the_official_one_or_cut_off(tmp_path, monkeypatch):
    made = _lay_out("aircraft", tmp_path, monkeypatch, packed=True)
    archive = tmp_path / "fgvc-aircraft-2013b.tar.gz"
    archive.write_bytes(archive.read_bytes()[:3000])
    _refused(r"fgvc-aircraft-2013b\.tar\.gz: wrong MD5", "aircraft", tmp_path)
    monkeypatch.setitem(official.FILES, made.place, {DEAD + archive.name: md5(archive.read_bytes())})
    _refused("unpacking failed", "aircraft", tmp_path)
    assert archive.exists() and not (tmp_path / made.place).exists() and not list(tmp_path.glob(".*.tmp"))


ABSENT = {
    "cub": ("CUB_200_2011", r"CUB_200_2011\.tgz from https"),
    "dogs": ("images.tar", r"images\.tar from http://vision"),
    "fashion_mnist": ("FashionMNIST", r"train-images-idx3-ubyte\.gz, .*t10k-\S+ from http://\S+.com to"),
    "tiny_imagenet": ("tiny-imagenet-200.zip", r"tiny-imagenet-200\.zip from http"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_absent(tmp_path, monkeypatch, name):
    place, says = ABSENT[name]
    _refused(f"no such file or folder; fetch {says}", name, tmp_path, download=False)
    monkeypatch.setitem(official.FILES, place, {DEAD + place: "0" * 32})
    message = _refused(rf"download from {DEAD}{place} failed; fetch {place} by other means to", name, tmp_path)
    assert str(tmp_path) in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("name", ["dogs", "cars", "small_svhn"])
def test_without_scipy(tmp_path, monkeypatch, name):
    _lay_out(name, tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy.io", None)  # as if it were not installed
    _refused("reading its labels needs another package; .* -m pip install scipy", name, tmp_path)


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


def test_drawn_images(tmp_path):
    train, test = load("embedded", data_root=tmp_path, image_size=8)
    (source,) = load("embedded_source", data_root=tmp_path, image_size=8, splits=("train",))
    assert train.classes == test.classes and train.fingerprint != test.fingerprint
    parts = (source, 40, 120, 3183415865), (train, 16, 25, 2848607719), (test, 16, 63, 1047292338)
    for part, classes, of_each, crc in parts:  # as results have them
        assert part.labels.tolist() == [label for label in range(classes) for _ in range(of_each)]
        assert zlib.crc32(np.ascontiguousarray(part.images)) == crc and len({*part.classes}) == classes
    assert load("embedded", data_root=tmp_path, image_size=13)[0].images.shape == (400, 3, 13, 13)
    _refused("image_size is 7", "embedded", tmp_path, image_size=7)
    assert not list(tmp_path.iterdir())
