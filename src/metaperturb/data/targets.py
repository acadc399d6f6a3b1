"""Target data sets: what networks are trained on with a learned φ (section 4 of the paper), by name."""

import contextlib
import io
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets as tv
from torchvision.datasets.utils import check_integrity

from metaperturb.data.archives import Archive, download, open_archive, subfolder_root
from metaperturb.data.arrays import (
    ImageArrays,
    Plan,
    Sample,
    cached,
    from_memory,
    plan_from_samples,
)
from metaperturb.data.disk import disk_errors, file_lock, is_disk_error
from metaperturb.data.image_folder import load_image_folder
from metaperturb.data.sources import load_source
from metaperturb.data.splits import CHOICE_SEED, few_per_class
from metaperturb.data.tiny_imagenet import load_tiny_imagenet
from metaperturb.errors import UserError

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
DOGS_URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
DOGS_MD5 = {
    "images.tar": "1bb1f2a596ae7057f99d7d75860002ef",
    "lists.tar": "edbb9f16854ec66506b5f09b583e0656",
}
AIRCRAFT_MD5 = "d4acdd33327262359767eeaa97a4f732"


@dataclass(frozen=True)
class TargetSpec:
    """What is known of a target set before it is loaded.

    Attributes:
        title: its name in tables.
        num_classes, train, test: expected counts; `None`: whatever is found.
        image_size: default height = width in pixels.
        splits: what can be loaded.
        val: expected count of the `val` split, where there is one.
    """

    title: str
    num_classes: int | None
    train: int | None
    test: int | None
    image_size: int
    splits: tuple[str, ...] = ("train", "test")
    val: int | None = None


# Counts: appendix of the paper and the sets' own pages. DTD: partition 1, train and val together for training.
TARGETS: dict[str, TargetSpec] = {
    "stl10": TargetSpec("STL10", 10, 5000, 8000, 96),
    "s_cifar100": TargetSpec("s-CIFAR100", 100, 5000, 10000, 32, ("train", "val", "test"), 2500),
    "cifar100": TargetSpec("CIFAR-100", 100, 50000, 10000, 32),
    "dogs": TargetSpec("Stanford Dogs", 120, 12000, 8580, 84),
    "cars": TargetSpec("Stanford Cars", 196, 8144, 8041, 84),
    "aircraft": TargetSpec("FGVC Aircraft", 100, 6667, 3333, 84),
    "cub": TargetSpec("CUB-200-2011", 200, 5994, 5794, 84),
    "small_svhn": TargetSpec("small SVHN", 10, 5000, 26032, 32),
    "fashion_mnist": TargetSpec("Fashion-MNIST", 10, 60000, 10000, 32),
    "dtd": TargetSpec("DTD", 47, 3760, 1880, 84),
    "folder": TargetSpec("image folder", None, None, None, 32, ("train", "val", "test")),
    "embedded": TargetSpec("embedded", None, None, None, 32),
    # The sources, to pretrain a network on for finetuning.
    "tiny_imagenet": TargetSpec("Tiny ImageNet", None, None, None, 32),
    "embedded_source": TargetSpec("embedded source", None, None, None, 32, ("train",)),
}


@contextlib.contextmanager
def open_target(name: str, split: str, *, data_root: Path, download: bool = True) -> Iterator[Plan]:
    """One split of an official target set as it is published: encoded files or pixels at their own sizes.

    Args:
        name: one of `TARGETS` with official archives, such as `"cub"`.
        split: one of its splits.
        data_root: where the data set is, or is downloaded to.
        download: fetch what is absent.

    Yields:
        the images, in official order; they can be read while the context is open.

    Raises:
        UserError: anything wrong with the data, or other counts than the official ones.
    """
    with ExitStack() as stack:
        _, plan = _LOADERS[name](_usual_place(name, Path(data_root).expanduser()), split, download, stack)
        yield _with_official_counts(plan(), name, split)


def load_target(
    name: str,
    *,
    data_root: Path,
    path: str | Path | None = None,
    image_size: int | None = None,
    download: bool = True,
    skip_unreadable: bool = False,
    splits: tuple[str, ...] = ("train", "test"),
) -> tuple[ImageArrays, ...]:
    """Load the splits of a target data set.

    Args:
        name: one of `TARGETS`.
        data_root: where data sets and the image cache are.
        path: where this data set is, if not at its usual place under `data_root`. For `folder` (which has
            no usual place), `cub` and `dogs`: the archive or folder itself; for `tiny_imagenet`: one or
            several, separated by commas; for the others: the folder that torchvision calls `root`.
        image_size: height = width in pixels; the set's own default if `None`.
        download: fetch what is absent, where it can be fetched.
        skip_unreadable: leave broken images out and say how many, instead of raising.
        splits: which of the set's splits, in this order; `"val"` is offered by `s_cifar100` (25 training
            images a class of CIFAR-100 that are not in its `train`, to choose among several φ) and by
            `folder`. `"test"` of `tiny_imagenet`: its official validation images, as its test images have
            no public labels; `embedded_source` has none.

    Raises:
        UserError: an unknown name or split, anything wrong with the data, or other counts than the official
            ones.

    Example:
        >>> train, test = load_target("folder", data_root=Path("data"), path="cub50.zip")  # doctest: +SKIP
    """
    spec = TARGETS.get(name)
    if spec is None:
        raise UserError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    for split in splits:
        if split not in spec.splits:
            raise UserError(f"target {name}: no split {split!r}; it has {', '.join(spec.splits)}")
    data_root = Path(data_root).expanduser()
    size = spec.image_size if image_size is None else image_size
    if name in ("embedded", "embedded_source") and path is not None:
        raise UserError(f"target {name}: its images are drawn, so it takes no path (got {path})")
    if name == "embedded":
        return _embedded(size, splits)
    if name == "embedded_source":
        source = load_source("embedded", data_root=data_root, image_size=size)
        return tuple(source for _ in splits)
    if name == "tiny_imagenet":
        paths = [] if path is None else [part.strip() for part in str(path).split(",") if part.strip()]
        options = {"data_root": data_root, "paths": paths, "fetch": download, "skip_unreadable": skip_unreadable}
        parts = ["val" if split == "test" else split for split in splits]
        return tuple(load_tiny_imagenet(**options, image_size=size, split=part) for part in parts)
    if name == "folder":
        if path is None:
            raise UserError("target folder: needs the path of a folder or archive with train/<class>/, test/<class>/")
        return load_image_folder(
            path, data_root=data_root, image_size=size, splits=splits, skip_unreadable=skip_unreadable
        )
    place = Path(path).expanduser() if path is not None else _usual_place(name, data_root)
    if path is not None and not place.exists():  # nothing is downloaded to it: the name may be misspelt
        raise UserError(f"target {name}: {place}: no such file or folder")
    arrays = []
    for split in splits:
        with ExitStack() as stack:
            key, make_plan = _LOADERS[name](place, split, download, stack)

            def checked(make_plan: Callable[[], Plan] = make_plan, split: str = split) -> Plan:
                return _with_official_counts(make_plan(), name, split)

            arrays.append(cached(data_root, name, split, size, key, checked, skip_unreadable))
    return tuple(arrays)


def _with_official_counts(plan: Plan, name: str, split: str) -> Plan:
    spec = TARGETS[name]
    wanted = (getattr(spec, split), spec.num_classes)
    found = (len(plan.labels), len(plan.classes))
    if found != wanted:
        raise UserError(
            f"{plan.where}: expected {wanted[0]} {split} images of {wanted[1]} classes for {spec.title}, "
            f"found {found[0]} of {found[1]}; is the data complete?"
        )
    return plan


def _embedded(image_size: int, splits: Sequence[str]) -> tuple[ImageArrays, ...]:
    from metaperturb.data.embedded import embedded_target

    found = dict(zip(("train", "test"), embedded_target(image_size=image_size), strict=True))
    return tuple(from_memory(f"embedded-{split}", *found[split]) for split in splits)


# --- Official archives --------------------------------------------------------------------------------------


def _listed_plan(archive: Archive, rows: Iterable[tuple[str, str]], classes: Sequence[str]) -> Plan:
    """A plan for (member, class name) rows that an official list names."""
    files = set(archive.files)
    samples = [Sample(archive, member, class_name) for member, class_name in rows]
    for sample in samples:
        if sample.member not in files:
            raise UserError(f"{archive.path}: {sample.member} is listed but missing; delete this and fetch it again")
    return plan_from_samples(samples, classes)


def _cub(place: Path, split: str, fetch: bool, stack: ExitStack) -> tuple[str, Callable[[], Plan]]:
    """CUB_200_2011.tgz or the folder in it: images/, and text tables that give each image number a value."""
    if not place.exists() and fetch:
        download(CUB_URL, place, CUB_MD5)
    if not place.exists():
        raise UserError(f"{place}: no such file; fetch {CUB_URL} or allow the download")
    archive = stack.enter_context(open_archive(place))

    def plan() -> Plan:
        root = subfolder_root(archive, ("train_test_split.txt",))
        if root is None:
            raise UserError(f"{place}: not CUB-200-2011: no train_test_split.txt inside")
        names = [f"{root}{n}.txt" for n in ("images", "image_class_labels", "train_test_split", "classes")]
        contents = archive.read(names)
        image, label, is_train, class_name = (_table(f"{place}: {n}", contents[n]) for n in names)
        classes = [class_name[i] for i in sorted(class_name, key=int)]
        wanted = "1" if split == "train" else "0"
        try:
            rows = [
                (f"{root}images/{image[i]}", class_name[label[i]])
                for i in sorted(image, key=int)
                if is_train[i] == wanted
            ]
        except KeyError as error:
            raise UserError(f"{place}: no entry {error} in one of its tables; is the archive official?") from error
        return _listed_plan(archive, rows, classes)

    return archive.key(), plan


def _table(where: str, content: bytes) -> dict[str, str]:
    """Lines of `<number> <value>`."""
    rows = [line.split(maxsplit=1) for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
    if any(len(row) != 2 or not row[0].isdigit() for row in rows):
        raise UserError(f"{where}: not a table of '<number> <value>' lines")
    return {number: value.strip() for number, value in rows}


def _dogs(place: Path, split: str, fetch: bool, stack: ExitStack) -> tuple[str, Callable[[], Plan]]:
    """A folder with images.tar and lists.tar, or with what is in them: Images/<class>/*.jpg and *_list.mat."""
    loadmat = _loadmat("Stanford Dogs")
    archives = []
    for file, extracted in (("images.tar", "Images"), ("lists.tar", "train_list.mat")):
        if (place / file).exists() or not (place / extracted).exists():
            if not (place / file).exists() and not fetch:
                raise UserError(f"{place / file}: no such file; fetch {DOGS_URL}{file} or allow the download")
            download(DOGS_URL + file, place / file, DOGS_MD5[file])
            archives.append(stack.enter_context(open_archive(place / file)))
        else:
            archives.append(stack.enter_context(open_archive(place)))
    images, lists = archives

    def plan() -> Plan:
        table = f"{split}_list.mat"
        content = lists.read([table])[table]
        try:
            mat = loadmat(io.BytesIO(content))
            files = [str(entry.item()) for entry in mat["file_list"].ravel()]
            labels = [int(label) - 1 for label in mat["labels"].ravel()]  # MATLAB counts from 1
        except Exception as error:  # scipy raises nearly anything on broken files
            raise UserError(f"{lists.path}: {table}: not a Stanford Dogs list ({error})") from error
        # "n02085620-Chihuahua/n02085620_10074.jpg": the folder is the class.
        name = {label: file.split("/")[0] for file, label in zip(files, labels, strict=True)}
        classes = [name[label] for label in sorted(name)]
        rows = [(f"Images/{file}", name[label]) for file, label in zip(files, labels, strict=True)]
        return _listed_plan(images, rows, classes)

    return f"{images.key()} {lists.key()}", plan


def _loadmat(title: str) -> Callable[..., dict[str, Any]]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"{title}: its labels are MATLAB files; {sys.executable} -m pip install scipy reads them"
        ) from error
    return loadmat


# --- torchvision --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _torchvision_errors(place: Path, advice: str) -> Iterator[None]:
    """torchvision's many errors on absent, damaged or unreachable data as one line."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:  # URLError, RuntimeError, EOFError, AssertionError, scipy's own: there is no end of them
        if isinstance(error, (UserError, MemoryError)) or is_disk_error(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{place}: {advice} ({reason})") from error


def _fetched(
    root: Path,
    produced: str,
    url: str,
    archives: dict[str, tuple[str, str | None]],
    fetch: bool,
    make: Callable[[Path], Any],
) -> None:
    """See to it that `root/produced` is there and whole.

    torchvision writes in place, and takes half a folder left by an interrupted run for the data set. So it works in
    a temporary folder, which takes the right name when all is done.

    Args:
        root: where the data set belongs.
        produced: the file or folder that the download yields.
        url: for error messages.
        archives: of files that the user may have placed in `root` by hand: {name: (where torchvision looks
            for it, MD5 or None)}.
        fetch: download what is absent.
        make: instantiates the torchvision class with `download=True` in the given root.
    """
    if (root / produced).exists():
        return
    with file_lock(root / f".{produced}.lock"):
        if (root / produced).exists():
            return
        offered = [name for name in archives if (root / name).is_file()]
        if not fetch and (not archives or len(offered) < len(archives)):
            needed = ", ".join(archives) or produced
            raise UserError(
                f"{root / produced}: not there; place {needed} from {url} in {root}/, or allow the download"
            )
        temporary = root / f".{produced}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed run: this process holds the lock
        old_timeout = socket.getdefaulttimeout()
        try:
            with disk_errors(root, "store the data set"):
                for name in offered:
                    place, md5 = archives[name]
                    if not check_integrity(root / name, md5):
                        raise UserError(
                            f"{root / name}: wrong MD5, expected {md5}; delete it or fetch it again from {url}"
                        )
                    (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                    (temporary / place).symlink_to((root / name).resolve())
                temporary.mkdir(exist_ok=True)
                socket.setdefaulttimeout(60)  # torchvision sets none and would wait for ever
                advice = (
                    f"download from {url} failed; fetch {', '.join(archives) or produced} by other means to {root}/"
                )
                with _torchvision_errors(root / produced, advice):
                    make(temporary)
                for place, _ in archives.values():  # a link to the user's file, or 100s of MB no longer needed
                    (temporary / place).unlink(missing_ok=True)
                os.rename(temporary / produced, root / produced)
        finally:
            socket.setdefaulttimeout(old_timeout)
            shutil.rmtree(temporary, ignore_errors=True)


_DAMAGED = "incomplete or damaged; delete it and start again"


def _pixels_plan(where: Path, images: Sequence[np.ndarray], labels: Sequence[int], classes: Sequence[str]) -> Plan:
    """A plan for decoded images, each uint8 `[H, W, 3]` or `[H, W]`."""
    return Plan(
        where=str(where),
        classes=classes,
        labels=[int(label) for label in labels],
        names=[f"{where}: image {i}" for i in range(len(images))],
        read=lambda: ((i, np.ascontiguousarray(image)) for i, image in enumerate(images)),
    )


def _stl10(place: Path, split: str, fetch: bool, stack: ExitStack) -> tuple[str, Callable[[], Plan]]:
    def plan() -> Plan:
        archives = {tv.STL10.filename: (tv.STL10.filename, tv.STL10.tgz_md5)}
        _fetched(
            place,
            tv.STL10.base_folder,
            tv.STL10.url,
            archives,
            fetch,
            lambda r: tv.STL10(str(r), download=True),
        )
        folder = place / tv.STL10.base_folder
        with _torchvision_errors(folder, _DAMAGED):
            data = tv.STL10(str(place), split=split)
            classes = data.classes
        return _pixels_plan(folder, [image.transpose(1, 2, 0) for image in data.data], data.labels, classes)

    return tv.STL10.tgz_md5, plan


def _cifar100(place: Path, split: str, fetch: bool, stack: ExitStack) -> tuple[str, Callable[[], Plan]]:
    return tv.CIFAR100.tgz_md5, lambda: _cifar100_plan(place, split, fetch, lambda labels: np.arange(len(labels)))


def _s_cifar100(place: Path, split: str, fetch: bool, stack: ExitStack) -> tuple[str, Callable[[], Plan]]:
    def choose(labels: np.ndarray) -> np.ndarray:
        if split == "test":
            return np.arange(len(labels))
        return few_per_class(labels, 50) if split == "train" else few_per_class(labels, 25, skip=50)

    return f"{tv.CIFAR100.tgz_md5} choice {CHOICE_SEED}", lambda: _cifar100_plan(place, split, fetch, choose)


def _cifar100_plan(place: Path, split: str, fetch: bool, choose: Callable[[np.ndarray], np.ndarray]) -> Plan:
    kind = tv.CIFAR100
    archives = {kind.filename: (kind.filename, kind.tgz_md5)}
    _fetched(place, kind.base_folder, kind.url, archives, fetch, lambda r: kind(str(r), download=True))
    folder = place / kind.base_folder
    with _torchvision_errors(folder, _DAMAGED):
        data = kind(str(place), train=split != "test")
        labels = np.asarray(data.targets)
        chosen = choose(labels)
    return _pixels_plan(folder, data.data[chosen], labels[chosen], data.classes)


def _small_svhn(place: Path, split: str, fetch: bool, stack: ExitStack) -> tuple[str, Callable[[], Plan]]:
    url, file, md5 = tv.SVHN.split_list[split]

    def plan() -> Plan:
        _loadmat("SVHN")
        _fetched(place, file, url, {}, fetch, lambda r: tv.SVHN(str(r), split=split, download=True))
        with _torchvision_errors(place / file, _DAMAGED):
            data = tv.SVHN(str(place), split=split)
        chosen = few_per_class(data.labels, 500) if split == "train" else np.arange(len(data.labels))
        images = data.data[chosen].transpose(0, 2, 3, 1)
        return _pixels_plan(place / file, images, data.labels[chosen], [str(digit) for digit in range(10)])

    return f"{md5} choice {CHOICE_SEED}", plan


def _fashion_mnist(place: Path, split: str, fetch: bool, stack: ExitStack) -> tuple[str, Callable[[], Plan]]:
    kind = tv.FashionMNIST

    def plan() -> Plan:
        archives = {file: (f"FashionMNIST/raw/{file}", md5) for file, md5 in kind.resources}
        _fetched(place, "FashionMNIST", kind.mirrors[0], archives, fetch, lambda r: kind(str(r), download=True))
        with _torchvision_errors(place / "FashionMNIST", _DAMAGED):
            data = kind(str(place), train=split == "train")
        return _pixels_plan(place / "FashionMNIST", data.data.numpy(), data.targets.tolist(), kind.classes)

    return " ".join(md5 for _, md5 in kind.resources), plan


def _files_plan(archive: Archive, data: Iterable[tuple[str, int]], classes: Sequence[str]) -> Plan:
    """A plan for a torchvision data set of files, made with `loader=str` so that it yields (path, label)."""
    rows = [(Path(file).relative_to(archive.path).as_posix(), classes[label]) for file, label in data]
    return _listed_plan(archive, rows, classes)


def _iterate(data: Any) -> list[tuple[str, int]]:
    return [data[i] for i in range(len(data))]


def _aircraft(place: Path, split: str, fetch: bool, stack: ExitStack) -> tuple[str, Callable[[], Plan]]:
    """The variants; of the images, the whole: their bottom 20 rows name the photographer, as in torchvision."""
    folder = "fgvc-aircraft-2013b"
    file = f"{folder}.tar.gz"
    url = f"https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/{file}"
    if fetch and not (place / folder).exists():
        download(url, place / file, AIRCRAFT_MD5)  # torchvision's own download checks nothing
    archives: dict[str, tuple[str, str | None]] = {file: (file, AIRCRAFT_MD5)}
    _fetched(place, folder, url, archives, fetch, lambda r: tv.FGVCAircraft(str(r), download=True))
    archive = stack.enter_context(open_archive(place / folder))

    def plan() -> Plan:
        with _torchvision_errors(archive.path, _DAMAGED):
            data = tv.FGVCAircraft(str(place), split="trainval" if split == "train" else "test", loader=str)
            return _files_plan(archive, _iterate(data), data.classes)

    return archive.key(), plan


def _dtd(place: Path, split: str, fetch: bool, stack: ExitStack) -> tuple[str, Callable[[], Plan]]:
    """Partition 1 of 10; its train and val parts together are the training set."""
    file = "dtd-r1.0.1.tar.gz"
    url = f"https://www.robots.ox.ac.uk/~vgg/data/dtd/download/{file}"
    archives: dict[str, tuple[str, str | None]] = {file: (f"dtd/{file}", tv.DTD._MD5)}
    _fetched(place, "dtd", url, archives, fetch, lambda r: tv.DTD(str(r), download=True))
    archive = stack.enter_context(open_archive(place / "dtd"))

    def plan() -> Plan:
        with _torchvision_errors(archive.path, _DAMAGED):
            parts = [
                tv.DTD(str(place), split=s, loader=str) for s in (("train", "val") if split == "train" else ("test",))
            ]
            return _files_plan(archive, [row for part in parts for row in _iterate(part)], parts[0].classes)

    return archive.key(), plan


def _cars(place: Path, split: str, fetch: bool, stack: ExitStack) -> tuple[str, Callable[[], Plan]]:
    """Only by hand: the official site is gone."""
    _loadmat("Stanford Cars")
    folder = place / "stanford_cars"
    files = ["cars_train", "cars_test", "devkit/cars_train_annos.mat", "devkit/cars_meta.mat"]
    files.append("cars_test_annos_withlabels.mat")
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise UserError(
            f"{folder}: {', '.join(missing)} missing; Stanford Cars can no longer be downloaded from its authors: "
            "put there by hand cars_train/*.jpg and cars_test/*.jpg (cars_train.tgz, cars_test.tgz), "
            "devkit/cars_train_annos.mat and devkit/cars_meta.mat (car_devkit.tgz), cars_test_annos_withlabels.mat"
        )
    archive = stack.enter_context(open_archive(folder))

    def plan() -> Plan:
        with _torchvision_errors(folder, _DAMAGED):
            data = tv.StanfordCars(str(place), split=split, loader=str)
            return _files_plan(archive, _iterate(data), data.classes)

    return archive.key(), plan


_LOADERS: dict[str, Callable[[Path, str, bool, ExitStack], tuple[str, Callable[[], Plan]]]] = {
    "stl10": _stl10,
    "s_cifar100": _s_cifar100,
    "cifar100": _cifar100,
    "dogs": _dogs,
    "cars": _cars,
    "aircraft": _aircraft,
    "cub": _cub,
    "small_svhn": _small_svhn,
    "fashion_mnist": _fashion_mnist,
    "dtd": _dtd,
}


def _usual_place(name: str, data_root: Path) -> Path:
    """Where a data set is without a `path`: its own archive or folder, or what torchvision calls `root`."""
    if name == "cub":
        archive, folder = data_root / "CUB_200_2011.tgz", data_root / "CUB_200_2011"
        return folder if folder.is_dir() and not archive.exists() else archive
    return data_root / "stanford_dogs" if name == "dogs" else data_root
