"""What the steps of both training programs share."""

import contextlib
import os
import sys
import time
import timeit
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from metaperturb.config import CommonConfig
from metaperturb.errors import Damaged, Diverged, UserError

ABLATION = ("sites", "noise", "gate")  # settings of table 3, by the names that `attach` gives them


def check_ablation(config: CommonConfig) -> None:
    """Refuse to run with nothing left of φ, or without noise that could be scale-free."""
    if not (config.noise or config.gate):
        raise UserError("noise, gate: with both false φ does nothing")
    if not config.noise and getattr(config, "scale_free", False):
        raise UserError("scale_free: is about the noise, and with noise=false there is none")


def annealed_strength(step: int, steps: int, share: float) -> float:
    """c at `step` (from 0): rises linearly to 1 over the first `share` of the steps (section 3.3)."""
    ramp = round(steps * share)
    return 1.0 if ramp == 0 else min(1.0, (step + 1) / ramp)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device. On a CPU grouped convolutions take 1.3 to 1.6 times as long if not channels-last."""
    grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules())
    fast = torch.channels_last if grouped and device.type == "cpu" else torch.preserve_format
    return model.to(device, memory_format=fast)


def choose_threads(root: Path = Path("/")) -> int:
    """`OMP_NUM_THREADS`, or the cores that this process may use, less those that others keep busy; said on stderr.

    Threads beyond that wait for each other: two a core, or two trainings on the same cores, are slower than one each.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        print(f"CPU threads: {torch.get_num_threads()} (OMP_NUM_THREADS)", file=sys.stderr)
        return torch.get_num_threads()
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    siblings = (_read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in cpus)
    cores = len(set(siblings))  # CPUs that share a core have the same list
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal():  # of a container
        cores = max(1, min(cores, int(quota) // int(period)))
    idle = _idle_share(cpus, root / "proc/stat")
    threads = cores if idle > 0.75 else max(1, round(cores * idle))
    print(f"CPU threads: {threads} ({cores} cores, {1 - idle:.0%} busy; threads=… sets others)", file=sys.stderr)
    return threads


def _idle_share(cpus: list[int], stat: Path, seconds: float = 0.2) -> float:
    """How idle these CPUs are, in [0, 1], while this process waits; 1 where the system does not say."""

    def times() -> tuple[int, int]:
        lines = (line.split() for line in _read(stat).splitlines())
        counts = [list(map(int, line[1:])) for line in lines if line[0] in {f"cpu{cpu}" for cpu in cpus}]
        return sum(count[3] + count[4] for count in counts), sum(map(sum, counts))  # idle and waiting for disks

    idle, whole = times()
    time.sleep(seconds)
    idle_then, whole_then = times()
    return (idle_then - idle) / (whole_then - whole) if whole_then > whole else 1.0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def choose_precision(asked: str, device: torch.device) -> str:
    """`asked`, or float32 where a CPU only imitates bfloat16 and a step is slower for it; said on stderr."""
    flags = {"avx512_bf16", "amx_bf16"} & set(_read(Path("/proc/cpuinfo")).split())
    if asked == "float32" or device.type != "cpu" or flags:
        return asked
    ratio = step_seconds("bfloat16") / step_seconds("float32")
    if ratio <= 1.0:
        return asked
    what = "computing in float32, as this processor has no bfloat16 arithmetic"
    print(f"precision: {what} and takes {ratio:.1f} times as long with it", file=sys.stderr)
    return "float32"


def step_seconds(precision: str) -> float:
    """The shortest of three steps of a small convolution on the CPU."""
    convolution, x = torch.nn.Conv2d(16, 16, 3, padding=1), torch.rand(32, 16, 32, 32)

    def step() -> None:
        with autocast(x.device, precision):
            loss = convolution(x).relu().mean()
        loss.backward()

    return min(timeit.repeat(step, number=1, repeat=3))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of forward passes: nothing for `"float32"`; for `"bfloat16"` PyTorch casts what bears it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextlib.contextmanager
def restoring(checkpoint: Path) -> Iterator[None]:
    """Says in one sentence that a checkpoint is damaged, or that a file of something else lies in its place."""
    try:
        yield
    except Damaged as error:
        raise UserError(f"{error}; take a copy, or let the run begin anew without its folder checkpoints") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{checkpoint}: is no checkpoint of this run; remove it, or choose another run_dir") from error


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of correct predictions, a scalar on the device; logits `[B, K]`, labels `[B]`.

    Of soft labels `[B, K]` each prediction counts what its class has.
    """
    prediction = logits.detach().argmax(dim=1, keepdim=True)
    correct = labels.gather(1, prediction) if labels.dim() == 2 else prediction == labels[:, None]
    return correct.float().mean()


def check_finite(what: str, values: Mapping[str, Iterable[Tensor]], run_dir: str) -> None:
    """Stop before a checkpoint could follow what is not finite; `values`: by where they are, `"task 3, step 7"`."""
    for where, tensors in values.items():
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise Diverged(
                f"{where}: {what} is not finite; stopped, the last good checkpoint is kept in {run_dir} (a smaller lr "
                "or clip may help, in a new run_dir)"
            )
