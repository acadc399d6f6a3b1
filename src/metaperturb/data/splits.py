"""Class splits of the source data set into tasks (section 3.3 of the paper), and other parts of a training set: images
held out of it, some of each class, some of its classes."""

import json
from collections.abc import Iterator, Sequence
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
    """One task's part of the source data set.

    Attributes:
        classes: sorted int64 class ids; the task's own label of an image is the position of its class here.
        train: sorted int64 indices of D_tr, on which the task's network is trained.
        test: sorted int64 indices of D_te, on which φ is; disjoint from `train`.
    """

    classes: np.ndarray
    train: np.ndarray
    test: np.ndarray


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
    if kind not in KINDS:
        raise UserError(f"unknown class split {kind!r}; known: {', '.join(KINDS)}")
    if not isinstance(num_tasks, (int, np.integer)) or num_tasks < 1:
        raise UserError(f"num_tasks {num_tasks!r}: must be a whole number, at least 1")
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UserError(f"seed {seed!r} of the class split: must be a whole number, not negative")
    if kind == "paired" and num_tasks % 2:
        raise UserError(f"class split paired: needs an even number of tasks, got {num_tasks}")
    labels = np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    groups = {"disjoint": num_tasks, "paired": num_tasks // 2, "homogeneous": 1}[kind]
    if groups > len(classes):
        raise UserError(f"class split {kind}: {num_tasks} tasks need {groups} classes, the data has {len(classes)}")
    fewest = counts.argmin()
    if counts[fewest] < (needed := 2 * num_tasks if kind == "homogeneous" else 2):
        raise UserError(
            f"class split {kind}: {num_tasks} tasks need at least {needed} images a class, found {counts[fewest]} "
            f"(class {classes[fewest]})"
        )

    bits = np.random.PCG64(int(seed))
    dealt = np.array_split(shuffled(classes, bits), groups)
    images = {int(c): shuffled(np.flatnonzero(labels == c), bits) for c in classes}
    if kind == "homogeneous":
        shares_of = [np.array_split(index, num_tasks) for index in images.values()]
        return [_task(classes, shares) for shares in zip(*shares_of, strict=True)]
    tasks = [_task(group, [images[int(c)] for c in group]) for group in dealt]
    if kind == "paired":
        tasks = [t for task in tasks for t in (task, TaskSplit(task.classes, train=task.test, test=task.train))]
    return tasks


def _task(classes: np.ndarray, images: Sequence[np.ndarray]) -> TaskSplit:
    """Halve each class's images, which are in random order."""
    halves = [np.split(index, [(len(index) + 1) // 2]) for index in images]
    train, test = (np.sort(np.concatenate(half)).astype(np.int64) for half in zip(*halves, strict=True))
    return TaskSplit(np.sort(classes).astype(np.int64), train, test)


def _shuffled_classes(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each class and its images, in an order that never changes."""
    bits = np.random.PCG64(CHOICE_SEED)
    for label in np.unique(labels):
        yield label, shuffled(np.flatnonzero(labels == label), bits)


def holdout_split(labels: np.ndarray, share: float, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hold a share of each class's images out: a pure function of its arguments.

    Args:
        labels: int `[N]`.
        share: between 0 and 1, exclusive; rounded to whole images of each class, at least one on either side. A
            larger share holds out what a smaller one does, and more.
        classes: names, for error messages.

    Returns:
        sorted int64 indices of the images that are left, and of those that are held out.

    Raises:
        UserError: a class with a single image, or a share out of range.

    Example:
        >>> rest, held_out = holdout_split(np.repeat(np.arange(3), 10), 0.2, ["a", "b", "c"])
        >>> len(rest), len(held_out)
        (24, 6)
    """
    if not 0 < share < 1:
        raise UserError(f"holdout {share}: must be above 0 and below 1")
    parts = []
    for label, images in _shuffled_classes(labels):
        if len(images) < 2:
            raise UserError(f"holdout: class {classes[label]} has one training image, too few to hold one out")
        count = min(max(round(share * len(images)), 1), len(images) - 1)
        parts.append((images[count:], images[:count]))
    rest, held_out = (np.sort(np.concatenate(part)).astype(np.int64) for part in zip(*parts, strict=True))
    return rest, held_out


def few_per_class(labels: np.ndarray, count: int, skip: int = 0) -> np.ndarray:
    """A fixed random choice of `count` images of each class; a smaller one is part of a larger one.

    Args:
        labels: int `[N]`.
        count: images a class.
        skip: leave out as many of each class's (fixed) random order: disjoint from the choice of `skip` images.

    Returns:
        sorted int64 indices `[count · classes]`.

    Raises:
        UserError: a class has fewer images.
    """
    chosen = []
    for label, images in _shuffled_classes(labels):
        if len(images) < skip + count:
            raise UserError(f"{skip + count} images of each class are asked for, class {label} has {len(images)}")
        chosen.append(images[skip : skip + count])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def few_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """All images of a fixed random choice of `count` classes; a smaller choice is part of a larger one.

    Args:
        labels: int `[N]`.
        count: of classes.

    Returns:
        sorted int64 indices.

    Raises:
        UserError: there are fewer classes.
    """
    classes = np.unique(labels)
    if count > len(classes):
        raise UserError(f"{count} classes are asked for, the data has {len(classes)}")
    return np.flatnonzero(np.isin(labels, shuffled(classes, np.random.PCG64(CHOICE_SEED))[:count])).astype(np.int64)


def save_split(path: str | Path, splits: Sequence[TaskSplit], fingerprint: str, kind: str, seed: int) -> None:
    """Write a split as JSON, atomically.

    Args:
        path: the file.
        splits: the tasks.
        fingerprint: of the data set whose indices these are (`ImageArrays.fingerprint`).
        kind, seed: how the split was made.

    Raises:
        UserError: the file cannot be written.
    """
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
        UserError: no such file, no class split in it, or one of another data set.
    """
    path = Path(path).expanduser()
    document = load_json(path)
    try:
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, not {_FORMAT}")
        written_for, kind, seed = document["fingerprint"], document["kind"], document["seed"]
        if kind not in KINDS or type(seed) is not int:
            raise ValueError(f"kind {kind!r}, seed {seed!r}")
        tasks = [TaskSplit(**{field: _numbers(task[field]) for field in _FIELDS}) for task in document["tasks"]]
        if not tasks or any(np.intersect1d(task.train, task.test).size for task in tasks):
            raise ValueError("no tasks, or one whose train and test overlap")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a class split ({type(error).__name__}: {error})") from error
    if written_for != fingerprint:
        raise UserError(
            f"{path}: made for other data (fingerprint {str(written_for)[:12]}, this data set has {fingerprint[:12]}); "
            "make the split again or use the data set it was made for"
        )
    for number, task in enumerate(tasks):
        images = np.concatenate([task.train, task.test])
        if images.max() >= len(labels) or not np.isin(labels[images], task.classes).all():
            raise UserError(f"{path}: task {number} names images that the data set lacks or that are of other classes")
    return tasks, kind, seed


def _numbers(values: list[int]) -> np.ndarray:
    if not values or not all(type(value) is int for value in values) or values[0] < 0 or values != sorted({*values}):
        raise ValueError("classes, train and test must be whole numbers that ascend")
    return np.array(values, dtype=np.int64)
