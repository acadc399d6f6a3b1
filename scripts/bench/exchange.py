"""Suite `exchange`: what the processes' one collective costs, and what follows for very many GPUs."""

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.processes import in_processes, process_devices
from bench.timing import rounded, summary, synchronize
from bench.workload import Bench, Learner, made_up_images, make_phi
from metaperturb.data.batches import DeviceImages
from metaperturb.distributed import Group, backend_for
from metaperturb.meta_train import METRICS
from metaperturb.perturbation import MetaPerturb
from metaperturb.storage import save_json

COLUMNS = sum(p.numel() for p in MetaPerturb().parameters()) + len(METRICS)  # of a task's row
ROW_BYTES = 4 * COLUMNS
PROJECTED_TASKS = (10, 100, 1000, 10_000)  # on as many GPUs
GOAL_STEP = 120 / 750 / 10  # seconds a task step of a meta-training of 10 tasks and 750 steps in two minutes

# A cluster, assumed: nothing of it was measured. Start of a collective 20 µs, 10 µs a hop between neighbors in the
# network, 100 Gbit/s a GPU.
CLUSTER = {"start": 20e-6, "hop": 10e-6, "seconds_a_byte": 1 / 12.5e9}


def exchange(bench: Bench) -> dict[str, Any]:
    """Seconds of `Group.gather_rows` by processes and tasks, a task's step beside it, a model, a projection."""
    sizes = bench.sizes
    timings, transports = {}, {}
    points = []
    for count in sizes.exchange_processes:
        devices = process_devices(bench, count)
        transports[str(count)] = "none" if count == 1 else backend_for(devices)
        tasks = [number for number in sizes.exchange_tasks if number >= count]
        measured = in_processes(gathers, (tasks, bench.rounds, sizes.exchange_calls), devices)
        for number, seconds in zip(tasks, measured, strict=True):
            timings[f"{count} processes, {number} tasks"] = found = summary(seconds)
            if count > 1:
                points.append((count, number, found["median"]))

    images = DeviceImages(made_up_images(2000, sizes.image_size), bench.device)
    learner = Learner(images, make_phi(bench.device), sizes.model, sizes.batch)
    step = bench.time({"meta-step": learner.meta_step}, share=0.7)
    settings = {"processes": list(sizes.exchange_processes), "tasks": list(sizes.exchange_tasks), "columns": COLUMNS}
    step_settings = {"model": sizes.model, "batch": sizes.batch, "image_size": sizes.image_size}
    fits = {hops: fit(points, hops) for hops in HOPS}
    return {
        "groups": {
            "gather": {"settings": settings, "unit": "s", "timings": timings, "transport": transports},
            "task": {"settings": step_settings, "unit": "s", "timings": step},
        },
        "ratios": [],
        "fits": fits,
        "projections": projections(step["meta-step"], fits, measured_on_gpu=bench.device.type == "cuda"),
    }


def gathers(group: Group, tasks: list[int], rounds: int, calls: int, path: Path) -> None:
    """In each process: exchange tables of so many tasks' rows; process 0 measures, in turns."""
    torch.set_num_threads(1)
    rows = {number: torch.randn(len(group.owned(number)), COLUMNS, device=group.device) for number in tasks}
    seconds: dict[int, list[float]] = {number: [] for number in tasks}
    for round_, number in itertools.product(range(rounds + 1), tasks):
        group.barrier()
        synchronize(group.device)
        started = time.perf_counter()
        for _ in range(calls):
            group.gather_rows(rows[number], number)
            synchronize(group.device)  # the latency of each, not how many are under way at once
        if round_:  # the first one connects and warms up
            seconds[number].append((time.perf_counter() - started) / calls)
    if group.rank == 0:
        save_json([seconds[number] for number in tasks], path)


# --- the model: latency = start + hop · hops(G) + seconds_a_byte · bytes received by a process

HOPS = ("tree", "ring")


def hops_of(processes: int, hops: str) -> float:
    """Messages one after another: of a tree, or of the ring in which each process passes rows to the next."""
    return math.log2(processes) if hops == "tree" else processes - 1


def received_bytes(processes: int, tasks: int) -> float:
    return tasks * ROW_BYTES * (processes - 1) / processes


def predicted(model: dict[str, float], hops: str, processes: int, tasks: int) -> float:
    """Seconds of an exchange."""
    if processes == 1:
        return 0.0
    latency = model["start"] + model["hop"] * hops_of(processes, hops)
    return latency + model["seconds_a_byte"] * received_bytes(processes, tasks)


def fit(points: list[tuple[int, int, float]], hops: str) -> dict[str, float]:
    """Least squares of the relative errors over (processes, tasks, seconds), no coefficient below 0."""
    terms = np.array([[1.0, hops_of(g, hops), received_bytes(g, t)] for g, t, _ in points])
    seconds = np.array([s for *_, s in points])
    weighted = terms / seconds[:, None]
    best, least = np.zeros(3), math.inf
    for used in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        coefficients = np.zeros(3)
        coefficients[list(used)] = np.linalg.lstsq(weighted[:, list(used)], np.ones(len(points)), rcond=None)[0]
        error = ((weighted @ coefficients - 1) ** 2).sum()
        if (coefficients >= 0).all() and error < least:
            best, least = coefficients, error
    worst = np.abs(weighted @ best - 1).max()
    start, hop, seconds_a_byte = (rounded(value) for value in best.tolist())
    return {"start": start, "hop": hop, "seconds_a_byte": seconds_a_byte, "worst_relative_error": rounded(float(worst))}


def projections(step: dict[str, Any], fits: dict[str, dict[str, float]], measured_on_gpu: bool) -> list[dict[str, Any]]:
    """Parallel efficiency of T tasks on T GPUs: a task's step / (that step + the exchange)."""
    spread = (
        (step["q3"] - step["q1"]) / 1.349 / step["median"]
    )  # standard deviation of a normal law with these quartiles
    cluster = dict.fromkeys(HOPS, CLUSTER)
    cases = [
        ("fitted", step["median"], fits),
        ("cluster", step["median"] if measured_on_gpu else GOAL_STEP, cluster),
    ]
    found = []
    for name, seconds, models in cases:
        rows = []
        for tasks in PROJECTED_TASKS:
            row = {"tasks": tasks, "table_bytes": tasks * ROW_BYTES}
            waited = spread * math.sqrt(2 * math.log(tasks))  # for the slowest of so many, in steps
            for hops in HOPS:
                latency = predicted(models[hops], hops, tasks, tasks)
                row[f"{hops}_seconds"] = rounded(latency)
                row[f"{hops}_efficiency"] = rounded(seconds / (seconds + latency))
                row[f"{hops}_efficiency_slowest"] = rounded(seconds / (seconds * (1 + waited) + latency))
            rows.append(row)
        found.append({"case": name, "step_seconds": rounded(seconds), "spread": rounded(spread), "rows": rows})
    return found
