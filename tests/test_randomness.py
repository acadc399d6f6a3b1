"""The streams of random numbers stay as they are: each published number rests on them."""

import numpy as np
import pytest
import torch

from metaperturb.randomness import PURPOSES, numpy_generator, seed_torch

IN_ORDER = """phi init order_train order_test theta_step phi_step evaluate method_init attack attacked calibration
scales one_pass"""


@pytest.mark.parametrize("purpose", PURPOSES.split())
@pytest.mark.parametrize("step", [0, 3])
def test_streams_stay(purpose, step):
    entropy = np.random.SeedSequence([7, 2, IN_ORDER.split().index(purpose), step])  # seed, task, purpose, step
    drawn = [numpy_generator(7, 2, purpose, *[step] * (step > 0)).bit_generator.random_raw() for _ in range(2)]
    assert drawn == [np.random.PCG64(entropy).random_raw()] * 2
    seed_torch(7, 2, purpose, *[step] * (step > 0))
    assert torch.initial_seed() == int(entropy.generate_state(1, np.uint64)[0])


def test_the_order_of_images_is_that_of_published_results():
    """NumPy may change what `permutation` draws: trainings that resume, or are paired with others, would differ."""
    assert numpy_generator(7, 2, "theta_step", 3).bit_generator.random_raw() == 12820249975398439693
    assert numpy_generator(3, 1, "order_train", 2).permutation(10).tolist() == [8, 3, 0, 7, 5, 2, 4, 9, 1, 6]
