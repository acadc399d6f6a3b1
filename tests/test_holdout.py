"""Images held out of the training set: which, how many, the same in every run, and no look at the test set."""

import numpy as np
import pytest
from conftest import class_pictures, result
from image_files import refusal, write_zip

import metaperturb.meta_test as program
from metaperturb.data.arrays import from_memory, subset
from metaperturb.data.splits import holdout_split

NAMES = [f"class {i}" for i in range(20)]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_disjoint_complete_and_stratified(share):
    sizes = {0: 2, 3: 7, 4: 50, 9: 101}  # labels need neither be dense nor sorted
    labels = np.random.default_rng(0).permutation(np.repeat(list(sizes), list(sizes.values())))
    rest, held_out = holdout_split(labels, share, NAMES)
    assert sorted([*rest, *held_out]) == list(range(len(labels)))
    assert (np.diff(rest) > 0).all() and (np.diff(held_out) > 0).all()
    for label, size in sizes.items():
        count = (labels[held_out] == label).sum()
        assert 1 <= count <= size - 1 and (abs(count - share * size) <= 0.5 or count in (1, size - 1))


def test_the_choice_is_fixed_for_ever_and_a_larger_share_has_more():
    fewer, more = (holdout_split(np.repeat([0, 1], 10), share, NAMES)[1].tolist() for share in (0.2, 0.3))
    assert more == [1, 2, 3, 11, 13, 15] and {*fewer} < {*more}
    assert "holdout: class class 1 has one training image" in refusal(holdout_split, np.array([0, 0, 1]), 0.2, NAMES)


def test_a_subset_has_a_fingerprint_of_its_own():
    images = np.arange(6 * 3 * 4, dtype=np.uint8).reshape(6, 3, 2, 2)
    whole = from_memory("drawn-train", images, np.array([0, 0, 1, 1, 2, 2]), "abc")
    part = subset(whole, np.array([1, 4]), "rest")
    np.testing.assert_array_equal(part.images, images[[1, 4]])
    assert part.labels.tolist() == [0, 2] and part.classes == ("a", "b", "c") and part.name == "drawn-train-rest"
    others = [subset(whole, np.array(i), n) for i, n in (([1, 4], "holdout"), ([1, 5], "rest"), (range(6), "rest"))]
    assert len({whole.fingerprint, part.fingerprint, *(o.fingerprint for o in others)}) == 5
    assert subset(whole, np.array([1, 4]), "rest").fingerprint == part.fingerprint
    with pytest.raises(ValueError, match="read-only"):
        part.images[0] = 0


@pytest.mark.parametrize("test", ["none", "broken"])
def test_a_run_never_opens_the_test_set(target_settings, tmp_path, capsys, test):
    files = class_pictures(3, 5, "train")
    if test == "broken":
        files |= {f"{of}.png": b"no image" for of in ("train/class00/9", *(f"test/class{c:02}/0" for c in range(3)))}
    archive = write_zip(tmp_path / "images.zip", files)
    settings = [*target_settings, f"target_path={archive}", f"data_root={tmp_path}", "method=base", "steps=2"]
    settings += [f"run_dir={tmp_path / 'tgt'}", "skip_unreadable=true"]
    assert program.main(["--set", *settings]) == 1  # with the test set it cannot work
    assert not (tmp_path / "tgt" / "result.json").exists()
    capsys.readouterr()
    assert program.main(["--set", *settings, "eval_split=holdout"]) == 0
    assert "(3 holdout images, 1 sample)" in capsys.readouterr().out
    found = result(tmp_path / "tgt")
    assert (found["target"]["train"], found["target"]["test"]) == (12, 3)
    assert found["config"]["eval_split"] == "holdout" and found["target"]["name"] == "folder-train-rest"
    caches = [path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert len(caches) == 1 and caches[0].startswith("folder-train-")
