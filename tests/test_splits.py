"""Class splits: disjoint, complete, pure, and the same after a round trip through a file."""

import json

import numpy as np
import pytest
from image_files import refusal, refused

from metaperturb.data.splits import TaskSplit, class_split, few_classes, few_per_class, load_split, save_split

KINDS = ("disjoint", "paired", "homogeneous")


def _labels(classes=20, images=20, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), images))


def _uneven():
    counts = [5, 8, 13, 6, 9, 4, 7, 20, 11, 5, 6]
    return np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))


def _assert_same(tasks, others):
    for a, b in zip(tasks, others, strict=True):
        for field in ("classes", "train", "test"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
            assert getattr(a, field).dtype == getattr(b, field).dtype == np.int64


REQUESTS = [("disjoint", 4), ("disjoint", 3), ("disjoint", 1), ("paired", 4), ("homogeneous", 2)]


@pytest.mark.parametrize("labels", [_labels(), _uneven(), 7 * _labels() + 3])
@pytest.mark.parametrize(("kind", "num_tasks"), REQUESTS)
def test_disjoint_complete_and_halved(labels, kind, num_tasks):
    tasks = class_split(labels, num_tasks, kind, seed=3)
    assert len(tasks) == num_tasks
    uses = np.zeros((2, len(labels)), dtype=int)
    for number, task in enumerate(tasks):
        for part, indices in enumerate((task.train, task.test)):
            assert indices.dtype == np.int64 and (np.diff(indices) > 0).all()
            assert np.isin(labels[indices], task.classes).all()
            uses[part, indices] += 1
        assert not np.intersect1d(task.train, task.test).size
        for c in task.classes:  # of an odd number, the extra one goes to train; with its twin, the other way round
            train, test = ((labels[part] == c).sum() for part in (task.train, task.test))
            assert train - test in ((0, -1) if kind == "paired" and number % 2 else (0, 1))
    assert (uses == 1).all() if kind == "paired" else (uses.sum(0) == 1).all()
    groups = [task.classes for task in tasks[:: 2 if kind == "paired" else 1]]
    if kind == "homogeneous":
        assert all(np.array_equal(group, np.unique(labels)) for group in groups)
        parts = [labels[np.concatenate([task.train, task.test])] for task in tasks]
        assert np.ptp([np.unique(part, return_counts=True)[1] for part in parts], axis=0).max() <= 1
        return
    dealt = np.concatenate(groups)
    assert sorted(dealt) == np.unique(labels).tolist() and (len(groups) == 1 or sorted(dealt) != dealt.tolist())
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    if kind == "paired":
        for even, odd in zip(tasks[::2], tasks[1::2], strict=True):
            _assert_same([even], [TaskSplit(odd.classes, train=odd.test, test=odd.train)])


def test_the_split_of_a_seed_never_changes():
    """Split files and results refer to seeds."""
    tasks = class_split(np.repeat(np.arange(4), 4), 2, "disjoint", seed=0)
    assert [t.classes.tolist() for t in tasks] == [[2, 3], [0, 1]]
    assert [t.train.tolist() for t in tasks] == [[9, 11, 14, 15], [2, 3, 4, 7]]


BAD_REQUESTS = [
    (_labels(), 21, "disjoint", "21 tasks need 21 classes, the data has 20"),
    (_labels(), 5, "paired", "even number of tasks, got 5"),
    (_labels(), 42, "paired", "42 tasks need 21 classes, the data has 20"),
    (_labels(), 11, "homogeneous", "11 tasks need at least 22 images a class, found 20"),
    (np.array([0, 0, 1]), 1, "disjoint", "2 images a class, found 1 (class 1)"),
    (np.array([], dtype=int), 1, "disjoint", "1 classes, the data has 0"),
]


@pytest.mark.parametrize(("labels", "num_tasks", "kind", "says"), BAD_REQUESTS)
def test_impossible_requests(labels, num_tasks, kind, says):
    assert says in refusal(class_split, labels, num_tasks, kind, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_follows_from_its_seed_and_survives_a_file(tmp_path, kind):
    tasks, again, other = (class_split(_labels(), 4, kind, seed) for seed in (9, 9, 2))
    assert any(not np.array_equal(a.train, b.train) for a, b in zip(tasks, other, strict=True))
    path = tmp_path / "new" / "split.json"
    save_split(path, tasks, "abc123", kind, 9)
    read, *made = load_split(path, "abc123", _labels())
    assert made == [kind, 9]
    for found in (read, again):
        _assert_same(tasks, found)
    refused(r"split\.json: made for other data \(fingerprint abc123, .* def456", load_split, path, "def456", _labels())
    refused(r"split\.json: cannot write", save_split, path / "split.json", tasks, "x", kind, 9)
    assert [p.name for p in path.parent.iterdir()] == ["split.json"]


TASK = {"classes": [0], "train": [0], "test": [2]}
GOOD = {"format": 1, "fingerprint": "x", "kind": "disjoint", "seed": 0, "tasks": [TASK]}
BAD_FILES = [
    *("not json", "[]", "{}"),
    *(GOOD | bad for bad in ({"tasks": []}, {"tasks": 7}, {"format": 99}, {"kind": "odd"}, {"seed": None})),
    *(GOOD | {"tasks": [TASK | {"train": train}]} for train in ([], [0, 2], [1, 0], [-1], ["a"], [True], None)),
]


def test_bad_files(tmp_path):
    path, labels = tmp_path / "split.json", _labels()
    refused(r"split\.json: cannot be read as JSON", load_split, path, "x", labels)
    for content in BAD_FILES:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        refused(r"split\.json: (not a class split|cannot be read as JSON)", load_split, path, "x", labels)
    same = np.flatnonzero(labels == labels[0]).tolist()
    fits = {"classes": [int(labels[0])], "train": same[:1], "test": same[1:]}
    for change in ({}, {"train": [0, 10_000]}, {"classes": [39]}):
        path.write_text(json.dumps({**GOOD, "tasks": [fits | change]}))
        if change:
            refused("task 0 names images that the data set lacks or that are of other", load_split, path, "x", labels)
        else:
            load_split(path, "x", labels)


# --- some of each class, some classes


def test_fixed_choice():
    labels = np.random.default_rng(0).permutation(np.repeat([2, 3, 5, 7, 11], 20))
    for choose in (few_per_class, few_classes):
        few, more = choose(labels, 2), choose(labels, 4)
        assert few.dtype == np.int64 and (np.diff(more) > 0).all() and len(more) == 2 * len(few)
        assert np.isin(few, more).all()  # a smaller choice is part of a larger one
    np.testing.assert_array_equal(np.unique(labels[few_per_class(labels, 4)], return_counts=True)[1], 4)
    assert not np.intersect1d(few_per_class(labels, 4), few_per_class(labels, 3, skip=4)).size
    chosen = few_classes(labels, 3)
    np.testing.assert_array_equal(chosen, np.flatnonzero(np.isin(labels, np.unique(labels[chosen]))))
    assert few_per_class(np.zeros(100, dtype=int), 5).tolist() == [3, 11, 13, 20, 92]  # never changes
    assert few_classes(np.arange(20), 3).tolist() == [3, 11, 13]
    assert "4 classes are asked for, the data has 3" in refusal(few_classes, np.arange(3), 4)
