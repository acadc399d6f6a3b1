"""The published data sets, in their official layouts: how they are fetched, and which images and labels they have.

torchvision fetches, unpacks and reads what it knows. CUB, Stanford Dogs and Tiny ImageNet are read here.
"""

import contextlib
import io
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets as tv
from torchvision.datasets.utils import check_integrity, download_and_extract_archive, download_url

from metaperturb.data.arrays import Plan, Sample, plan_from_samples
from metaperturb.data.disk import disk_errors, file_lock
from metaperturb.data.files import Place
from metaperturb.data.splits import CHOICE_SEED, few_per_class
from metaperturb.errors import UserError
from metaperturb.storage import reason

TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
DOGS_URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
DOGS_MD5 = {"images.tar": "1bb1f2a596ae7057f99d7d75860002ef", "lists.tar": "edbb9f16854ec66506b5f09b583e0656"}
AIRCRAFT_URL = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
AIRCRAFT_MD5 = "d4acdd33327262359767eeaa97a4f732"
DTD_URL = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"
_DAMAGED = "incomplete or damaged; delete it and start again"
TIMEOUT = 60  # seconds; torchvision sets none and would wait for ever


@dataclass(frozen=True)
class Official:
    """How a published set is had.

    Attributes:
        plan: the images of a split: of (the places of `find`, split) or, without `find`, of (root, download, split).
        find: of (root, download): where its files are, fetching what is absent.
        key: without `find`: official checksum of the images of a split.
        home: folder under the data root that is its root, where no other is named.
        itself: what is named is the archive or folder (for several, all of them), not a root that holds it.
    """

    plan: Callable[..., Plan]
    find: Callable[[Path, bool], list[Path]] | None = None
    key: Callable[[str], str] | None = None
    home: str = ""
    itself: bool = False


# --- Fetching -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _torchvision_errors(place: Path, advice: str) -> Iterator[None]:
    """torchvision's many errors on absent, damaged or unreachable data as one line."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # URLError, RuntimeError, EOFError, AssertionError, scipy's own: there is no end of them
        raise UserError(f"{place}: {advice} ({reason(error)})") from error


def _fetched(
    place: Path, url: str, fetch: bool, make: Callable[[Path], Any], offers: dict[str, tuple[str, str | None]]
) -> Path:
    """See to it that the file or folder `place` is there and whole; several processes may ask at once.

    torchvision writes in place, and takes half a folder left by an interrupted run for the data set. So it works in
    a temporary folder, from which the result takes its place when all is done.

    Args:
        place: what the download yields.
        url: for error messages.
        fetch: download what is absent.
        make: downloads and unpacks in the folder that it is given.
        offers: of files that the user may have put beside `place` by hand: {name: (where torchvision looks for it, MD5
            or None)}.
    """
    root = place.parent
    if place.exists():
        return place
    with file_lock(root / f".{place.name}.lock"):
        if place.exists():
            return place
        offered = [name for name in offers if (root / name).is_file()]
        needed = ", ".join(offers) or place.name
        if not fetch and (not offers or len(offered) < len(offers)):
            raise UserError(
                f"{place}: no such file or folder; fetch {needed} from {url} to {root}/ or allow the download"
            )
        temporary, old_timeout = root / f".{place.name}.tmp", socket.getdefaulttimeout()
        try:
            with disk_errors(root, "store the data set"):
                shutil.rmtree(temporary, ignore_errors=True)  # of a killed run: this process holds the lock
                temporary.mkdir(parents=True)
                for name in offered:
                    inner, md5 = offers[name]
                    if not check_integrity(root / name, md5):
                        raise UserError(
                            f"{root / name}: wrong MD5, expected {md5}; delete it or fetch it again from {url}"
                        )
                    (temporary / inner).parent.mkdir(parents=True, exist_ok=True)
                    (temporary / inner).symlink_to((root / name).resolve())
                socket.setdefaulttimeout(TIMEOUT)
                what = "unpacking" if offered else f"download from {url}"
                advice = f"{what} failed; fetch {needed} by other means to {root}/"
                quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
                if not offered:
                    print(f"{place}: download from {url}", file=sys.stderr)
                with _torchvision_errors(place, advice), quiet:  # its bar fills a log file
                    make(temporary)
                (temporary / place.name).rename(place)
        finally:
            socket.setdefaulttimeout(old_timeout)
            shutil.rmtree(temporary, ignore_errors=True)
    return place


def _downloaded(place: Path, url: str, md5: str, fetch: bool) -> Path:
    return _fetched(place, url, fetch, lambda folder: download_url(url, folder, place.name, md5), {})


def _unpacked(name: str, url: str, md5: str, root: Path, fetch: bool, inner: str = "") -> Path:
    """The folder `root / name` that an archive holds; `inner`: where torchvision unpacks it."""
    file = url.rsplit("/", 1)[-1]

    def make(folder: Path) -> None:
        download_and_extract_archive(url, folder / inner, filename=file, md5=md5)
        (folder / inner / file).unlink()

    return _fetched(root / name, url, fetch, make, {file: (f"{inner}{file}", md5)})


def _loadmat(title: str) -> Callable[..., dict[str, Any]]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"{title}: its labels are MATLAB files; {sys.executable} -m pip install scipy reads them"
        ) from error
    return loadmat


# --- Decoded pixels, by torchvision -------------------------------------------------------------------------


def _pixels(where: Path, data: Any, labels: Any, classes: Sequence[str], chosen: np.ndarray | None = None) -> Plan:
    """Some images of a torchvision data set, all by default; it returns each as a PIL image."""
    labels = np.asarray(labels)
    chosen = np.arange(len(labels)) if chosen is None else chosen
    return Plan(
        where=str(where),
        classes=classes,
        labels=labels[chosen].tolist(),
        names=[f"{where}: image {i}" for i in chosen],
        read=lambda i: np.asarray(data[chosen[i]][0]),
    )


def _stl10(root: Path, fetch: bool, split: str) -> Plan:
    folder = _unpacked(tv.STL10.base_folder, tv.STL10.url, tv.STL10.tgz_md5, root, fetch)
    with _torchvision_errors(folder, _DAMAGED):
        data = tv.STL10(root, split=split)
    return _pixels(folder, data, data.labels, data.classes)


def _cifar100(root: Path, fetch: bool, split: str, few: tuple[int, int] | None = None) -> Plan:
    """All images, or of each class a few: how many, after how many of its fixed order."""
    folder = _unpacked(tv.CIFAR100.base_folder, tv.CIFAR100.url, tv.CIFAR100.tgz_md5, root, fetch)
    with _torchvision_errors(folder, _DAMAGED):
        data = tv.CIFAR100(root, train=split != "test")
    chosen = few and few_per_class(np.asarray(data.targets), *few)
    return _pixels(folder, data, data.targets, data.classes, chosen)


def _s_cifar100(root: Path, fetch: bool, split: str) -> Plan:
    """50 training images a class; 25 others a class to validate on."""
    return _cifar100(root, fetch, split, {"train": (50, 0), "val": (25, 50)}.get(split))


def _small_svhn(root: Path, fetch: bool, split: str) -> Plan:
    """500 training images a class."""
    url, file, md5 = tv.SVHN.split_list[split]
    _loadmat("SVHN")
    place = _downloaded(root / file, url, md5, fetch)
    with _torchvision_errors(place, _DAMAGED):
        data = tv.SVHN(root, split=split)
    chosen = few_per_class(data.labels, 500) if split == "train" else None
    return _pixels(place, data, data.labels, [str(digit) for digit in range(10)], chosen)


def _fashion_mnist(root: Path, fetch: bool, split: str) -> Plan:
    kind = tv.FashionMNIST
    offers = {file: (f"FashionMNIST/raw/{file}", md5) for file, md5 in kind.resources}
    folder = _fetched(root / "FashionMNIST", kind.mirrors[0], fetch, lambda r: kind(r, download=True), offers)
    with _torchvision_errors(folder, _DAMAGED):
        data = kind(root, train=split == "train")
    return _pixels(folder, data, data.targets, kind.classes)


# --- Image files --------------------------------------------------------------------------------------------


def _listed(place: Place, rows: Iterable[tuple[str, str]], classes: Sequence[str]) -> Plan:
    """A plan for (member, class name) rows that an official list names."""
    samples = [Sample(place, member, class_name) for member, class_name in rows]
    for sample in samples:
        if sample.member not in place.files:
            raise UserError(f"{place.path}: {sample.member} is listed but missing; delete this and fetch it again")
    return plan_from_samples(samples, classes)


def _of_torchvision(place: Place, parts: Callable[[], list[Any]]) -> Plan:
    """A plan for torchvision data sets of files, made with `loader=str` so that they yield (path, label)."""
    with _torchvision_errors(place.path, _DAMAGED):
        found = parts()
        rows = [part[i] for part in found for i in range(len(part))]
    classes = found[0].classes
    members = [(Path(file).relative_to(place.path).as_posix(), classes[label]) for file, label in rows]
    return _listed(place, members, classes)


def _aircraft(places: list[Place], split: str) -> Plan:
    """The variants; of the images, the whole: their bottom 20 rows name the photographer, as in torchvision."""
    part, root = "trainval" if split == "train" else "test", places[0].path.parent
    return _of_torchvision(places[0], lambda: [tv.FGVCAircraft(root, split=part, loader=str)])


def _dtd(places: list[Place], split: str) -> Plan:
    """Partition 1 of 10; its train and val parts together are the training set."""
    parts, root = ("train", "val") if split == "train" else ("test",), places[0].path.parent
    return _of_torchvision(places[0], lambda: [tv.DTD(root, split=part, loader=str) for part in parts])


def _find_cars(root: Path, fetch: bool) -> list[Path]:
    """Only by hand: the official site is gone."""
    _loadmat("Stanford Cars")
    folder = root / "stanford_cars"
    files = ["cars_train", "cars_test", "devkit/cars_train_annos.mat", "devkit/cars_meta.mat"]
    files.append("cars_test_annos_withlabels.mat")
    if missing := [file for file in files if not (folder / file).exists()]:
        raise UserError(
            f"{folder}: {', '.join(missing)} missing; Stanford Cars can no longer be downloaded from its authors: "
            "put there by hand cars_train/*.jpg and cars_test/*.jpg (cars_train.tgz, cars_test.tgz), "
            "devkit/cars_train_annos.mat and devkit/cars_meta.mat (car_devkit.tgz), cars_test_annos_withlabels.mat"
        )
    return [folder]


def _cars(places: list[Place], split: str) -> Plan:
    root = places[0].path.parent
    return _of_torchvision(places[0], lambda: [tv.StanfordCars(root, split=split, loader=str)])


def _cub(places: list[Place], split: str) -> Plan:
    """images/, and text tables that give each image number a value."""
    (place,) = places
    root = place.root(("train_test_split.txt",))
    if root is None:
        raise UserError(f"{place.path}: not CUB-200-2011: no train_test_split.txt inside")

    def table(name: str) -> dict[str, str]:
        lines = place.read(f"{root}{name}").decode("utf-8", "replace").splitlines()
        rows = [line.split(maxsplit=1) for line in lines if line.strip()]
        if any(len(row) != 2 or not row[0].isdigit() for row in rows):
            raise UserError(f"{place.path}: {root}{name}: not a table of '<number> <value>' lines")
        return {number: value.strip() for number, value in rows}

    image, label = table("images.txt"), table("image_class_labels.txt")
    is_train, class_name = table("train_test_split.txt"), table("classes.txt")
    wanted = "1" if split == "train" else "0"
    try:
        numbers = [i for i in sorted(image, key=int) if is_train[i] == wanted]
        rows = [(f"{root}images/{image[i]}", class_name[label[i]]) for i in numbers]
    except KeyError as error:
        raise UserError(f"{place.path}: no entry {error} in one of its tables; is the archive official?") from error
    return _listed(place, rows, [class_name[i] for i in sorted(class_name, key=int)])


def _find_dogs(root: Path, fetch: bool) -> list[Path]:
    """images.tar and lists.tar, or the folder with what is in them: Images/<class>/*.jpg and *_list.mat."""
    _loadmat("Stanford Dogs")
    return [
        root
        if (root / unpacked).exists() and not (root / file).exists()
        else _downloaded(root / file, DOGS_URL + file, DOGS_MD5[file], fetch)
        for file, unpacked in (("images.tar", "Images"), ("lists.tar", "train_list.mat"))
    ]


def _dogs(places: list[Place], split: str) -> Plan:
    images, lists = places
    table = f"{split}_list.mat"
    content = lists.read(table)
    try:
        mat = _loadmat("Stanford Dogs")(io.BytesIO(content))
        files = [str(entry.item()) for entry in mat["file_list"].ravel()]
        labels = [int(label) - 1 for label in mat["labels"].ravel()]  # MATLAB counts from 1
    except Exception as error:  # scipy raises nearly anything on broken files
        raise UserError(f"{lists.path}: {table}: not a Stanford Dogs list ({reason(error)})") from error
    # "n02085620-Chihuahua/n02085620_10074.jpg": the folder is the class.
    name = {label: file.split("/")[0] for file, label in zip(files, labels, strict=True)}
    rows = [(f"Images/{file}", name[label]) for file, label in zip(files, labels, strict=True)]
    return _listed(images, rows, [name[label] for label in sorted(name)])


# --- Tiny ImageNet ------------------------------------------------------------------------------------------


def find_tiny_imagenet(root: Path, fetch: bool = True) -> list[Path]:
    """The official archive, downloaded (248 MB) if it is absent, or the folder unpacked from it."""
    folder, archive = root / "tiny-imagenet-200", root / "tiny-imagenet-200.zip"
    if not archive.exists() and folder.is_dir():
        return [folder]
    return [_downloaded(archive, TINY_URL, TINY_MD5, fetch)]


def _tiny_imagenet(places: list[Place], split: str) -> Plan:
    """The images of all places together, each once, by class (WordNet id), then by file name as plain text.

    train/<class>/images/*.JPEG; the validation images, of which val/val_annotations.txt gives the classes, are its
    test images, as the official ones have no public labels.
    """
    samples: list[Sample] = []
    rows: list[tuple[Place, str, int, list[str]]] = []  # of the validation images: where, and [file, wnid, …]
    classes: set[str] = set()
    for place in places:
        root = place.root(("train",)) or ""
        image = re.compile(rf"{re.escape(root)}train/([^/]+)/images/[^/]+")  # beside images/ lies <wnid>_boxes.txt
        found = [Sample(place, match[0], match[1]) for match in map(image.fullmatch, place.files) if match]
        if not found:
            raise UserError(f"{place.path}: not Tiny ImageNet: no tiny-imagenet-200/train/<class>/images/*.JPEG inside")
        samples += found
        classes |= {
            name.split("/")[-1] for name in place.folders if re.fullmatch(rf"{re.escape(root)}train/[^/]+", name)
        }
        if (table := f"{root}val/val_annotations.txt") in place.files:
            lines = place.read(table).decode("utf-8", "replace").splitlines()
            rows += [(place, table, number, line.split("\t")) for number, line in enumerate(lines, 1)]
    for name in sorted(classes - {s.class_name for s in samples}):
        raise UserError(f"{places[0].path}: train/{name}: class folder without images")
    if split == "train":
        return plan_from_samples(_union(samples), sorted(classes))
    tested = []
    for place, table, number, fields in rows:
        if len(fields) < 2 or fields[1] not in classes:
            raise UserError(f"{place.path}: {table}, line {number}: not '<file> <tab> <class of train/>'")
        if (name := f"{table.removesuffix('val_annotations.txt')}images/{fields[0]}") in place.files:
            tested.append(Sample(place, name, fields[1]))
    if not tested:
        raise UserError(f"{places[0].path}: no labelled validation images (val/val_annotations.txt, val/images/)")
    return plan_from_samples(_union(tested), sorted(classes))


def _union(samples: Sequence[Sample]) -> list[Sample]:
    """Each image once, by class and file name; the same name with other content is an error."""
    unique: dict[tuple[str, str], Sample] = {}
    for sample in samples:
        other = unique.setdefault((sample.class_name, sample.member.rsplit("/", 1)[-1]), sample)
        if other is not sample and other.place.read(other.member) != sample.place.read(sample.member):
            raise UserError(
                f"{sample.place.path}: {sample.member} differs from the one in {other.place.path}; "
                "give only one of the two"
            )
    return [unique[key] for key in sorted(unique)]


OFFICIAL = {
    "stl10": Official(_stl10, key=lambda split: tv.STL10.tgz_md5),
    "s_cifar100": Official(_s_cifar100, key=lambda split: f"{tv.CIFAR100.tgz_md5} choice {CHOICE_SEED}"),
    "cifar100": Official(_cifar100, key=lambda split: tv.CIFAR100.tgz_md5),
    "dogs": Official(_dogs, _find_dogs, home="stanford_dogs"),
    "cars": Official(_cars, _find_cars),
    "aircraft": Official(_aircraft, lambda *to: [_unpacked("fgvc-aircraft-2013b", AIRCRAFT_URL, AIRCRAFT_MD5, *to)]),
    "cub": Official(_cub, lambda *to: [_unpacked("CUB_200_2011", CUB_URL, CUB_MD5, *to)], itself=True),
    "small_svhn": Official(_small_svhn, key=lambda split: f"{tv.SVHN.split_list[split][2]} choice {CHOICE_SEED}"),
    "fashion_mnist": Official(_fashion_mnist, key=lambda split: " ".join(md5 for _, md5 in tv.FashionMNIST.resources)),
    "dtd": Official(_dtd, lambda *to: [_unpacked("dtd", DTD_URL, tv.DTD._MD5, *to, "dtd/")]),
    "tiny_imagenet": Official(_tiny_imagenet, find_tiny_imagenet, itself=True),
}
