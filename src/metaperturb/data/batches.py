"""Batches of images: uint8 where they lie, cropped and flipped by batched tensor code on the training device."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metaperturb.data.arrays import ImageArrays
from metaperturb.randomness import numpy_generator

UPLOADED = 4096  # images at a time: a copy of all of them in each process would be gigabytes


class DeviceImages:
    """A data set where training reads it: in the memory of a GPU as uint8, or the memory-mapped file on a CPU."""

    def __init__(self, arrays: ImageArrays, device: torch.device) -> None:
        self.arrays, self.device = arrays, device
        self.on_gpu = device.type != "cpu"
        if self.on_gpu:
            self.images = torch.empty(arrays.images.shape, dtype=torch.uint8, device=device)
            for part in range(0, len(arrays.images), UPLOADED):
                rows = slice(part, part + UPLOADED)
                self.images[rows] = torch.from_numpy(np.array(arrays.images[rows]))
            self.labels = torch.from_numpy(np.array(arrays.labels)).to(device)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images `[B, 3, S, S]` and labels `[B]` at `indices` `[B]` (on the device)."""
        if self.on_gpu:
            return self.images[indices], self.labels[indices]
        rows = indices.numpy()
        return torch.from_numpy(self.arrays.images[rows]), torch.from_numpy(self.arrays.labels[rows])


class TrainingBatches:
    """An endless, shuffled, augmented stream over part of a data set; batch `k` is a function of `k` alone.

    Epoch after epoch is laid end to end and cut into batches, so every batch has the full size and every image is seen
    once an epoch.

    Args:
        images: the data set.
        indices: which of its images, `[n]` int64.
        class_ids: data-set label → label here, for tasks that see some classes only: sorted class ids `[K]`, or None.
        batch_size: B.
        padding: border of black pixels, in which the crop of the original size moves.
        key: `(seed, task, purpose)` of the shuffling.
        augment: what further happens to the cropped and flipped uint8 images `[B, 3, S, S]`, or None.
    """

    def __init__(
        self,
        images: DeviceImages,
        indices: np.ndarray,
        class_ids: np.ndarray | None,
        batch_size: int,
        padding: int,
        key: tuple[int, int, str],
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.images, self.batch_size, self.padding, self.key, self.augment = images, batch_size, padding, key, augment
        self.indices = np.ascontiguousarray(indices, dtype=np.int64)
        self._epoch = lru_cache(2)(self._shuffled)  # a batch may lie across two
        self.new_label: Tensor | None = None
        if class_ids is not None:
            table = np.full(images.arrays.num_classes, -1, dtype=np.int64)
            table[class_ids] = np.arange(len(class_ids))
            self.new_label = torch.from_numpy(table).to(images.device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch `step` (from 0): images `[B, 3, S, S]` float in [-1, 1] and labels `[B]`, on the device.

        Crop offsets and flips come from PyTorch's global generator of the device: seed it first to reproduce a batch.
        """
        indices, images = self._indices(step), self.images
        x, labels = images.take(indices)
        x = crop_and_flip(x, self.padding)
        x = normalize(x if self.augment is None else self.augment(x))
        return x, labels if self.new_label is None else self.new_label[labels]

    def _indices(self, step: int) -> Tensor:
        first, count = step * self.batch_size, len(self.indices)
        epochs = range(first // count, (first + self.batch_size - 1) // count + 1)
        order = self._epoch(epochs[0]) if len(epochs) == 1 else torch.cat([*map(self._epoch, epochs)])
        return order[first - epochs[0] * count :][: self.batch_size]

    def _shuffled(self, epoch: int) -> Tensor:
        order = torch.from_numpy(numpy_generator(*self.key, epoch).permutation(self.indices))
        if self.images.on_gpu:  # from pinned memory, so that the host does not wait for the device
            order = order.pin_memory().to(self.images.device, non_blocking=True)
        return order


def crop_padding(image_size: int) -> int:
    """Width in pixels of the black border that images are cropped from: 4 at 32 px, 8 above."""
    return 4 if image_size <= 32 else 8


def crop_and_flip(images: Tensor, padding: int) -> Tensor:
    """Random crop from a black border of `padding` pixels, then a random horizontal flip, per image.

    uint8 `[B, 3, S, S]` → uint8 `[B, 3, S, S]` (section 4, "base regularizations").
    """
    batch, _, height, width = images.shape
    top, left, flip = draw(batch, padding, images.device)
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # [B, 3, 2p + 1, 2p + 1, S, S]
    images = windows[torch.arange(batch, device=images.device), :, top, left]
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def draw(batch: int, padding: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where each crop begins in the image with its border (top, left) and whether it is flipped: `[B]` each."""
    span = 2 * padding + 1
    top, left = torch.randint(span, (2, batch), device=device)
    return top, left, torch.rand(batch, device=device) < 0.5


def normalize(images: Tensor) -> Tensor:
    """uint8 → float in [-1, 1], same shape and, on whatever device, the same bits."""
    half = torch.full((), 127.5, device=images.device)  # dividing by a number of the host, a GPU multiplies by 1/127.5
    return images.float().div_(half).sub_(1.0)
