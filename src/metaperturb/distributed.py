"""Tasks over processes: starting the processes, exchanging φ's gradient, and ending together when one of them ends.

The result of meta-training does not depend on the number of processes: process r of G owns the tasks r, r + G, …; the
one collective gathers a row of numbers a task, and every process reduces the same table in the same order.
"""

import contextlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from metaperturb import cli
from metaperturb.errors import UserError
from metaperturb.storage import reason

GRACE_SECONDS = 5.0  # between asking a process to end and ending it
INSTALL_OLDER = (
    f"install a PyTorch for older ones: {sys.executable} -m pip install --force-reinstall 'torch>=2.11' torchvision "
    "--index-url https://download.pytorch.org/whl/cu126"
)


class PeerLost(UserError):
    """A collective failed because another process is gone; that process knows why."""

    exit_code = 75


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        where = f"process {dist.get_rank()}: lost contact with another process"
        raise PeerLost(f"{where} ({reason(error)})") from error


@dataclass(frozen=True)
class Group:
    """This process (`rank`) among those of the run (`size`), and the device where its tasks compute."""

    rank: int
    size: int
    device: torch.device

    def gather_rows(self, rows: Tensor, num_tasks: int) -> Tensor:
        """Rows of this process's tasks `[n, K]` → those of all tasks, in task order `[T, K]`, on every process.

        This is the only traffic of meta-training: K numbers a task (φ's gradient and a few losses), whatever θ is.
        With gloo, that is where a GPU is shared, the rows pass through the host, which then waits for them.
        """
        if self.size == 1:
            return rows
        per_process = -(-num_tasks // self.size)
        where = "cpu" if self.on_host else rows.device
        sent = torch.zeros(per_process, rows.shape[1], dtype=rows.dtype, device=where)
        sent[: len(rows)] = rows
        received = sent.new_empty(self.size * per_process, rows.shape[1])
        with peer_errors():
            dist.all_gather_into_tensor(received, sent)
        by_process = received.view(self.size, per_process, -1)  # [r, i] is task i·G + r
        return by_process.transpose(0, 1).reshape(-1, rows.shape[1])[:num_tasks].to(rows.device)

    @property
    def on_host(self) -> bool:
        """Whether the host sees the rows of each step anyway, so that it waits for nothing when it reads them."""
        return self.device.type == "cpu" if self.size == 1 else dist.get_backend() == "gloo"

    def of_first(self, decide: Callable[..., str], *arguments: Any) -> str:
        """What rank 0 decides, on every process."""
        texts = [decide(*arguments) if self.rank == 0 else ""]
        if self.size > 1:
            with peer_errors():
                dist.broadcast_object_list(texts, src=0)
        return texts[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            with peer_errors():
                dist.barrier()


def parse_devices(text: str, key: str, most: int = 1) -> list[torch.device]:
    """`"0,1"`, `"cpu"`, `"cpu,cpu"` or `"auto"` (the GPUs, at most so many, else the CPU; said on stderr) → devices.

    A `UserError` names the setting, `key`.
    """
    count, why_none = count_gpus()
    if text == "auto":
        text = ",".join(map(str, range(min(count, most)))) or "cpu"
        print(f"running on {f'GPU {text}' if count else f'the CPU ({why_none})'}", file=sys.stderr)
    devices = []
    for item in map(str.strip, text.split(",")):
        if item != "cpu" and not item.isdecimal():
            raise UserError(f"{key}: expected GPU numbers or 'cpu', separated by commas, got {text!r}")
        if item != "cpu" and int(item) >= count:
            there = f"this machine has {count}, numbered from 0" if count else f"{why_none}; 'cpu' works"
            raise UserError(f"{key}: no GPU {item} ({there})")
        devices.append(torch.device("cpu") if item == "cpu" else torch.device("cuda", int(item)))
    return devices


def count_gpus() -> tuple[int, str]:
    """How many GPUs this PyTorch can use, and why none: an old driver told from no GPU, with what helps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old driver; what is returned says it
        if torch.cuda.is_available():
            return torch.cuda.device_count(), ""
    if torch.version.cuda is None and torch.version.hip is None:
        return 0, "this PyTorch is a build for CPUs"
    try:
        torch.cuda.init()
    except Exception as error:  # of several kinds
        if "too old" in str(error):
            needs = f"this PyTorch, which needs CUDA {torch.version.cuda}"
            return 0, f"the NVIDIA driver is too old for {needs}: update it, or {INSTALL_OLDER}"
    return 0, "PyTorch sees none here"


def make_current(device: torch.device) -> None:
    """Let CUDA calls that name no GPU go to this one, not to GPU 0; refuse one that is too old."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        major, minor = torch.cuda.get_device_capability(device)
        built_for = [int(arch.removeprefix("sm_")) for arch in torch.cuda.get_arch_list() if arch[3:].isdecimal()]
        if built_for and 10 * major + minor < min(built_for):
            name = torch.cuda.get_device_name(device)
            raise UserError(f"{device}: {name} is too old for this PyTorch; {INSTALL_OLDER}")


def under_torchrun() -> bool:
    """Whether `torchrun`, or what sets the same variables, all of them, started this process."""
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "TORCHELASTIC_RUN_ID" not in os.environ and not os.environ.keys() >= {*variables[:3]}:
        return False
    if missing := [name for name in variables if name not in os.environ]:
        raise UserError(f"torchrun: {missing[0]} is not set (without torchrun, unset RANK, WORLD_SIZE, LOCAL_RANK)")
    return True


class _Job(NamedTuple):
    """What `launch` was given."""

    work: Callable[[Group], None]
    devices: list[torch.device]
    timeout: timedelta

    def meet(self, local: int, **place: Any) -> Group:
        """Join the other processes, as the one of the machine's device number `local`."""
        backend = backend_for(self.devices)
        device_id = self.devices[local] if backend == "nccl" else None  # NCCL would guess which GPU it has
        dist.init_process_group(backend, device_id=device_id, timeout=self.timeout, **place)
        return Group(dist.get_rank(), dist.get_world_size(), self.devices[local])


def launch(work: Callable[[Group], None], devices: list[torch.device], timeout: timedelta = timedelta(0, 600)) -> None:
    """Call `work(group)`, which can be pickled, in one process a device of this machine.

    Raises the first error of any process; all have ended by then. They wait for another at most `timeout`.
    """
    job = _Job(work, devices, timeout)
    if under_torchrun():
        _run_as_torchrun_worker(job)
    elif len(devices) == 1:
        make_current(devices[0])
        work(Group(0, 1, devices[0]))
    else:
        _spawn(job)


def choose_devices(gpus: str, tasks: int) -> list[torch.device]:
    """The devices of this machine's processes; no more processes than tasks: some would have nothing to do."""
    if not under_torchrun():
        devices = parse_devices(gpus, "gpus", most=tasks)
        if len(devices) > tasks:
            raise UserError(f"gpus: {len(devices)} processes for {tasks} tasks; list at most {tasks} devices")
        return devices
    size, local_size = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size > tasks:
        raise UserError(f"torchrun: {size} processes for {tasks} tasks; start at most {tasks}")
    if gpus == "auto":
        count, _ = count_gpus()
        return [torch.device("cuda", i % count) if count else torch.device("cpu") for i in range(local_size)]
    devices = parse_devices(gpus, "gpus")
    if len(devices) != local_size:
        raise UserError(f"gpus: lists {len(devices)} devices for {local_size} processes on this machine")
    return devices


def backend_for(devices: list[torch.device]) -> str:
    """NCCL where each process has a GPU of its own, gloo where GPUs are shared or absent; alike on all machines."""
    own_gpu = all(device.type == "cuda" for device in devices) and len(set(devices)) == len(devices)
    return "nccl" if own_gpu else "gloo"


def _run_as_torchrun_worker(job: _Job) -> None:
    local = int(os.environ["LOCAL_RANK"])
    make_current(job.devices[local])
    _check_address(job.devices)
    try:
        group = job.meet(local)
    except (RuntimeError, dist.DistError) as error:
        where = "process {RANK}: could not meet the others at {MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        raise UserError(f"{where} ({reason(error)})") from error
    try:
        job.work(group)
    finally:
        dist.destroy_process_group()


def _check_address(devices: list[torch.device]) -> None:
    """Where several machines meet by gloo, it tells the others the address that this machine's name has here."""
    alone = os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] or backend_for(devices) != "gloo"
    name, address = socket.gethostname(), "127.0.0.1"
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
    if not alone and "GLOO_SOCKET_IFNAME" not in os.environ and address.startswith("127."):
        raise UserError(
            f"torchrun: this machine's name, {name}, has the address {address}, where other machines cannot reach it; "
            "set GLOO_SOCKET_IFNAME to a network interface that they reach (`ip address` lists them)"
        )


# --- our own launcher: one machine


def _spawn(job: _Job) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=job.timeout)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder)
        # Ctrl-C reaches the whole group, workers that still import, too; they ignore it, and the launcher passes it on.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        place = (store.port, os.getpid(), said)
        context = multiprocessing.spawn(_worker, (job, *place), nprocs=len(job.devices), join=False)
        signal.signal(signal.SIGINT, handler)

        def forward() -> None:  # they end themselves, all after the same step
            for process in context.processes:
                process.terminate()

        stop = cli.Stop(tell=False, forward=forward)
        try:
            with stop:
                while not context.join(grace_period=GRACE_SECONDS):
                    pass
        except multiprocessing.ProcessExitedException as first:
            codes = [process.exitcode for process in context.processes]
            raise _cause(first.error_index, codes, job.devices, said, stop.number) from None
        finally:
            for process in context.processes:
                process.kill()


def _cause(first: int, codes: list[int], devices: list[torch.device], said: Path, stopped: int) -> BaseException:
    """What the first process said that did not merely lose contact with another, or how one ended without a word."""
    own = [rank for rank, code in enumerate(codes) if code not in (0, PeerLost.exit_code)]
    file = said / ("cause" if own else "lost")
    if file.exists():
        cause = pickle.loads(file.read_bytes())
        return cli.Stopped(stopped or cause.number, cause.saved) if isinstance(cause, cli.Stopped) else cause
    rank = first if first in own or not own else own[0]
    code = codes[rank]
    if stopped and code == -signal.SIGTERM:  # before it could save anything
        return cli.Stopped(stopped)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return UserError(f"process {rank} ({devices[rank]}) {how}{hint}; all others were stopped; {cli.RESUME}")


def _worker(rank: int, job: _Job, port: int, launcher: int, said: Path) -> None:
    cli.end_with(launcher)
    cli.keep_freed_memory()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=job.timeout)
    code = 0
    with cli.unbreakable_output():
        try:
            make_current(job.devices[rank])
            job.work(job.meet(rank, store=store, rank=rank, world_size=len(job.devices)))
            dist.destroy_process_group()
        except (Exception, cli.Stopped) as error:
            known = isinstance(error, UserError | cli.Stopped)
            cause = error if known else UserError(f"process {rank}: {cli.describe_unexpected(error)}")
            cause.add_note(traceback.format_exc())
            code = getattr(cause, "exit_code", UserError.exit_code)
            name = "lost" if isinstance(cause, PeerLost) else "cause"
            with contextlib.suppress(OSError), open(said / name, "xb") as file:  # the first one
                pickle.dump(cause, file)
    # Not sys.exit: after a lost peer the process group's threads may never let the interpreter finish.
    os._exit(code)
