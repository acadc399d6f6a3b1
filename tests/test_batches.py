"""Batches: the crop and the flip, the order of the images, and what a batch depends on."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from metaperturb.data.arrays import from_memory
from metaperturb.data.batches import DeviceImages, TrainingBatches, crop_and_flip, draw

CPU = torch.device("cpu")


def random_images(count, size=6, seed=0):
    """uint8 without zeros, so that the black border can be told from the image."""
    return np.random.default_rng(seed).integers(1, 256, (count, 3, size, size), dtype=np.uint8)


def numbered_images(count):
    """Image i is full of the value i."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 3, 4, 4)).copy()


def stream(images=10, batch_size=4, indices=None, class_ids=None, padding=0, key=(0, 0, "order_train"), labels=None):
    """Of these images, or of so many numbered ones; a label is its number modulo 5."""
    images = numbered_images(images) if isinstance(images, int) else images
    labels = np.arange(len(images)) % 5 if labels is None else labels
    data = DeviceImages(from_memory("made-train", images, labels, "0123456789"), CPU)
    indices = np.arange(len(images)) if indices is None else indices
    return TrainingBatches(data, indices, class_ids, batch_size, padding, key)


def numbers(batch):
    """Which numbered images a batch holds."""
    return ((batch[0][:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def all_crops(image, padding):
    """{(y, x, flip): crop} of one image [3, S, S], by slicing."""
    size, span = image.shape[-1], range(2 * padding + 1)
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    crops = {(y, x, False): padded[:, y : y + size, x : x + size] for y in span for x in span}
    return crops | {(y, x, True): crop[:, :, ::-1] for (y, x, _), crop in crops.items()}


# --- crop and flip


def test_all_offsets_and_both_flips_occur_evenly_and_per_image():
    torch.manual_seed(0)
    drawn = [*zip(*(part.tolist() for part in draw(4000, 2, CPU)), strict=True)]
    seen = Counter(drawn)
    assert len(seen) == 2 * 5 * 5  # both flips, (2p + 1)² offsets
    chi_squared = sum((n - 80) ** 2 / 80 for n in seen.values())
    assert chi_squared < 100  # 49 degrees of freedom: mean 49, beyond 100 one time in 40,000
    assert len({*itertools.pairwise(drawn)}) > 1500  # neighbours are drawn independently of each other


@pytest.mark.parametrize(("size", "padding"), [(8, 4), (6, 2), (5, 1), (6, 0), (3, 4)])
def test_against_a_loop_with_the_same_draws(size, padding):
    images = random_images(24, size)
    before = images.copy()
    torch.manual_seed(3)
    out = crop_and_flip(torch.from_numpy(images), padding)
    torch.manual_seed(3)
    draws = [part.tolist() for part in draw(24, padding, CPU)]
    assert len({*draws[2]}) == 2 and out.dtype == torch.uint8
    for i, key in enumerate(zip(*draws, strict=True)):
        assert np.array_equal(out[i].numpy(), all_crops(images[i], padding)[key])
    out.zero_()
    assert np.array_equal(images, before)


# --- order


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (12, 4), (7, 7), (5, 3), (3, 8), (1, 3)])
def test_every_image_once_an_epoch(count, batch_size):
    batches, epochs, order = stream(count, batch_size), 6, []
    for k in range(-(-epochs * count // batch_size)):
        batch = batches.batch(k)
        assert batch[0].shape == (batch_size, 3, 4, 4)  # always full, also where an epoch ends within it
        order += numbers(batch)
        assert batch[1].tolist() == [i % 5 for i in order[-batch_size:]]  # labels go with their images
    chunks = [tuple(order[e * count : (e + 1) * count]) for e in range(epochs)]
    assert all(sorted(chunk) == list(range(count)) for chunk in chunks)
    if count >= 7:
        assert len(set(chunks)) == epochs  # shuffled anew
        assert all(chunk != tuple(range(count)) for chunk in chunks)


@pytest.mark.parametrize("batch_size", [3, 4, 25])
def test_a_batch_is_a_function_of_its_number_and_the_global_seed(batch_size):
    """Whatever was asked for before: a resumed run asks for one batch of a fresh stream."""

    def batch(batches, k, seed=100):
        torch.manual_seed(seed + k)
        return batches.batch(k)

    *fresh, again = (stream(random_images(10), batch_size, padding=1) for _ in range(13))
    expected = [batch(batches, k) for k, batches in enumerate(fresh)]
    for k in np.random.default_rng(0).permutation(np.tile(np.arange(12), 2)).tolist():
        assert all(torch.equal(a, b) for a, b in zip(batch(again, k), expected[k], strict=True))
    assert not torch.equal(batch(again, 0, seed=200)[0], expected[0][0])


def test_the_order_depends_on_the_key_and_not_on_the_global_state():
    keys = [(0, 0, "order_train"), (1, 0, "order_train"), (0, 1, "order_train"), (0, 0, "order_test")]
    orders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        orders.append([tuple(numbers(stream(50, 50, key=key).batch(0))) for key in keys])
    assert orders[0] == orders[1] and len({*orders[0]}) == 4


# --- labels


def test_labels_are_renumbered_for_a_task():
    labels = np.array([4, 1, 4, 7, 1, 7, 0, 2, 9, 4])
    class_ids = np.array([1, 4, 7])
    indices = np.flatnonzero(np.isin(labels, class_ids))
    batches = stream(10, 7, indices, class_ids, labels=labels)
    for k in range(3):
        batch = batches.batch(k)
        assert sorted(numbers(batch)) == indices.tolist()
        assert batch[1].tolist() == [{1: 0, 4: 1, 7: 2}[labels[i]] for i in numbers(batch)]
