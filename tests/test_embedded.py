"""The embedded data set: what the demo and the other tests take for granted of it."""

import zlib

import numpy as np
import pytest
from image_files import refusal

from metaperturb.data import embedded as module
from metaperturb.data.embedded import embedded


@pytest.fixture(scope="module")
def source():
    return embedded("source", 16)


@pytest.fixture(scope="module")
def target():
    return embedded("train", 16), embedded("test", 16)


def test_counts_types_and_balance(source, target):
    expected = [(source, 40, 120), (target[0], 16, 25), (target[1], 16, 63)]
    for (images, labels, classes), n_classes, per_class in expected:
        assert images.shape == (n_classes * per_class, 3, 16, 16) and images.dtype == np.uint8
        assert labels.shape == (n_classes * per_class,) and labels.dtype == np.int64
        assert len(classes) == len(set(classes)) == n_classes
        assert np.bincount(labels).tolist() == [per_class] * n_classes
        gray = images.mean(1)
        assert gray.std((1, 2)).min() > 8  # of 255; an empty picture with the strongest sensor noise has 6
        assert 40 < gray.mean() < 215
    assert target[0][2] == target[1][2] and not {*source[2]} & {*target[0][2]}


def test_all_images_differ(source, target):
    """Within every set and between them: in particular no test image of the target is a training image."""
    images = [image.tobytes() for part in (source, *target) for image in part[0]]
    assert len(set(images)) == len(images)


def test_any_size_and_always_the_same_images():
    assert embedded("train", 13)[0].shape == (400, 3, 13, 13)
    crcs = [zlib.crc32(embedded(part, 8)[0]) for part in ("source", "train", "test")]
    assert crcs == [3183415865, 2848607719, 1047292338]  # as results have them
    assert "image_size is 7" in refusal(embedded, "train", 7)


def nearest_mean_accuracy(features, labels, test_features, test_labels) -> float:
    means = np.stack([features[labels == k].mean(0) for k in range(labels.max() + 1)])
    distance = ((test_features[:, None] - means[None]) ** 2).sum(-1)
    return float((distance.argmin(1) == test_labels).mean())


def test_color_does_not_give_the_class_away(source, target):
    """Nearest class mean on mean RGB stays below twice chance."""
    images, labels, classes = source
    halves = [(images[i::2], labels[i::2], classes) for i in (0, 1)]
    for (images, labels, classes), (test_images, test_labels, _) in (halves, target):
        colors = images.mean((2, 3)), test_images.mean((2, 3))
        assert nearest_mean_accuracy(colors[0], labels, colors[1], test_labels) < 2 / len(classes)


@pytest.mark.parametrize("classes", [module._SOURCE_CLASSES, module._TARGET_CLASSES])
def test_every_class_is_closed_under_mirroring(classes):
    """The figure is symmetric in v, so that a flipped picture is one of the same class in another pose."""
    line = np.linspace(-1, 1, 33)
    u, v = np.broadcast_to(line[:, None], (1, 33, 33)), np.broadcast_to(line, (1, 33, 33))
    for draw in classes.values():
        distance, _ = draw(np.random.default_rng(0), u, v)
        np.testing.assert_allclose(distance, distance[:, :, ::-1], atol=1e-12)
        assert (distance < 0).any() and (distance > 0).any()
