"""How the costs of φ are measured: what is timed, in turns. Each part gives groups, name → `unit` and `timings`."""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from metaperturb import kernels, models
from metaperturb.attach import attach, detach
from metaperturb.config import MetaTrainConfig
from metaperturb.data.arrays import from_memory
from metaperturb.data.batches import DeviceImages, normalize
from metaperturb.data.splits import TaskSplit
from metaperturb.distributed import Group
from metaperturb.errors import UserError
from metaperturb.meta_train import Task, joint_step
from metaperturb.perturbation import MetaPerturb, PerturbSite
from metaperturb.prediction import log_prediction, make_deterministic, predict

CLASSES = 20  # of a task: 200 classes of Tiny ImageNet in 10 tasks (section 4.1)
FORMATS = ("float32", "bfloat16", "channels-last")
PASSES = ("forward", "with gradient of h", "with gradient of h and φ")  # of a site
IMPORTS = ("torch", "metaperturb", "metaperturb.meta_test")
QUARTILES = (0.25, 0.5, 0.75)
WARM_UP = {"cpu": 2, "cuda": 10}  # calls; the first ones compile, tune and fill caches

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

    def time(self, variants: Mapping[str, Callable[[], object]], share: float = 1.0) -> dict[str, Any]:
        """Time variants in turns, so that whatever else the machine does meets all of them alike.

        Every round begins with another one; a variant is called as often in one turn as fills about `turn` seconds.
        There is this share of the rounds, for costly variants. Returns of each the `summary` of the seconds a call, one
        value a round, and `calls`, how many a turn had.
        """
        calls, names = {}, [*variants]
        for name, call in variants.items():
            once = [seconds_a_call(call, 1, self.device) for _ in range(1 + WARM_UP[self.device.type])]
            calls[name] = max(1, math.ceil(self.turn / once[-1]))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for round_ in range(max(2, round(share * self.rounds))):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(seconds_a_call(variants[name], calls[name], self.device))
        return {"unit": "s", "timings": {name: {**summary(seconds[name]), "calls": calls[name]} for name in names}}

    def images(self, count: int = 2000) -> DeviceImages:
        """Noise: what is in an image does not change how long it takes."""
        shape, labels = (count, 3, self.image_size, self.image_size), np.arange(count) % CLASSES
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return DeviceImages(from_memory("noise", pixels, labels, [*map(str, range(CLASSES))]), self.device)


# Tiny sizes, which test the program and measure nothing.
SMOKE = {"model": "resnet8", "batch": 8, "image_size": 16, "eval_batch": 8, "tasks": 2, "turn": 0.0, "site": (4,) * 4}


def chosen(only: str | None, parts: Mapping[str, Any]) -> list[str]:
    """The parts that `--only` names, in their order; all without it."""
    asked = [*parts] if only is None else [item.strip() for item in only.split(",")]
    for item in asked:
        if item not in parts:
            raise UserError(f"--only: unknown part {item!r} (known: {', '.join(parts)})")
    return [part for part in parts if part in asked]


# --- what is timed


def make_phi(device: torch.device) -> MetaPerturb:
    torch.manual_seed(0)
    return MetaPerturb().to(device)


def learner(
    bench: Bench, images: DeviceImages, phi: MetaPerturb, *, plain: bool = False, form: str = "float32", index: int = 0
) -> Task:
    """A task of the meta-training program.

    `plain`: without the perturbation; everything else, data and optimizer too, is the same code.
    """
    half, precision = len(images.arrays) // 2, "bfloat16" if form == "bfloat16" else "float32"
    split = TaskSplit(np.arange(CLASSES), np.arange(half), np.arange(half, 2 * half))
    sizes = {"model": bench.model, "batch_size": bench.batch, "image_size": bench.image_size, "tasks": bench.tasks}
    task = Task(index, split, images, phi, MetaTrainConfig(precision=precision, **sizes))
    if plain:
        detach(task.model)
    if form == "channels-last":
        task.model.to(memory_format=torch.channels_last)
    return task


def theta_step(task: Task, kernel: str = "auto") -> Callable[[], object]:
    """A step of a task's network, the next one with each call."""
    steps = itertools.count()

    def step() -> object:
        with kernels.use_kernel(kernel):
            return task.theta_step(next(steps))

    return step


def start(bench: Bench) -> Groups:
    """Seconds in which a fresh interpreter imports PyTorch, the package, and the program of meta-testing."""
    seconds: dict[str, list[float]] = {f"import {name}": [] for name in IMPORTS}
    for round_ in range(max(2, bench.rounds // 3) + 1):
        for statement, measured in seconds.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            if round_:  # the first one reads files that the others find in memory
                measured.append(time.perf_counter() - began)
    return {"start": {"unit": "s", "timings": {name: summary(measured) for name, measured in seconds.items()}}}


def steps(bench: Bench) -> Groups:
    """θ-steps without and with φ (frozen) in three formats; a task's meta-step, and a joint step of all tasks."""
    images, phi = bench.images(), make_phi(bench.device)
    variants, counter, group = {}, itertools.count(), Group(0, 1, bench.device)
    for form in FORMATS:
        variants[f"plain, {form}"] = theta_step(learner(bench, images, phi, plain=True, form=form))
        variants[f"perturbed, {form}"] = theta_step(learner(bench, images, phi, form=form))
    variants["perturbed, plain operators"] = theta_step(learner(bench, images, phi), kernel="plain")
    plain, perturbed = theta_step(learner(bench, images, phi, plain=True)), learner(bench, images, phi)

    def plain_steps(count: int) -> Callable[[], object]:
        return lambda: [plain() for _ in range(count)]

    def meta_step() -> object:
        """What a task does in one step of meta-training: its θ-step, then its gradient of φ."""
        step = next(counter)
        return perturbed.theta_step(step), perturbed.phi_gradient(step)

    variants |= {"two plain steps": plain_steps(2), "meta-step": meta_step}
    tasks = [learner(bench, images, phi, index=i) for i in range(bench.tasks)]
    optimizer = torch.optim.Adam(phi.parameters(), lr=1e-3, weight_decay=5e-4, fused=True)
    both = {
        "two plain steps a task": plain_steps(2 * bench.tasks),
        "joint step": lambda: joint_step(next(counter), tasks, phi, optimizer, group, tasks[0].config),
    }
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
        task = learner(bench, images, make_phi(bench.device), plain=plain)
        step = theta_step(task)
        for _ in range(WARM_UP[bench.device.type]):
            step()
        task.optimizer.zero_grad(set_to_none=True)
        held = [*task.model.parameters(), *task.model.buffers()]
        for state in task.optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, Tensor)]
        timings[name] = summary([float(peak_memory(step, bench.device) + sum(tensor.nbytes for tensor in held))])
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


# --- how


def seconds_a_call(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean of `calls` calls one after another; the device is waited for before and after."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounded(values: Any, digits: int = 5) -> list[float]:
    """To so many significant digits."""
    return [float(f"{value:.{digits}g}") for value in values]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, least and number of the values, and the values; all from the rounded ones."""
    values = rounded(values)
    q1, median, q3 = rounded(np.quantile(values, QUARTILES))
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "n": len(values), "rounds": values}


def ratio(timings: Mapping[str, Mapping[str, Any]], numerator: str, denominator: str) -> dict[str, Any]:
    """Ratio of the medians, and quartiles of the ratios of the single rounds."""
    above, below = timings[numerator], timings[denominator]
    q1, _, q3 = np.quantile(np.divide(above["rounds"], below["rounds"]), QUARTILES)
    found = rounded([above["median"] / below["median"], q1, q3])
    return {"numerator": numerator, "denominator": denominator, **dict(zip(("ratio", "q1", "q3"), found, strict=True))}


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that are alive at once during `call`, above those alive before it.

    CUDA: PyTorch's own count of allocated bytes. CPU: the running sum of all allocations and releases of PyTorch's
    allocator, as its profiler records them; what was allocated before and is released during the call does not count,
    nor does memory that a library takes for itself.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would remark on missing GPUs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    # Backward passes allocate in threads of their own.
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes, initial=0))
