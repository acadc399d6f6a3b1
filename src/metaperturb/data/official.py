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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets as tv
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from metaperturb.data.arrays import Picture, Plan, file_picture
from metaperturb.data.files import Place
from metaperturb.data.splits import CHOICE_SEED, few_per_class
from metaperturb.errors import UserError
from metaperturb.storage import hold, reason

_CUB = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
_DOGS = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
_VGG = "https://www.robots.ox.ac.uk/~vgg/data/"
# What is fetched, a file or the folder that archives hold → their addresses and MD5.
FILES: dict[str, dict[str, str]] = {
    "stl10_binary": {tv.STL10.url: tv.STL10.tgz_md5},
    "cifar-100-python": {tv.CIFAR100.url: tv.CIFAR100.tgz_md5},
    **{file: {url: md5} for url, file, md5 in tv.SVHN.split_list.values()},
    "FashionMNIST": {tv.FashionMNIST.mirrors[0] + file: md5 for file, md5 in tv.FashionMNIST.resources},
    "fgvc-aircraft-2013b": {
        _VGG + "fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz": "d4acdd33327262359767eeaa97a4f732"
    },
    "dtd": {_VGG + "dtd/download/dtd-r1.0.1.tar.gz": tv.DTD._MD5},
    "CUB_200_2011": {_CUB: "97eceeb196236b17998738112f37df78"},
    "images.tar": {_DOGS + "images.tar": "1bb1f2a596ae7057f99d7d75860002ef"},
    "lists.tar": {_DOGS + "lists.tar": "edbb9f16854ec66506b5f09b583e0656"},
    "tiny-imagenet-200.zip": {"http://cs231n.stanford.edu/tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de"},
    "stanford_cars": {},  # the official site is gone
}
# Where torchvision unpacks archives that do not hold the folder itself.
_INSIDE = {"FashionMNIST": "FashionMNIST/raw", "dtd": "dtd"}
# Of archives that are not unpacked: what shows that the user has done it, and the folder that it then is.
_UNPACKED = {
    "images.tar": ("Images", "."),
    "lists.tar": ("train_list.mat", "."),
    "tiny-imagenet-200.zip": ("tiny-imagenet-200", "tiny-imagenet-200"),
}
_DAMAGED = "incomplete or damaged; delete it and start again"
_CARS = (
    "Stanford Cars can no longer be downloaded from its authors: put there by hand cars_train/*.jpg and "
    "cars_test/*.jpg (cars_train.tgz, cars_test.tgz), devkit/cars_train_annos.mat and devkit/cars_meta.mat "
    "(car_devkit.tgz), cars_test_annos_withlabels.mat"
)
TIMEOUT = 60  # seconds; torchvision sets none and would wait for ever


@dataclass(frozen=True)
class Official:
    """How a published set is had: as files, of which there is a `plan`, or as a torchvision data set of `pixels`."""

    at: Sequence[str]  # where `FILES` are under its root; `{split}` is the split
    plan: Callable[[list[Place], str], Plan] | None = None  # the images of a split, of (the places `at`, split)
    pixels: Callable[[Path, str], Any] | None = None  # of (root, split), with images of PIL
    few: dict[str, tuple[int, int]] = field(default_factory=dict)  # split → of each class how many, after how many
    itself: bool = False  # what is named is the archive or folder (or several), not a root that holds it

    def places(self, root: Path, fetch: bool, split: str) -> list[Path]:
        """Where its files are; what is absent is fetched."""
        found = []
        for place in (root / name.format(split=split) for name in self.at):
            shows, folder = _UNPACKED.get(place.name, ("", ""))
            unpacked = shows and (place.parent / shows).exists() and not place.exists()
            found.append(place.parent / folder if unpacked else _fetched(place, fetch))
        return found

    def key(self, split: str) -> str:
        """Of `pixels`: what tells the images of a split from all others."""
        (name,) = self.at
        md5 = " ".join(FILES[name.format(split=split)].values())
        return f"{md5} choice {CHOICE_SEED}" if self.few else md5

    def pixel_plan(self, where: Path, split: str) -> Plan:
        """The plan of `pixels`."""
        with _reading(where, _DAMAGED):
            data = self.pixels(where.parent, split)
        labels = np.asarray(data.targets if hasattr(data, "targets") else data.labels)
        chosen = few_per_class(labels, *self.few[split]) if split in self.few else np.arange(len(labels))
        classes = getattr(data, "classes", "0123456789")  # SVHN names none

        def picture(i: int) -> Picture:
            return Picture(classes[labels[i]], f"{where}: image {i}", lambda: np.asarray(data[i][0]))

        return Plan(str(where), classes, [*map(picture, chosen.tolist())])


# --- Fetching -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(place: Path, advice: str) -> Iterator[None]:
    """The many errors of torchvision and scipy on absent, damaged or unreachable data as one line."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # URLError, RuntimeError, EOFError, AssertionError, scipy's own: there is no end of them
        missing = error.__context__ or error  # torchvision may hide which package it lacks
        if isinstance(missing, ImportError):  # scipy: labels are MATLAB files
            advice = f"reading its labels needs another package; {sys.executable} -m pip install {missing.name}"
            raise UserError(f"{place}: {advice}") from error
        raise UserError(f"{place}: {advice} ({reason(error)})") from error


def _fetched(place: Path, fetch: bool) -> Path:
    """See to it that `place`, one of `FILES`, is there and whole; several processes may ask at once.

    torchvision takes half a folder left by an interrupted run for the data set. So it works in a temporary folder,
    until all is done. Archives that the user has put beside `place` by hand are taken from there.
    """
    root, files = place.parent, {url.rsplit("/", 1)[-1]: (url, md5) for url, md5 in FILES[place.name].items()}
    if place.exists():
        return place
    if not files:
        raise UserError(f"{place}: no such folder; {_CARS}")
    with hold(root / f".{place.name}.lock", wait=True):
        if place.exists():
            return place
        offered = [name for name in files if (root / name).is_file()]
        needed, url = ", ".join(files), next(iter(FILES[place.name]))
        url = url.rsplit("/", 1)[0] if len(files) > 1 else url
        what = "unpacking" if len(offered) == len(files) else f"download from {url}"
        if what != "unpacking":
            if not fetch:
                allow = f"fetch {needed} from {url} to {root}/ or allow the download"
                raise UserError(f"{place}: no such file or folder; {allow}")
            print(f"{place}: {what}", file=sys.stderr)
        temporary, old_timeout = root / f".{place.name}.tmp", socket.getdefaulttimeout()
        folder = temporary / _INSIDE.get(place.name, "")
        quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed run: this process holds the lock
        try:
            advice = f"{what} failed; fetch {needed} by other means to {root}/"
            with _reading(place, advice), quiet:  # its bar fills a log file
                folder.mkdir(parents=True)
                socket.setdefaulttimeout(TIMEOUT)
                for name, (address, md5) in files.items():
                    if name in offered:
                        if not check_integrity(root / name, md5):
                            again = f"delete it or fetch it again from {url}"
                            raise UserError(f"{root / name}: wrong MD5, expected {md5}; {again}")
                        (folder / name).symlink_to((root / name).resolve())
                    download_url(address, folder, name, md5)
                    if name != place.name:
                        extract_archive(folder / name, folder, remove_finished=True)
                (temporary / place.name).rename(place)
        finally:
            socket.setdefaulttimeout(old_timeout)
            shutil.rmtree(temporary, ignore_errors=True)
    return place


# --- Image files --------------------------------------------------------------------------------------------


def _listed(place: Place, rows: Iterable[tuple[str, str]], classes: Sequence[str]) -> Plan:
    """A plan for (member, class name) rows that an official list names."""
    return Plan(str(place.path), classes, [file_picture(place, *row) for row in rows])


def _of_torchvision(kind: type, advice: str = _DAMAGED, **parts: Sequence[str]) -> Callable[[list[Place], str], Plan]:
    """The plan of a torchvision data set of files; `parts`: what it calls what makes up a split, if not just so."""

    def plan(places: list[Place], split: str) -> Plan:
        (place,) = places
        with _reading(place.path, advice):  # with `loader=str` it yields (path, label)
            found = [kind(place.path.parent, split=part, loader=str) for part in parts.get(split, [split])]
            rows = [part[i] for part in found for i in range(len(part))]
        classes = found[0].classes
        members = [(Path(file).relative_to(place.path).as_posix(), classes[label]) for file, label in rows]
        return _listed(place, members, classes)

    return plan


def _cub(places: list[Place], split: str) -> Plan:
    """images/, and text tables that give each image number a value."""
    (place,) = places
    root = place.root(("train_test_split.txt",))
    if root is None:
        raise UserError(f"{place.path}: not CUB-200-2011: no train_test_split.txt inside")

    def table(name: str) -> dict[int, str]:
        lines = place.read(f"{root}{name}").decode("utf-8", "replace").splitlines()
        rows = [line.split(maxsplit=1) for line in lines if line.strip()]
        return {int(number): value.strip() for number, value in rows}

    try:
        image, label = table("images.txt"), table("image_class_labels.txt")
        is_train, class_name = table("train_test_split.txt"), table("classes.txt")
        numbers = [i for i in sorted(image) if is_train[i] == ("1" if split == "train" else "0")]
        rows = [(f"{root}images/{image[i]}", class_name[int(label[i])]) for i in numbers]
    except (ValueError, KeyError) as error:
        raise UserError(f"{place.path}: its tables do not fit ({reason(error)}); is the archive official?") from error
    return _listed(place, rows, [class_name[i] for i in sorted(class_name)])


def _dogs(places: list[Place], split: str) -> Plan:
    """Images/<class>/*.jpg, and *_list.mat."""
    images, lists = places
    table = f"{split}_list.mat"
    content = lists.read(table)
    with _reading(lists.path, f"{table}: not a Stanford Dogs list"):
        from scipy.io import loadmat

        mat = loadmat(io.BytesIO(content))
        files = [str(entry.item()) for entry in mat["file_list"].ravel()]
        labels = [int(label) - 1 for label in mat["labels"].ravel()]  # MATLAB counts from 1
    # "n02085620-Chihuahua/n02085620_10074.jpg": the folder is the class.
    name = {label: file.split("/")[0] for file, label in zip(files, labels, strict=True)}
    rows = [(f"Images/{file}", name[label]) for file, label in zip(files, labels, strict=True)]
    return _listed(images, rows, [name[label] for label in sorted(name)])


def _tiny_imagenet(places: list[Place], split: str) -> Plan:
    """The images of all places together, each once, by class (WordNet id), then by file name as plain text.

    train/<class>/images/*.JPEG; the validation images, of which val/val_annotations.txt gives the classes, are its
    test images, as the official ones have no public labels.
    """
    # Class and file name → the image; of one that several places have, any.
    train, test, tables = {}, {}, {}
    for place in places:
        root = place.root(("train",)) or ""
        image = re.compile(rf"{re.escape(root)}train/([^/]+)/images/([^/]+)")  # beside images/ lies <wnid>_boxes.txt
        found = [match for match in map(image.fullmatch, place.files) if match]
        if not found:
            raise UserError(f"{place.path}: not Tiny ImageNet: no tiny-imagenet-200/train/<class>/images/*.JPEG inside")
        train |= {match.groups(): file_picture(place, match[0], match[1]) for match in found}
        if (table := f"{root}val/val_annotations.txt") in place.files:
            tables[place] = table
    classes = sorted({name for name, _ in train})
    for place, table in tables.items() if split == "test" else ():
        for number, line in enumerate(place.read(table).decode("utf-8", "replace").splitlines(), 1):
            file, name, *_ = *line.split("\t"), ""
            if name not in classes:
                raise UserError(f"{place.path}: {table}, line {number}: not '<file> <tab> <class of train/>'")
            if (member := f"{table.removesuffix('val_annotations.txt')}images/{file}") in place.files:
                test[name, file] = file_picture(place, member, name)
    images = test if split == "test" else train
    if not images:
        raise UserError(f"{places[0].path}: no labelled validation images (val/val_annotations.txt, val/images/)")
    return Plan(", ".join(str(place.path) for place in places), classes, [images[key] for key in sorted(images)])


_CIFAR100 = Official(["cifar-100-python"], pixels=lambda root, split: tv.CIFAR100(root, train=split != "test"))
OFFICIAL = {
    "stl10": Official(["stl10_binary"], pixels=tv.STL10),
    # 50 training images a class; 25 others a class to validate on.
    "s_cifar100": replace(_CIFAR100, few={"train": (50, 0), "val": (25, 50)}),
    "cifar100": _CIFAR100,
    "dogs": Official(["stanford_dogs/images.tar", "stanford_dogs/lists.tar"], _dogs),
    "cars": Official(["stanford_cars"], _of_torchvision(tv.StanfordCars, f"incomplete; {_CARS}")),
    # The variants; of the images, the whole: their bottom 20 rows name the photographer, as in torchvision.
    "aircraft": Official(["fgvc-aircraft-2013b"], _of_torchvision(tv.FGVCAircraft, train=["trainval"])),
    "cub": Official(["CUB_200_2011"], _cub, itself=True),
    "small_svhn": Official(["{split}_32x32.mat"], pixels=tv.SVHN, few={"train": (500, 0)}),
    "fashion_mnist": Official(["FashionMNIST"], pixels=lambda root, split: tv.FashionMNIST(root, split == "train")),
    # Partition 1 of 10; its train and val parts together are the training set.
    "dtd": Official(["dtd"], _of_torchvision(tv.DTD, train=["train", "val"])),
    "tiny_imagenet": Official(["tiny-imagenet-200.zip"], _tiny_imagenet, itself=True),
}
