"""Class splits of the source data set into tasks (section 3.3 of the paper), and other parts of a training set: images
held out of it, some of each class, some of its classes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metaperturb.errors import UserError
from metaperturb.storage import load_json, write_atomically

KINDS = ("disjoint", "paired", "homogeneous")
_FORMAT, _FIELDS = 1, ("classes", "train", "test")
# No setting, as all runs on a data set are tuned on the same images: of those that are held out, of s-CIFAR100 and
# small SVHN, and of what `train_per_class` and `classes` leave.
CHOICE_SEED = 0


@dataclass(frozen=True, eq=False)
class TaskSplit:
    """One task's part of the source data set, in sorted int64 numbers."""

    classes: np.ndarray  # ids; the task's own label of an image is the position of its class here
    train: np.ndarray  # indices of D_tr, on which the task's network is trained
    test: np.ndarray  # indices of D_te, on which φ is; disjoint from `train`


def shuffled(items: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    """A random order of `items`.

    From the raw stream of the generator, which NumPy guarantees for ever: it reserves the right to change what
    `Generator.permutation` returns, and a split must not change with a new NumPy.
    """
    return items[np.argsort(bits.random_raw(len(items)), kind="stable")]


def class_split(labels: np.ndarray, num_tasks: int, kind: str, seed: int) -> list[TaskSplit]:
    """Split a data set over tasks: a pure function of its arguments.

    Args:
        labels: int `[N]`.
        num_tasks: T ≥ 1.
        kind: `"disjoint"`: the classes are dealt into T groups whose sizes differ by one at most, and each
            class's images are halved into train and test (of an odd number, the extra one goes to train).
            `"paired"`: T / 2 such groups, each serving two tasks, 2i and 2i + 1, with the halves swapped.
            `"homogeneous"`: each class's images are dealt over the T tasks and halved there; every task has
            all classes (Table 3c).
        seed: non-negative.

    Raises:
        UserError: the request cannot be met: too few classes or images, or T odd for `"paired"`.

    Example:
        >>> tasks = class_split(np.repeat(np.arange(20), 10), num_tasks=10, kind="disjoint", seed=0)
        >>> len(tasks), len(tasks[0].classes), len(tasks[0].train), len(tasks[0].test)
        (10, 2, 10, 10)
    """
    if kind == "paired" and num_tasks % 2:
        raise UserError(f"class split paired: needs an even number of tasks, got {num_tasks}")
    classes, counts = np.unique(labels, return_counts=True)
    groups = {"disjoint": num_tasks, "paired": num_tasks // 2, "homogeneous": 1}[kind]
    if groups > len(classes):
        raise UserError(f"class split {kind}: {num_tasks} tasks need {groups} classes, the data has {len(classes)}")
    fewest, needed = counts.argmin(), 2 * num_tasks if kind == "homogeneous" else 2
    if counts[fewest] < needed:
        found = f"found {counts[fewest]} (class {classes[fewest]})"
        raise UserError(f"class split {kind}: {num_tasks} tasks need at least {needed} images a class, {found}")

    bits = np.random.PCG64(seed)
    dealt = np.array_split(shuffled(classes, bits), groups)
    images = _shuffled_classes(labels, bits)
    if kind == "homogeneous":
        shares_of = [np.array_split(index, num_tasks) for index in images.values()]
        return [_task(classes, shares) for shares in zip(*shares_of, strict=True)]
    tasks = [_task(group, [images[c] for c in group]) for group in dealt]
    if kind == "paired":
        tasks = [t for task in tasks for t in (task, TaskSplit(task.classes, train=task.test, test=task.train))]
    return tasks


def _task(classes: np.ndarray, images: Sequence[np.ndarray]) -> TaskSplit:
    """Halve each class's images, which are in random order."""
    halves = [np.split(index, [(len(index) + 1) // 2]) for index in images]
    return TaskSplit(np.sort(classes).astype(np.int64), *map(_joined, zip(*halves, strict=True)))


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate(parts)).astype(np.int64)


def _shuffled_classes(labels: np.ndarray, bits: np.random.PCG64 | None = None) -> dict[int, np.ndarray]:
    """Each class and its images in random order, by default one that never changes."""
    bits = bits or np.random.PCG64(CHOICE_SEED)
    return {label: shuffled(np.flatnonzero(labels == label), bits) for label in np.unique(labels)}


def holdout_split(labels: np.ndarray, share: float, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hold a share of each class's images out: a pure function of its arguments.

    Args:
        labels: int `[N]`.
        share: between 0 and 1, exclusive; rounded to whole images of each class, at least one on either side. A
            larger share holds out what a smaller one does, and more.
        classes: their names.

    Returns:
        sorted int64 indices of the images that are left, and of those that are held out.

    Raises:
        UserError: a class with a single image.

    Example:
        >>> rest, held_out = holdout_split(np.repeat(np.arange(3), 10), 0.2, ["a", "b", "c"])
        >>> len(rest), len(held_out)
        (24, 6)
    """
    parts = []
    for label, images in _shuffled_classes(labels).items():
        if len(images) < 2:
            raise UserError(f"holdout: class {classes[label]} has one training image, too few to hold one out")
        count = min(max(round(share * len(images)), 1), len(images) - 1)
        parts.append((images[count:], images[:count]))
    rest, held_out = map(_joined, zip(*parts, strict=True))
    return rest, held_out


def few_per_class(labels: np.ndarray, count: int, skip: int = 0) -> np.ndarray:
    """A fixed random choice of `count` images of each class, as sorted int64 indices.

    A smaller one is part of a larger one. One that leaves out `skip` of each class is disjoint from that of `skip`.
    """
    return _joined([images[skip : skip + count] for images in _shuffled_classes(labels).values()])


def few_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """All images of a fixed random choice of `count` classes, as sorted int64 indices; refused where there are fewer.

    A smaller choice is part of a larger one.
    """
    classes = np.unique(labels)
    if count > len(classes):
        raise UserError(f"{count} classes are asked for, the data has {len(classes)}")
    return np.flatnonzero(np.isin(labels, shuffled(classes, np.random.PCG64(CHOICE_SEED))[:count])).astype(np.int64)


def save_split(path: str | Path, splits: Sequence[TaskSplit], fingerprint: str, kind: str, seed: int) -> None:
    """Write a split as JSON, made by `kind` and `seed`, of the data set with this `ImageArrays.fingerprint`."""
    tasks = [{field: getattr(split, field).tolist() for field in _FIELDS} for split in splits]
    head = {"format": _FORMAT, "fingerprint": fingerprint, "kind": kind, "seed": int(seed)}
    text = json.dumps({**head, "tasks": tasks})
    write_atomically(Path(path).expanduser(), lambda file: file.write(text.encode()))


def load_split(path: str | Path, fingerprint: str, labels: np.ndarray) -> tuple[list[TaskSplit], str, int]:
    """Read what `save_split` wrote: the tasks, and the kind and seed that they were made with.

    Args:
        path: the file.
        fingerprint: of the data set that the split is to be used with.
        labels: int `[N]`, those of the data set.

    Raises:
        UserError: no class split, or one of another data set.
    """
    path = Path(path).expanduser()
    document = load_json(path)
    try:
        written_for, kind, seed = document["fingerprint"], document["kind"], document["seed"]
        if document["format"] != _FORMAT or kind not in KINDS or type(seed) is not int or not document["tasks"]:
            raise ValueError(f"format {document['format']}, kind {kind!r}, seed {seed!r}")
        tasks = [TaskSplit(**{field: np.array(task[field]) for field in _FIELDS}) for task in document["tasks"]]
        for numbers in (getattr(task, field) for task in tasks for field in _FIELDS):
            if numbers.dtype != np.int64 or numbers.ndim != 1 or numbers[0] < 0 or (np.diff(numbers) <= 0).any():
                raise ValueError("classes, train and test must be whole numbers that ascend")
        if any(np.intersect1d(task.train, task.test).size for task in tasks):
            raise ValueError("a task whose train and test overlap")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a class split ({type(error).__name__}: {error})") from error
    if written_for != fingerprint:
        made_for = f"fingerprint {str(written_for)[:12]}, this data set has {fingerprint[:12]}"
        raise UserError(
            f"{path}: made for other data ({made_for}); make the split again or use the data set it was made for"
        )
    for number, task in enumerate(tasks):
        images = np.concatenate([task.train, task.test])
        if images.max() >= len(labels) or not np.isin(labels[images], task.classes).all():
            raise UserError(f"{path}: task {number} names images that the data set lacks or that are of other classes")
    return tasks, kind, seed
