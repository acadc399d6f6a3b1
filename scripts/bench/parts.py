"""What the benchmark times: each part returns groups, name → `unit`, `timings`, and the settings behind them."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.timing import WARM_UP, interleave, peak_memory, summary
from metaperturb import kernels, models
from metaperturb.attach import attach, detach
from metaperturb.config import MetaTrainConfig
from metaperturb.data.arrays import from_memory
from metaperturb.data.batches import DeviceImages, normalize
from metaperturb.data.splits import TaskSplit
from metaperturb.distributed import Group
from metaperturb.meta_train import Task, joint_step
from metaperturb.perturbation import MetaPerturb, PerturbSite
from metaperturb.prediction import log_prediction, make_deterministic, predict

CLASSES = 20  # of a task: 200 classes of Tiny ImageNet in 10 tasks (section 4.1)
FORMATS = ("float32", "bfloat16", "channels-last")
PASSES = ("forward", "with gradient of h", "with gradient of h and φ")  # of a site
IMPORTS = ("torch", "metaperturb", "metaperturb.meta_test")

Groups = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """Where, how long and at which sizes to measure."""

    device: torch.device
    threads: int
    rounds: int  # turns of each variant
    turn: float = 0.02  # seconds: a cheap variant is repeated until a turn lasts as long
    model: str = "resnet20"
    batch: int = 128
    image_size: int = 32
    eval_batch: int = 500  # the program's default
    tasks: int = 10
    site: tuple[int, int, int, int] = (128, 16, 32, 32)  # [B, C, H, W], ResNet20's first

    def time(self, variants: dict[str, Callable[[], object]], share: float = 1.0) -> dict[str, Any]:
        """Timings of the variants in this share of the rounds (for costly ones), as a group."""
        rounds = max(2, round(share * self.rounds))
        return {"unit": "s", "timings": interleave(variants, rounds, self.device, self.turn)}

    def images(self, count: int = 2000) -> DeviceImages:
        """Noise: what is in an image does not change how long it takes."""
        shape, labels = (count, 3, self.image_size, self.image_size), np.arange(count) % CLASSES
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return DeviceImages(from_memory("noise", pixels, labels, [*map(str, range(CLASSES))]), self.device)


# Tiny sizes, which test the program and measure nothing.
SMOKE = {"model": "resnet8", "batch": 8, "image_size": 16, "eval_batch": 8, "tasks": 2, "turn": 0.0, "site": (4,) * 4}


def make_phi(device: torch.device) -> MetaPerturb:
    torch.manual_seed(0)
    return MetaPerturb().to(device)


class Learner:
    """A task of the meta-training program, whose steps count themselves.

    `plain`: without the perturbation; everything else, data and optimizer too, is the same code.
    """

    def __init__(
        self,
        bench: Bench,
        images: DeviceImages,
        phi: MetaPerturb,
        *,
        plain: bool = False,
        kernel: str = "auto",
        form: str = "float32",
        index: int = 0,
    ) -> None:
        precision = "bfloat16" if form == "bfloat16" else "float32"
        sizes = {"model": bench.model, "batch_size": bench.batch, "image_size": bench.image_size}
        self.config = MetaTrainConfig(precision=precision, tasks=bench.tasks, **sizes)
        half = len(images.arrays) // 2
        split = TaskSplit(np.arange(CLASSES), np.arange(half), np.arange(half, 2 * half))
        self.kernel, self.task, self.steps = kernel, Task(index, split, images, phi, self.config), itertools.count()
        if plain:
            detach(self.task.model)
        if form == "channels-last":
            self.task.model.to(memory_format=torch.channels_last)

    def theta_step(self) -> object:
        with kernels.use_kernel(self.kernel):
            return self.task.theta_step(next(self.steps))

    def meta_step(self) -> object:
        """What a task does in one step of meta-training: its θ-step, then its gradient of φ."""
        step = next(self.steps)
        return self.task.theta_step(step), self.task.phi_gradient(step)

    def two_theta_steps(self) -> None:
        self.theta_step()
        self.theta_step()


def start(bench: Bench) -> Groups:
    """Seconds in which a fresh interpreter imports PyTorch, the package, and the program of meta-testing."""

    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for round_ in range(max(2, bench.rounds // 3) + 1):
        for name in IMPORTS:
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            if round_:  # the first one reads files that the others find in memory
                seconds[name].append(time.perf_counter() - began)
    return {"start": {"unit": "s", "timings": {f"import {name}": summary(seconds[name]) for name in IMPORTS}}}


def steps(bench: Bench) -> Groups:
    """θ-steps without and with φ (frozen) in three formats; a task's meta-step, and a joint step of all tasks."""
    images, phi = bench.images(), make_phi(bench.device)
    variants = {}
    for form in FORMATS:
        variants[f"plain, {form}"] = Learner(bench, images, phi, plain=True, form=form).theta_step
        variants[f"perturbed, {form}"] = Learner(bench, images, phi, form=form).theta_step
    variants["perturbed, plain operators"] = Learner(bench, images, phi, kernel="plain").theta_step
    plain, perturbed = Learner(bench, images, phi, plain=True), Learner(bench, images, phi)
    variants |= {"two plain steps": plain.two_theta_steps, "meta-step": perturbed.meta_step}

    learners = [Learner(bench, images, phi, index=i) for i in range(bench.tasks)]
    optimizer = torch.optim.Adam(phi.parameters(), lr=1e-3, weight_decay=5e-4, fused=True)
    counter, group = itertools.count(), Group(0, 1, bench.device)

    def plain_steps() -> None:
        for _ in range(bench.tasks):
            plain.two_theta_steps()

    def joint() -> None:
        joint_step(next(counter), [each.task for each in learners], phi, optimizer, group, learners[0].config)

    both = {"two plain steps a task": plain_steps, "joint step": joint}
    return {"steps": bench.time(variants), "joint": bench.time(both, share=0.25)}


def evaluation(bench: Bench) -> Groups:
    """A pass over a batch as `evaluate` makes it, plain and deterministic; its Monte-Carlo samples; and `predict`."""
    x = normalize(bench.images(bench.eval_batch).take(torch.arange(bench.eval_batch, device=bench.device))[0])
    few, phi = x[: max(2, bench.eval_batch // 10)], make_phi(bench.device).requires_grad_(False)
    plain, perturbed, deterministic = (
        models.create(bench.model, CLASSES, bench.image_size).to(bench.device).eval() for _ in range(3)
    )
    for model in (perturbed, deterministic):
        attach(model, phi, bench.image_size, paper=True, verbose=False)
    make_deterministic(deterministic, [x])

    def passes(model: torch.nn.Module, images: Tensor, count: int = 1) -> Callable[[], object]:
        return torch.no_grad()(lambda: [model(images).log_softmax(dim=1) for _ in range(count)])

    once = {"plain pass": passes(plain, x), "deterministic pass": passes(deterministic, x)}
    samples = {"10 plain passes": passes(plain, x, 10), "10 samples": lambda: log_prediction(perturbed, x, samples=10)}
    draws = {"20 plain passes": passes(plain, few, 20), "predict": lambda: predict(perturbed, few, samples=20)}
    return {
        "evaluation": bench.time(once),
        "samples": bench.time(samples, share=0.25),
        "predict": bench.time(draws, share=0.25),
    }


def memory(bench: Bench) -> Groups:
    """Peak memory of a θ-step: parameters, buffers and optimizer, and the most that a step adds to them."""
    images, timings = bench.images(), {}
    for name, plain in (("plain", True), ("perturbed", False)):
        learner = Learner(bench, images, make_phi(bench.device), plain=plain)
        for _ in range(WARM_UP[bench.device.type]):
            learner.theta_step()
        learner.task.optimizer.zero_grad(set_to_none=True)
        held = [*learner.task.model.parameters(), *learner.task.model.buffers()]
        for state in learner.task.optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, Tensor)]
        added = peak_memory(learner.theta_step, bench.device)
        timings[name] = summary([float(added + sum(tensor.nbytes for tensor in held))])
    return {"memory": {"unit": "bytes", "timings": timings}}


def site(bench: Bench) -> Groups:
    """One site alone in training mode: forward, backward to the feature map, and to φ as well."""
    phi = make_phi(bench.device)
    perturb = PerturbSite(phi, channels=bench.site[1], size_norm=bench.site[2]).to(bench.device).train()
    h, upstream = torch.randn(bench.site, device=bench.device), torch.randn(bench.site, device=bench.device)

    def call(kernel: str, what: str) -> Callable[[], object]:
        learns_phi = what == PASSES[2]

        def run() -> None:
            phi.requires_grad_(learns_phi)
            leaf = h.detach().requires_grad_(what != PASSES[0])
            with kernels.use_kernel(kernel):
                out = perturb(leaf)
                if out.requires_grad:
                    torch.autograd.grad(out, [leaf, *phi.parameters()] if learns_phi else leaf, upstream)

        return run

    variants = {f"{what}, {kernel}": call(kernel, what) for what in PASSES for kernel in ("auto", "plain")}
    return {"site": bench.time({**variants, "noise alone": lambda: torch.randn_like(h)})}
