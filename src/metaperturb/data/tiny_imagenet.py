"""Tiny ImageNet (200 classes × 500 training images, 64×64), the source of meta-training (section 4 of the paper).

The official archive holds `tiny-imagenet-200/train/<wnid>/images/<wnid>_<i>.JPEG` and, of the validation
set, `tiny-imagenet-200/val/images/*.JPEG` with their classes in
`tiny-imagenet-200/val/val_annotations.txt`.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from metaperturb.data.archives import Archive, download, open_archive, subfolder_root
from metaperturb.data.arrays import ImageArrays, Plan, Sample, cached, plan_from_samples
from metaperturb.errors import UserError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def load_tiny_imagenet(
    *,
    data_root: Path,
    paths: Sequence[str | Path] = (),
    image_size: int = 32,
    split: str = "train",
    fetch: bool = True,
    skip_unreadable: bool = False,
) -> ImageArrays:
    """Load the training or the labelled validation images.

    The classes are the sorted WordNet ids. The images are ordered by class, then by file name as plain text
    (`_10` before `_2`), whatever the number and order of the archives.

    Args:
        data_root: holds the cache, and `tiny-imagenet-200.zip` or the folder `tiny-imagenet-200` unless
            `paths` says otherwise.
        paths: archives or folders of the official layout, each with all or a part of the images; their union
            is loaded. A file that is in several of them counts once if it is the same there.
        image_size: height = width in pixels.
        split: `"train"` or `"val"`. Of `"val"`, the images that are present.
        fetch: download the archive (248 MB) if it is absent.
        skip_unreadable: leave broken images out instead of raising.

    Raises:
        UserError: a missing, truncated or foreign archive; a class without images; a broken image; no
            network.
    """
    if not paths:
        paths = [find_tiny_imagenet(Path(data_root).expanduser(), fetch=fetch)]
    with ExitStack() as stack:
        archives = [stack.enter_context(open_archive(path)) for path in paths]
        make = {"train": _plan_train, "val": _plan_val}[split]
        key = " ".join(sorted({archive.key() for archive in archives}))
        return cached(data_root, "tiny_imagenet", split, image_size, key, lambda: make(archives), skip_unreadable)


def find_tiny_imagenet(data_root: Path, *, fetch: bool = True) -> Path:
    """The official archive under the data root, downloaded (248 MB) if it is absent, or the folder extracted from it.

    Raises:
        UserError: it is not there, and must not or cannot be downloaded.
    """
    folder, archive = data_root / "tiny-imagenet-200", data_root / "tiny-imagenet-200.zip"
    if not archive.exists() and folder.is_dir():
        return folder
    if not archive.exists() and not fetch:
        raise UserError(f"{archive}: no such file; fetch {URL} or allow the download")
    download(URL, archive, MD5)
    return archive


def _train_samples(archive: Archive) -> tuple[list[Sample], set[str]]:
    """The training images of one archive, and its class names."""
    root = subfolder_root(archive, ("train",))
    samples, classes = [], set()
    if root is not None:
        depth = root.count("/")
        for name in archive.files:
            parts = name.split("/")[depth:]
            # Beside images/ lies <wnid>_boxes.txt.
            if name.startswith(root) and len(parts) == 4 and parts[0] == "train" and parts[2] == "images":
                samples.append(Sample(archive, name, parts[1]))
        for name in archive.folders:
            parts = name.split("/")[depth:]
            if name.startswith(root) and len(parts) >= 2 and parts[0] == "train":
                classes.add(parts[1])
    if not samples:
        raise UserError(f"{archive.path}: not Tiny ImageNet: no tiny-imagenet-200/train/<class>/images/*.JPEG inside")
    return samples, classes | {s.class_name for s in samples}


def _union(samples: Sequence[Sample]) -> list[Sample]:
    """Each image once, by class and file name; the same name with other content is an error."""
    unique: dict[tuple[str, str], Sample] = {}
    for sample in samples:
        file = sample.member.rsplit("/", 1)[-1]
        other = unique.setdefault((sample.class_name, file), sample)
        if other is not sample and other.archive.crc32(other.member) != sample.archive.crc32(sample.member):
            raise UserError(
                f"{sample.archive.path}: {sample.member} differs from the one in {other.archive.path}; "
                "give only one of the two"
            )
    return [unique[key] for key in sorted(unique)]


def _plan_train(archives: Sequence[Archive]) -> Plan:
    found = [_train_samples(archive) for archive in archives]
    samples = _union([s for part, _ in found for s in part])
    classes = sorted(set().union(*(names for _, names in found)))
    for name in sorted(set(classes) - {s.class_name for s in samples}):
        raise UserError(f"{archives[0].path}: train/{name}: class folder without images")
    return plan_from_samples(samples, classes)


def _plan_val(archives: Sequence[Archive]) -> Plan:
    classes = sorted(set().union(*(_train_samples(archive)[1] for archive in archives)))
    samples = []
    for archive in archives:
        root = subfolder_root(archive, ("train",))
        table = f"{root}val/val_annotations.txt"
        files = set(archive.files)
        if table not in files:
            continue
        for number, line in enumerate(archive.read([table])[table].decode("utf-8", "replace").splitlines(), 1):
            fields = line.split("\t")  # file, wnid, and the bounding box
            if len(fields) < 2 or fields[1] not in classes:
                raise UserError(f"{archive.path}: {table}, line {number}: not '<file> <tab> <class of train/>'")
            member = f"{root}val/images/{fields[0]}"
            if member in files:
                samples.append(Sample(archive, member, fields[1]))
    if not samples:
        raise UserError(f"{archives[0].path}: no labelled validation images (val/val_annotations.txt, val/images/)")
    return plan_from_samples(_union(samples), classes)
