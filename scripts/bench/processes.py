"""Measuring in several processes, launched as the meta-training program launches its own."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.workload import Bench
from metaperturb.distributed import launch
from metaperturb.storage import load_json


def process_devices(bench: Bench, count: int) -> list[torch.device]:
    """A GPU each, shared ones where there are too few; or the CPU."""
    if bench.device.type == "cpu":
        return [bench.device] * count
    gpus = torch.cuda.device_count()
    return [torch.device("cuda", i % gpus) for i in range(count)]


def in_processes(work: Callable[..., None], arguments: tuple, devices: list[torch.device]) -> Any:
    """Launch `work(group, *arguments, path)` as the program launches its processes; what it left in JSON at `path`."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        launch(work, (*arguments, path), devices, 0, False)
        torch.set_num_threads(threads)  # a single "process" is this one
        return load_json(path)
