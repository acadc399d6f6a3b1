"""Random streams that are pure functions of (seed, task, purpose, step).

Nothing random depends on which process runs a task or on what ran before, so results do not depend on the number of
processes, and resuming needs no generator state: the step number says it all.
"""

import functools

import numpy as np
import torch

cuda_is_available = functools.cache(torch.cuda.is_available)

# The place of a purpose is part of what a seed means for ever: new ones come last.
PURPOSES = """phi init order_train order_test theta_step phi_step evaluate method_init attack attacked calibration
scales one_pass"""


def numpy_generator(seed: int, task: int, purpose: str, step: int = 0) -> np.random.Generator:
    """An independent NumPy stream; what `permutation` makes of its bits is a matter of NumPy's version, too."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, task, purpose, step)))


def seed_torch(seed: int, task: int, purpose: str, step: int = 0) -> None:
    """Seed PyTorch's generators of the CPU and of all GPUs, without waiting for any of them."""
    value = int(_sequence(seed, task, purpose, step).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(value)
    # What torch.manual_seed does beyond this, on backends that we do not use, costs half a millisecond a call.
    if cuda_is_available():
        torch.cuda.manual_seed_all(value)


def _sequence(seed: int, task: int, purpose: str, step: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, task, PURPOSES.split().index(purpose), step))
