"""Suites `site` and `scaling`: one site alone, and how costs grow."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.bars import step_memory
from bench.processes import in_processes, process_devices
from bench.timing import ratio, summary, synchronize
from bench.workload import Bench, Learner, made_up_images, make_phi
from metaperturb import kernels
from metaperturb.config import MetaTrainConfig
from metaperturb.data.batches import DeviceImages
from metaperturb.distributed import Group
from metaperturb.meta_train import joint_step
from metaperturb.perturbation import MetaPerturb, PerturbSite
from metaperturb.storage import save_json


def site(bench: Bench) -> dict[str, Any]:
    """One site alone in training mode: forward, backward to the feature map, and to φ as well."""
    groups, ratios = {}, []
    for shape in bench.sizes.site_maps:
        name = " × ".join(map(str, shape))
        variants = {}
        for kernel in ("auto", "plain"):
            calls = site_calls(shape, bench.device, kernel)
            variants |= {f"{what}, {kernel}": call for what, call in calls.items()}
        feature_map = torch.randn(shape, device=bench.device)
        variants["drawing the noise"] = lambda h=feature_map: torch.randn_like(h)
        timings = bench.time(variants)
        groups[name] = {"settings": {"shape": list(shape)}, "unit": "s", "timings": timings}
        ratios += [{"group": name, **ratio(timings, f"{what}, plain", f"{what}, auto")} for what in PASSES]
    return {"groups": groups, "ratios": ratios}


PASSES = ("forward", "with gradient of h", "with gradient of h and φ")


def site_calls(shape: tuple[int, int, int, int], device: torch.device, kernel: str) -> dict[str, Callable[[], object]]:
    """A call for each of `PASSES`."""
    torch.manual_seed(0)
    phi = MetaPerturb().to(device)
    perturb = PerturbSite(phi, channels=shape[1], size_norm=shape[2]).to(device).train()
    h = torch.randn(shape, device=device)
    upstream = torch.randn(shape, device=device)
    parameters = list(phi.parameters())

    def forward() -> None:
        phi.requires_grad_(False)
        with torch.no_grad(), kernels.use_kernel(kernel):
            perturb(h)

    def gradient(learns_phi: bool) -> None:
        phi.requires_grad_(learns_phi)
        leaf = h.detach().requires_grad_()
        with kernels.use_kernel(kernel):
            torch.autograd.grad(perturb(leaf), [leaf, *parameters] if learns_phi else [leaf], upstream)

    return dict(zip(PASSES, (forward, lambda: gradient(False), lambda: gradient(True)), strict=True))


# --- scaling


def scaling(bench: Bench) -> dict[str, Any]:
    """How costs grow with tasks, processes, channels, image size and batch."""
    image_sizes, batches = bench.sizes.image_sizes, bench.sizes.batches
    groups = {
        "tasks": with_tasks(bench),
        "processes": with_processes(bench),
        "channels": with_channels(bench),
        "image size": with_steps(bench, [(bench.sizes.image_sizes_batch, size) for size in image_sizes], "image size"),
        "batch": with_steps(bench, [(batch, bench.sizes.image_size) for batch in batches], "batch"),
    }
    ratios = []
    for group in ("image size", "batch"):
        for value in groups[group]["settings"]["values"]:
            timings = groups[group]["timings"]
            ratios.append({"group": group, **ratio(timings, f"perturbed {value}", f"plain {value}")})
    for value in bench.sizes.channels:
        ratios.append(
            {"group": "channels", **ratio(groups["channels"]["timings"], f"plain kernel {value}", f"auto {value}")}
        )
    return {"groups": groups, "ratios": ratios}


class JointStep:
    """The program's step of meta-training over some tasks, without checkpoints and metrics; it counts itself."""

    def __init__(self, learners: list[Learner], phi: MetaPerturb, group: Group, num_tasks: int) -> None:
        self.tasks = [learner.task for learner in learners]
        self.config = dataclasses.replace(self.tasks[0].config, tasks=num_tasks)
        self.phi, self.group, self.steps = phi, group, itertools.count()
        self.optimizer = torch.optim.Adam(phi.parameters(), lr=1e-3, weight_decay=5e-4, fused=True)

    def __call__(self) -> None:
        joint_step(next(self.steps), self.tasks, self.phi, self.optimizer, self.group, self.config)


def with_tasks(bench: Bench) -> dict[str, Any]:
    """A joint step over more and more tasks on one process."""
    sizes = bench.sizes
    images = DeviceImages(made_up_images(2000, sizes.image_size), bench.device)
    phi = make_phi(bench.device)
    learners = [Learner(images, phi, sizes.model, sizes.tasks_batch, index=i) for i in range(max(sizes.tasks))]
    alone = Group(0, 1, bench.device)
    variants = {str(count): JointStep(learners[:count], phi, alone, count) for count in sizes.tasks}
    timings = bench.time(variants, share=0.35)  # 64 tasks on a CPU take seconds
    settings = {
        "model": sizes.model,
        "batch": sizes.tasks_batch,
        "image_size": sizes.image_size,
        "values": list(sizes.tasks),
    }
    return {"settings": settings, "unit": "s", "timings": timings, "held_by_a_task": learners[0].state_bytes()}


def with_processes(bench: Bench) -> dict[str, Any]:
    """The same tasks dealt to more and more processes, each with the program's number of threads."""
    sizes = bench.sizes
    blocks = 1 if bench.smoke else 2  # processes come and go, so that blocks of steps are interleaved, not steps
    rounds = max(2, round(0.3 * bench.rounds))
    seconds: dict[int, list[float]] = {count: [] for count in sizes.processes}
    for _ in range(blocks):
        for count in sizes.processes:
            arguments = (sizes.model, sizes.tasks_batch, sizes.image_size, sizes.processes_tasks, rounds)
            seconds[count] += in_processes(joint_steps, arguments, process_devices(bench, count))
    settings = {
        "model": sizes.model,
        "batch": sizes.tasks_batch,
        "image_size": sizes.image_size,
        "tasks": sizes.processes_tasks,
        "threads_a_process": MetaTrainConfig().threads,
        "values": list(sizes.processes),
    }
    return {
        "settings": settings,
        "unit": "s",
        "timings": {str(count): summary(values) for count, values in seconds.items()},
    }


def joint_steps(group: Group, model: str, batch: int, image_size: int, tasks: int, rounds: int, path: Path) -> None:
    """In each process: seconds of `rounds` joint steps, measured by process 0."""
    torch.set_num_threads(MetaTrainConfig().threads)
    images = DeviceImages(made_up_images(1000, image_size), group.device)
    phi = make_phi(group.device)
    learners = [Learner(images, phi, model, batch, index=i) for i in group.owned(tasks)]
    step = JointStep(learners, phi, group, tasks)
    step()
    step()
    seconds = []
    for _ in range(rounds):
        synchronize(group.device)
        group.barrier()
        started = time.perf_counter()
        step()
        synchronize(group.device)
        seconds.append(time.perf_counter() - started)
    if group.rank == 0:
        save_json(seconds, path)


def with_channels(bench: Bench) -> dict[str, Any]:
    """A site forward and backward, on maps of one size with more and more channels."""
    batch, side = bench.sizes.channels_map
    variants = {}
    for channels in bench.sizes.channels:
        for kernel, name in (("auto", "auto"), ("plain", "plain kernel")):
            calls = site_calls((batch, channels, side, side), bench.device, kernel)
            variants[f"{name} {channels}"] = calls["with gradient of h"]
    settings = {"batch": batch, "side": side, "values": list(bench.sizes.channels)}
    return {"settings": settings, "unit": "s", "timings": bench.time(variants)}


def with_steps(bench: Bench, shapes: list[tuple[int, int]], what: str) -> dict[str, Any]:
    """Plain and perturbed θ-steps, and their peak memory, at batches and image sizes `(B, S)`."""
    sizes = bench.sizes
    variants, memory_ = {}, {}
    for batch, image_size in shapes:
        value = batch if what == "batch" else image_size
        images = DeviceImages(made_up_images(600, image_size), bench.device)
        for name, plain in (("plain", True), ("perturbed", False)):
            learner = Learner(images, make_phi(bench.device), sizes.model, batch, plain=plain)
            memory_[f"{name} {value}"] = sum(step_memory(learner, bench.device))
            variants[f"{name} {value}"] = learner.theta_step
    fixed = {"image_size": shapes[0][1]} if what == "batch" else {"batch": shapes[0][0]}
    settings = {
        "model": sizes.model,
        **fixed,
        "values": [batch if what == "batch" else image_size for batch, image_size in shapes],
    }
    return {"settings": settings, "unit": "s", "timings": bench.time(variants, share=0.5), "peak_bytes": memory_}
