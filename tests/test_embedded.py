"""The embedded data set: what the demo and the other tests take for granted of it."""

import numpy as np
import pytest
from conftest import python
from image_files import refusal

from metaperturb.data import embedded
from metaperturb.data.embedded import embedded_source, embedded_target


@pytest.fixture(scope="module")
def source():
    return embedded_source(seed=0, image_size=16)


@pytest.fixture(scope="module")
def target():
    return embedded_target(seed=0, image_size=16)


def test_counts_types_and_balance(source, target):
    expected = [(source, 40, 120), (target[0], 16, 25), (target[1], 16, 63)]
    for (images, labels, classes), n_classes, per_class in expected:
        assert images.shape == (n_classes * per_class, 3, 16, 16) and images.dtype == np.uint8
        assert labels.shape == (n_classes * per_class,) and labels.dtype == np.int64
        assert len(classes) == len(set(classes)) == n_classes
        assert np.bincount(labels).tolist() == [per_class] * n_classes
    assert target[0][2] == target[1][2] and not {*source[2]} & {*target[0][2]}


def test_all_images_differ(source, target):
    """Within every set and between them: in particular no test image of the target is a training image."""
    images = [image.tobytes() for part in (source, *target) for image in part[0]]
    assert len(set(images)) == len(images)


def test_pure_function_of_the_seed():
    first, again, other = (embedded_target(seed, image_size=8) for seed in (1, 1, 2))
    for (images, labels, _), (images_2, labels_2, _) in zip(first, again, strict=True):
        assert np.array_equal(images, images_2) and np.array_equal(labels, labels_2)
    assert not np.array_equal(first[0][0], other[0][0])
    source_1, source_2 = embedded_source(1, image_size=8), embedded_source(2, image_size=8)
    assert not np.array_equal(source_1[0], source_2[0]) and np.array_equal(source_1[1], source_2[1])


def nearest_mean_accuracy(features, labels, test_features, test_labels) -> float:
    means = np.stack([features[labels == k].mean(0) for k in range(labels.max() + 1)])
    distance = ((test_features[:, None] - means[None]) ** 2).sum(-1)
    return float((distance.argmin(1) == test_labels).mean())


def test_color_does_not_give_the_class_away(source, target):
    """Nearest class mean on mean RGB stays below twice chance."""

    def color(images):
        return images.mean((2, 3))

    images, labels, classes = source
    even = np.arange(len(labels)) % 2 == 0
    accuracy = nearest_mean_accuracy(color(images[even]), labels[even], color(images[~even]), labels[~even])
    assert accuracy < 2 / len(classes)
    (images, labels, classes), (test_images, test_labels, _) = target
    assert nearest_mean_accuracy(color(images), labels, color(test_images), test_labels) < 2 / len(classes)


def test_every_image_shows_something(source, target):
    for images, _, _ in (source, *target):
        gray = images.mean(1)
        assert gray.std((1, 2)).min() > 8  # of 255; an empty picture with the strongest sensor noise has 6
        assert 40 < gray.mean() < 215


@pytest.mark.parametrize("size", [8, 13])
def test_any_image_size(size):
    train, test = embedded_target(seed=0, image_size=size)
    assert train[0].shape == (400, 3, size, size) and test[0].shape == (1008, 3, size, size)
    assert "image_size is 7" in refusal(embedded_target, image_size=7)


@pytest.mark.parametrize("classes", [embedded._SOURCE_CLASSES, embedded._TARGET_CLASSES])
def test_every_class_is_closed_under_mirroring(classes):
    """The figure is symmetric in v, so that a flipped picture is one of the same class in another pose."""
    line = np.linspace(-1, 1, 33)
    u, v = np.broadcast_to(line[:, None], (1, 33, 33)), np.broadcast_to(line, (1, 33, 33))
    for draw in classes.values():
        distance, _ = draw(np.random.default_rng(0), u, v)
        np.testing.assert_allclose(distance, distance[:, :, ::-1], atol=1e-12)
        assert (distance < 0).any() and (distance > 0).any()


@pytest.mark.slow
def test_another_process_draws_the_same():
    code = """
        import zlib
        from metaperturb.data.embedded import embedded_target
        print([zlib.crc32(part[0]) for part in embedded_target(3, 8)])
    """
    first, second = (python(code, PYTHONHASHSEED=seed).communicate()[0] for seed in "12")
    assert first == second != ""
