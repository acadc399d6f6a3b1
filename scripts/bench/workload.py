"""What is timed: the tasks of meta-training on made-up images, and the sizes at which."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.timing import interleave
from metaperturb import kernels
from metaperturb.attach import detach
from metaperturb.config import MetaTrainConfig
from metaperturb.data.arrays import ImageArrays, from_memory
from metaperturb.data.batches import DeviceImages
from metaperturb.data.splits import TaskSplit
from metaperturb.meta_train import Task
from metaperturb.perturbation import MetaPerturb
from metaperturb.provenance import available_cores

CLASSES = 20  # of a task: 200 classes of Tiny ImageNet in 10 tasks (section 4.1)
BUSY_SECONDS = {"cpu": 0.02, "cuda": 0.1}  # a turn takes at least this long, for the sake of the clock


@dataclass(frozen=True)
class Sizes:
    """Sizes of all suites."""

    model: str = "resnet20"
    batch: int = 128
    image_size: int = 32
    eval_batch: int = 500  # the program's default
    loader_images: int = 5000
    loader_batches: int = 20  # a turn
    site_maps: tuple[tuple[int, int, int, int], ...] = (
        *((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)),  # of ResNet20
        *((128, 128, 4, 4), (128, 512, 2, 2)),  # as small as those of networks that halve the image five times
    )
    tasks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    tasks_batch: int = 128
    channels: tuple[int, ...] = (1, 4, 16, 64, 256, 512)
    channels_map: tuple[int, int] = (128, 16)  # B, H = W
    image_sizes: tuple[int, ...] = (32, 48, 64, 84, 96)
    image_sizes_batch: int = 128
    batches: tuple[int, ...] = (16, 32, 64, 128, 256)
    processes: tuple[int, ...] = ()  # filled by `sizes_for`: as many as there are cores
    processes_tasks: int = 4
    exchange_processes: tuple[int, ...] = (1, 2, 4, 8, 16)
    exchange_tasks: tuple[int, ...] = (16, 1000, 10_000)
    exchange_calls: int = 10  # exchanges a round


def sizes_for(device: torch.device, smoke: bool) -> Sizes:
    """Sizes that take minutes on two CPU cores, those of a GPU, or tiny ones."""
    if smoke:
        return Sizes(
            model="resnet8",
            batch=8,
            image_size=16,
            eval_batch=8,
            loader_images=64,
            loader_batches=2,
            site_maps=((4, 4, 8, 8),),
            tasks=(1, 2),
            tasks_batch=4,
            channels=(1, 4),
            channels_map=(4, 8),
            image_sizes=(12, 16),
            image_sizes_batch=4,
            batches=(4, 8),
            processes=(1, 2),
            processes_tasks=2,
            exchange_processes=(1, 2),
            exchange_tasks=(2, 40),
            exchange_calls=2,
        )
    most = min(available_cores(), 16) if device.type == "cpu" else 8
    processes = tuple(2**i for i in range(5) if 2**i <= most)
    sizes = Sizes(processes=processes, processes_tasks=max(4, processes[-1]))
    if device.type == "cuda":
        return dataclasses.replace(sizes, site_maps=(*sizes.site_maps, (128, 64, 84, 84)))
    return dataclasses.replace(
        sizes,
        site_maps=(*sizes.site_maps, (16, 64, 84, 84)),
        tasks_batch=32,
        image_sizes_batch=32,
        channels_map=(32, 16),
    )


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure."""

    device: torch.device
    threads: int
    rounds: int
    smoke: bool

    @property
    def sizes(self) -> Sizes:
        return sizes_for(self.device, self.smoke)

    def time(self, variants: dict[str, Callable[[], object]], share: float = 1.0) -> dict[str, dict[str, Any]]:
        """Timings of the variants in this share of the rounds (for costly ones)."""
        turn = 0.0 if self.smoke else BUSY_SECONDS[self.device.type]
        return interleave(variants, max(2, round(share * self.rounds)), self.device, turn)


def made_up_images(count: int, image_size: int, classes: int = CLASSES) -> ImageArrays:
    """Noise: what is in an image does not change how long it takes."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, image_size, image_size), dtype=np.uint8)
    names = [str(label) for label in range(classes)]
    return from_memory("made-up", pixels, np.arange(count) % classes, names)


def make_phi(device: torch.device) -> MetaPerturb:
    torch.manual_seed(0)
    return MetaPerturb().to(device)


class Learner:
    """A task of the meta-training program, whose steps count themselves.

    Args:
        plain: without the perturbation; everything else, data and optimizer too, is the same code.
        kernel: how its sites compute.
        precision: the program's setting.
    """

    def __init__(
        self,
        images: DeviceImages,
        phi: MetaPerturb,
        model: str,
        batch: int,
        *,
        plain: bool = False,
        kernel: str = "auto",
        precision: str = "float32",
        index: int = 0,
    ) -> None:
        image_size = images.arrays.image_size
        config = MetaTrainConfig(model=model, batch_size=batch, image_size=image_size, precision=precision)
        half = len(images.arrays) // 2
        split = TaskSplit(np.arange(CLASSES), np.arange(half), np.arange(half, 2 * half))
        self.kernel = kernel
        self.task = Task(index, split, images, phi, config)
        if plain:
            detach(self.task.model)
        self.steps = itertools.count()

    def theta_step(self) -> tuple:
        with kernels.use_kernel(self.kernel):
            return self.task.theta_step(next(self.steps))

    def meta_step(self) -> tuple:
        """What a task does in one step of meta-training: its θ-step, then its gradient of φ."""
        step = next(self.steps)
        with kernels.use_kernel(self.kernel):
            return self.task.theta_step(step), self.task.phi_gradient(step)

    def two_theta_steps(self) -> None:
        self.theta_step()
        self.theta_step()

    def state_bytes(self) -> int:
        """Parameters, buffers and the optimizer's state."""
        held = [*self.task.model.parameters(), *self.task.model.buffers()]
        for state in self.task.optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def forget_gradients(self) -> None:
        self.task.optimizer.zero_grad(set_to_none=True)
