"""Suite `bars`: what the perturbation costs beside the plain network, and our loader beside PyTorch's."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.timing import WARM_UP, peak_memory, ratio, seconds_a_call, summary
from bench.workload import Bench, Learner, made_up_images, make_phi
from metaperturb import kernels, models
from metaperturb.attach import attach
from metaperturb.data.arrays import ImageArrays
from metaperturb.data.batches import DeviceImages, TrainingBatches, crop_padding, normalize

# What a perturbed step may cost: at most these multiples of a plain one; the loader at least.
BARS = {
    "cpu": {"theta_step": 1.5, "meta_step": 1.5, "memory": 1.3, "loader": 10.0, "evaluation": 1.5},
    "cuda": {"theta_step": 1.2, "meta_step": 1.3, "memory": 1.3, "loader": 50.0, "evaluation": 1.2},
}


def bars(bench: Bench) -> dict[str, Any]:
    """The perturbed network beside the plain one, and our loader beside PyTorch's, each with its bar."""
    limits = BARS[bench.device.type]
    groups = {
        "steps": steps(bench),
        "formats": formats(bench),
        "memory": memory(bench),
        "loader": loader(bench),
        "evaluation": evaluation(bench),
    }
    best_loader = min(
        (name for name in groups["loader"]["timings"] if name != "ours"),
        key=lambda name: groups["loader"]["timings"][name]["median"],
    )
    compared = [
        ("theta_step", "steps", "θ-step, perturbed", "θ-step, plain"),
        ("meta_step", "steps", "meta-step", "two θ-steps, plain"),
        ("memory", "memory", "perturbed", "plain"),
        ("loader", "loader", best_loader, "ours"),
        ("evaluation", "evaluation", "perturbed", "plain"),
    ]
    further = [
        ("steps", "θ-step, perturbed, plain kernel", "θ-step, plain"),
        ("steps", "meta-step, plain kernel", "two θ-steps, plain"),
        ("memory", "perturbed, plain kernel", "plain"),
        ("evaluation", "perturbed, plain kernel", "plain"),
        *(("formats", f"perturbed, {format_}", f"plain, {format_}") for format_ in FORMATS),
    ]
    ratios = []
    for name, group, numerator, denominator in compared:
        found = ratio(groups[group]["timings"], numerator, denominator)
        met = found["ratio"] >= limits[name] if name == "loader" else found["ratio"] <= limits[name]
        ratios.append({"name": name, "group": group, **found, "bar": limits[name], "met": met})
    for group, numerator, denominator in further:
        ratios.append({"group": group, **ratio(groups[group]["timings"], numerator, denominator)})
    return {"groups": groups, "ratios": ratios}


def steps(bench: Bench) -> dict[str, Any]:
    """A θ-step without and with φ (frozen), and a task's meta-step beside two plain θ-steps: equally many passes."""
    sizes = bench.sizes
    images = DeviceImages(made_up_images(2000, sizes.image_size), bench.device)
    phi = make_phi(bench.device)
    plain = Learner(images, phi, sizes.model, sizes.batch, plain=True)
    fused = Learner(images, phi, sizes.model, sizes.batch)
    unfused = Learner(images, phi, sizes.model, sizes.batch, kernel="plain")
    timings = bench.time(
        {
            "θ-step, plain": plain.theta_step,
            "θ-step, perturbed": fused.theta_step,
            "θ-step, perturbed, plain kernel": unfused.theta_step,
            "two θ-steps, plain": plain.two_theta_steps,
            "meta-step": fused.meta_step,
            "meta-step, plain kernel": unfused.meta_step,
        }
    )
    settings = {"model": sizes.model, "batch": sizes.batch, "image_size": sizes.image_size}
    return {"settings": settings, "unit": "s", "timings": timings}


FORMATS = ("channels last", "bfloat16")


def formats(bench: Bench) -> dict[str, Any]:
    """θ-steps in the other memory format, and in the other precision."""
    sizes = bench.sizes
    images = DeviceImages(made_up_images(2000, sizes.image_size), bench.device)
    phi = make_phi(bench.device)
    variants = {}
    for name, plain in (("plain", True), ("perturbed", False)):
        last = Learner(images, phi, sizes.model, sizes.batch, plain=plain)
        last.task.model.to(memory_format=torch.channels_last)
        coarse = Learner(images, phi, sizes.model, sizes.batch, plain=plain, precision="bfloat16")
        variants |= {f"{name}, channels last": last.theta_step, f"{name}, bfloat16": coarse.theta_step}
    settings = {"model": sizes.model, "batch": sizes.batch, "image_size": sizes.image_size}
    return {"settings": settings, "unit": "s", "timings": bench.time(variants, share=0.5)}


def memory(bench: Bench) -> dict[str, Any]:
    """Peak memory of a θ-step: what is held between steps, and the most that a step adds."""
    sizes = bench.sizes
    images = DeviceImages(made_up_images(2000, sizes.image_size), bench.device)
    learners = {
        "plain": {"plain": True},
        "perturbed": {},
        "perturbed, plain kernel": {"kernel": "plain"},
    }
    timings, held, added = {}, {}, {}
    for name, options in learners.items():
        learner = Learner(images, make_phi(bench.device), sizes.model, sizes.batch, **options)
        held[name], added[name] = step_memory(learner, bench.device)
        timings[name] = summary([float(held[name] + added[name])])
    settings = {"model": sizes.model, "batch": sizes.batch, "image_size": sizes.image_size}
    return {"settings": settings, "unit": "bytes", "timings": timings, "held": held, "added": added}


def step_memory(learner: Learner, device: torch.device) -> tuple[int, int]:
    """Bytes of parameters, buffers and optimizer, and the most that a θ-step needs above them."""
    for _ in range(WARM_UP[device.type]):
        learner.theta_step()
    learner.forget_gradients()
    return learner.state_bytes(), peak_memory(learner.theta_step, device)


class PictureList(Dataset):
    """What torchvision users write: one image at a time, as a PIL picture, through their transforms."""

    def __init__(self, arrays: ImageArrays) -> None:
        self.pixels = arrays.images.transpose(0, 2, 3, 1).copy()  # [N, H, W, 3], as PIL wants it
        self.labels = arrays.labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(arrays.image_size, padding=crop_padding(arrays.image_size)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def loader(bench: Bench) -> dict[str, Any]:
    """Seconds a batch of augmented images on the device: our loader, and PyTorch's with PIL transforms."""
    sizes, device = bench.sizes, bench.device
    arrays = made_up_images(sizes.loader_images, sizes.image_size)
    ours = TrainingBatches(
        DeviceImages(arrays, device),
        torch.arange(len(arrays)).numpy(),
        None,
        sizes.batch,
        crop_padding(sizes.image_size),
        (0, 0, "order_train"),
    )
    numbers = itertools.count()
    pictures = PictureList(arrays)

    def ours_seconds() -> float:
        return seconds_a_call(lambda: ours.batch(next(numbers)), sizes.loader_batches, device)

    def theirs_seconds(workers: int) -> float:
        dataloader = DataLoader(
            pictures,
            sizes.batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        batches = _endless(dataloader)
        for _ in range(2 * workers + 1):  # workers start, and what they made ahead meanwhile is used up
            next(batches)

        def one() -> None:
            for part in next(batches):
                part.to(device, non_blocking=True)

        seconds = seconds_a_call(one, sizes.loader_batches, device)
        batches.close()
        return seconds

    variants = {"ours": ours_seconds}
    for workers in (0, bench.threads):
        variants[f"DataLoader, {workers} workers"] = lambda workers=workers: theirs_seconds(workers)
    ours_seconds()
    rounds = max(2, bench.rounds // 2)
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            seconds[name].append(measure())
    settings = {"batch": sizes.batch, "image_size": sizes.image_size, "batches_a_turn": sizes.loader_batches}
    return {"settings": settings, "unit": "s", "timings": {name: summary(values) for name, values in seconds.items()}}


def _endless(dataloader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from dataloader


def evaluation(bench: Bench) -> dict[str, Any]:
    """One pass over a batch as `evaluate` makes it: a Monte-Carlo sample of the perturbed network, or the plain one."""
    sizes, device = bench.sizes, bench.device
    images = DeviceImages(made_up_images(sizes.eval_batch, sizes.image_size), device)
    x = normalize(images.take(torch.arange(sizes.eval_batch, device=device))[0])
    phi = make_phi(device).requires_grad_(False)

    def network(perturbed: bool, kernel: str = "auto") -> Callable[[], object]:
        model = models.create(sizes.model, 20, sizes.image_size).to(device)
        if perturbed:
            attach(model, phi, sizes.image_size, verbose=False)
        model.eval()

        def sample() -> Tensor:
            with torch.no_grad(), kernels.use_kernel(kernel):
                return model(x).log_softmax(dim=1)

        return sample

    variants = {
        "plain": network(False),
        "perturbed": network(True),
        "perturbed, plain kernel": network(True, "plain"),
    }
    settings = {"model": sizes.model, "batch": sizes.eval_batch, "image_size": sizes.image_size}
    return {"settings": settings, "unit": "s", "timings": bench.time(variants)}
