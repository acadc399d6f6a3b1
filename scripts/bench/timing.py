"""Times of variants against each other, and the peak memory of a step."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

QUARTILES = (0.25, 0.5, 0.75)
WARM_UP = {"cpu": 2, "cuda": 10}  # calls; the first ones compile, tune and fill caches


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, turn: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Time variants in turns, so that whatever else the machine does meets all of them alike.

    Every round begins with another one; a variant is called as often in one turn as fills about `turn` seconds. Returns
    of each the `summary` of the seconds a call, one value a round, and `calls`, how many a turn had.
    """
    calls = {}
    for name, call in variants.items():
        once = [seconds_a_call(call, 1, device) for _ in range(1 + WARM_UP[device.type])]
        calls[name] = max(1, math.ceil(turn / once[-1]))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_a_call(variants[name], calls[name], device))
    return {name: {**summary(values), "calls": calls[name]} for name, values in seconds.items()}


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
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):  # backward passes allocate in threads of their own
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak
