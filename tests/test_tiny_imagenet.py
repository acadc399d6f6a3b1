"""Tiny ImageNet in its official layout, whole or in parts."""

import numpy as np
from image_files import expected_pixels, picture, refused, tiny_imagenet, write_folder, write_zip

from metaperturb.data import load

WNIDS = ("n02", "n01", "n10")


def _layout(first: int, last: int, val: bool = True) -> dict[str, bytes]:
    """Images `first … last - 1` of each class; half of the validation images are here."""
    return tiny_imagenet(WNIDS, range(first, last), 4 * WNIDS if val else (), there=6)


def _load(root, *paths, split="train", **options):
    return load("tiny_imagenet", data_root=root, paths=paths, splits=(split,), **options)[0]


def test_whole_parts_and_folder_are_the_same(tmp_path):
    layout = _layout(0, 12)
    whole = write_zip(tmp_path / "whole.zip", layout)
    one = write_zip(tmp_path / "one.zip", _layout(0, 5))
    two = write_zip(tmp_path / "two.zip", _layout(5, 12, val=False))
    overlapping = write_zip(tmp_path / "overlapping.zip", _layout(3, 12))
    folder = write_folder(tmp_path / "folder", layout)
    write_folder(tmp_path / "root0", layout)  # the usual places
    write_folder(tmp_path / "root1", {"tiny-imagenet-200.zip": whole.read_bytes()})
    choices = [(whole,), (one, two), (two, one), (one, overlapping), (folder,), (folder / "tiny-imagenet-200",)]
    choices = [(), (), *choices]
    found = [_load(tmp_path / f"root{i}", *paths) for i, paths in enumerate(choices)]
    assert len({arrays.fingerprint for arrays in found}) == 1
    for arrays in found:
        np.testing.assert_array_equal(arrays.images, found[0].images)
        np.testing.assert_array_equal(arrays.labels, np.repeat(np.arange(3), 12))
    assert found[0].classes == ("n01", "n02", "n10")
    # By class, then by file name as plain text: 0, 1, 10, 11, 2, …
    names = sorted(name for name in layout if "/train/" in name and name.endswith("JPEG"))
    for arrays, size in ((found[0], 32), (_load(tmp_path, whole, image_size=64), 64)):
        np.testing.assert_array_equal(arrays.images, np.stack([expected_pixels(layout[n], size) for n in names]))


def test_validation_images(tmp_path, capsys):
    """A part is told from the whole: no error, but not the data set either."""
    layout = _layout(0, 2)
    paths = [write_zip(tmp_path / "one.zip", layout), write_zip(tmp_path / "two.zip", _layout(2, 4, val=False))]
    val = _load(tmp_path, *paths, split="test")
    train = _load(tmp_path, *paths)
    assert val.classes == train.classes
    said = capsys.readouterr().err
    for found in ("val: 6 of the 10,000", "train: 12 of the 100,000"):
        assert f"tiny_imagenet-{found} images of 200 classes of Tiny ImageNet" in said
    # Sorted by class: val_1, val_4 are n01 (label 0), val_0, val_3 n02, val_2, val_5 n10.
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for image, number in zip(val.images, [1, 4, 0, 3, 2, 5], strict=True):
        content = layout[f"tiny-imagenet-200/val/images/val_{number}.JPEG"]
        np.testing.assert_array_equal(image, expected_pixels(content, 32))
    refused(r"two\.zip: no labelled validation images", _load, tmp_path, paths[1], split="test")


def test_what_is_not_tiny_imagenet(tmp_path):
    good = write_zip(tmp_path / "good.zip", _layout(0, 2))
    foreign = write_zip(tmp_path / "foreign.zip", {"cifar/train/cat/1.png": picture(1)})
    for paths in ([foreign], [good, foreign]):
        refused(r"foreign\.zip: not Tiny ImageNet", _load, tmp_path, *paths)
    unknown = {"tiny-imagenet-200/val/val_annotations.txt": b"val_0.JPEG\tn77\t0\n"}
    path = write_zip(tmp_path / "x.zip", {**_layout(0, 2), **unknown})
    refused(r"val_annotations\.txt, line 1", _load, tmp_path, path, split="test")
