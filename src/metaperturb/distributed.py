"""Tasks over processes: starting the processes, exchanging φ's gradient, and ending together when one of them ends.

The result of meta-training does not depend on the number of processes: process r of G owns the tasks r, r + G, …; the
one collective gathers a row of numbers a task, and every process reduces the same table in the same order.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from metaperturb.cli import EXIT_ERROR, RESUME, describe_unexpected, keep_freed_memory
from metaperturb.errors import Diverged, UserError

EXIT_PEER_LOST = 75  # this process is well, but another one is gone
GRACE_SECONDS = 5.0  # between asking a process to end and ending it
TIMEOUT = timedelta(minutes=10)  # of a collective: longer than the slowest step, or the reading of a large data set


@dataclass(frozen=True)
class Group:
    """This process among those of the run.

    Attributes:
        rank, size: which process, and how many there are.
        device: where its tasks compute.
    """

    rank: int
    size: int
    device: torch.device

    def owned(self, num_tasks: int) -> range:
        """The tasks of this process."""
        return range(self.rank, num_tasks, self.size)

    def gather_rows(self, rows: Tensor, num_tasks: int) -> Tensor:
        """Rows of this process's tasks `[n, K]` → those of all tasks, in task order `[T, K]`, on every process.

        This is the only traffic of meta-training: K numbers a task (φ's gradient and a few losses), whatever θ is.
        With gloo, that is where a GPU is shared, the rows pass through the host, which then waits for them.
        """
        if self.size == 1:
            return rows
        per_process = -(-num_tasks // self.size)
        on_host = dist.get_backend() == "gloo"
        sent = torch.zeros(per_process, rows.shape[1], dtype=rows.dtype, device="cpu" if on_host else rows.device)
        sent[: len(rows)] = rows
        received = sent.new_empty(self.size * per_process, rows.shape[1])
        with peer_errors():
            dist.all_gather_into_tensor(received, sent)
        by_process = received.view(self.size, per_process, -1)  # [r, i] is task i·G + r
        return by_process.transpose(0, 1).reshape(-1, rows.shape[1])[:num_tasks].to(rows.device)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            with peer_errors():
                dist.barrier()


class PeerLost(Exception):
    """A collective failed because another process is gone; that process knows why."""


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise PeerLost(str(error).strip().split("\n")[0]) from error


def parse_devices(text: str, key: str, most: int = 1) -> list[torch.device]:
    """`"0,1"`, `"cpu"`, `"cpu,cpu"` or `"auto"` (the GPUs, else the CPU; said on stderr) → devices.

    Args:
        text: the list.
        key: what it is the value of, for messages.
        most: how many GPUs `"auto"` takes.

    Raises:
        UserError: not such a list, or a GPU that is not there.
    """
    if text == "auto":
        text = ",".join(map(str, range(min(torch.cuda.device_count(), most)))) or "cpu"
        print(f"{key}=auto: running on {'the CPU' if text == 'cpu' else f'GPU {text}'}", file=sys.stderr)
    devices = []
    for item in (item.strip() for item in text.split(",")):
        if item == "cpu":
            devices.append(torch.device("cpu"))
            continue
        if not item.isdecimal():
            raise UserError(f"{key}: expected GPU numbers or 'cpu', separated by commas, got {text!r}")
        count = torch.cuda.device_count()
        if int(item) >= count:
            there = f"this machine has {count}, numbered from 0" if count else "PyTorch sees none here; 'cpu' works"
            raise UserError(f"{key}: no GPU {item} ({there})")
        devices.append(torch.device("cuda", int(item)))
    return devices


def make_current(device: torch.device) -> None:
    """Let CUDA calls that name no GPU, such as pinning memory, go to this one.

    They would go to GPU 0 otherwise, and open a context of half a gigabyte there for each process.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def under_torchrun() -> bool:
    """Whether `torchrun`, or what sets the same variables, started this process.

    Raises:
        UserError: it is so, but a variable is missing.
    """
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" not in os.environ and not os.environ.keys() >= {*variables[:3]}:
        return False
    if missing := [name for name in variables if name not in os.environ]:
        raise UserError(f"torchrun: {missing[0]} is not set (without torchrun, unset RANK, WORLD_SIZE, LOCAL_RANK)")
    return True


def launch(
    work: Callable[..., None], arguments: tuple, devices: list[torch.device], port: int, traceback: bool
) -> None:
    """Call `work(group, *arguments)` in one process a device.

    Args:
        work: a module-level function.
        devices: see `choose_devices`; under `torchrun`, which has started the processes, those of this machine.
        port: TCP port of the meeting place, 0 for any free one.
        traceback: whether processes print one when they fail.

    Raises:
        UserError: the first error of any process; all processes have ended by then.
    """
    if under_torchrun():
        _run_as_torchrun_worker(work, arguments, devices)
    elif len(devices) == 1:
        make_current(devices[0])
        work(Group(0, 1, devices[0]), *arguments)
    else:
        _spawn(work, arguments, devices, port, traceback)


def choose_devices(gpus: str, tasks: int) -> list[torch.device]:
    """The devices of this machine's processes.

    Raises:
        UserError: a device that is not there, or more processes than tasks: some would have nothing to do.
    """
    if not under_torchrun():
        devices = parse_devices(gpus, "gpus", most=tasks)
        if len(devices) > tasks:
            raise UserError(f"gpus: {len(devices)} processes for {tasks} tasks; list at most {tasks} devices")
        return devices
    size, local_size = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size > tasks:
        raise UserError(f"torchrun: {size} processes for {tasks} tasks; start at most {tasks}")
    if gpus == "auto":
        count = torch.cuda.device_count()
        return [torch.device("cuda", i % count) if count else torch.device("cpu") for i in range(local_size)]
    devices = parse_devices(gpus, "gpus")
    if len(devices) != local_size:
        raise UserError(f"gpus: lists {len(devices)} devices for {local_size} processes on this machine")
    return devices


def backend_for(devices: list[torch.device]) -> str:
    """NCCL where each process has a GPU of its own, gloo where GPUs are shared or absent.

    Decided from one machine's devices: several machines must be alike in this.
    """
    own_gpu = all(device.type == "cuda" for device in devices) and len(set(devices)) == len(devices)
    return "nccl" if own_gpu else "gloo"


def _meeting(devices: list[torch.device], local: int) -> dict[str, Any]:
    """How the process of the machine's device number `local` meets the others; NCCL would guess which GPU it has."""
    backend = backend_for(devices)
    return {"backend": backend, "device_id": devices[local] if backend == "nccl" else None}


def _run_as_torchrun_worker(work: Callable[..., None], arguments: tuple, devices: list[torch.device]) -> None:
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    make_current(devices[local])
    dist.init_process_group(**_meeting(devices, local), timeout=TIMEOUT)
    try:
        work(Group(rank, size, devices[local]), *arguments)
    except PeerLost as error:
        raise UserError(f"process {rank}: lost contact with another process ({error})") from error
    finally:
        dist.destroy_process_group()


# --- our own launcher: one machine


def _spawn(
    work: Callable[..., None], arguments: tuple, devices: list[torch.device], port: int, show_traceback: bool
) -> None:
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    except (RuntimeError, dist.DistError) as error:
        if _port_in_use(port):
            raise UserError(f"port {port}: in use; choose another, or 0 for any free one") from error
        raise UserError(f"port {port}: cannot be opened ({str(error).splitlines()[0]})") from error
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    try:
        for rank, device in enumerate(devices):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_worker,
                args=(theirs, work, arguments, rank, devices, store.port, show_traceback),
                name=f"process {rank} ({device})",
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        _watch(processes, pipes)
    finally:
        _end(processes)


def _watch(processes: list[Any], pipes: list[Connection]) -> None:
    """Return when all processes have ended well; raise the cause as soon as one has not."""
    running = dict(zip((p.sentinel for p in processes), processes, strict=True))
    while running:
        for sentinel in wait(list(running)):
            running.pop(sentinel).join()
        if any(process.exitcode for process in processes if process.exitcode is not None):
            # One that was killed is the cause; those that lost contact to it may have been seen first.
            wait([p.sentinel for p in processes if p.exitcode is None], timeout=1.0)
            raise _cause(processes, pipes)


def _cause(processes: list[Any], pipes: list[Connection]) -> UserError:
    ended = [(process, pipe) for process, pipe in zip(processes, pipes, strict=True) if process.exitcode]
    own_errors = [(p, pipe) for p, pipe in ended if p.exitcode != EXIT_PEER_LOST]
    for process, pipe in own_errors or ended:
        try:
            return (Diverged if process.exitcode == Diverged.exit_code else UserError)(pipe.recv())
        except EOFError:  # it could not speak: killed
            code = process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return UserError(f"{process.name} {how}{hint}; all others were stopped; {RESUME}")
    return UserError(f"a process ended without saying why; {RESUME}")


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(GRACE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def _worker(
    pipe: Connection,
    work: Callable[..., None],
    arguments: tuple,
    rank: int,
    devices: list[torch.device],
    port: int,
    show_traceback: bool,
) -> None:
    _end_with_parent()
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    device = devices[rank]
    code, message = EXIT_ERROR, None
    try:
        make_current(device)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
        place = {"store": store, "rank": rank, "world_size": len(devices)}
        dist.init_process_group(**_meeting(devices, rank), **place, timeout=TIMEOUT)
        work(Group(rank, len(devices), device), *arguments)
        dist.destroy_process_group()
        code = 0
    except PeerLost as error:
        code, message = EXIT_PEER_LOST, f"process {rank} lost contact with another process ({error})"
    except UserError as error:
        code, message = error.exit_code, str(error)
    except Exception as error:
        message = f"process {rank}: {describe_unexpected(error)}"
    if code and show_traceback:
        traceback.print_exc()
    if message is not None:
        with contextlib.suppress(OSError):
            pipe.send(message)
    # Not sys.exit: after a lost peer the process group's threads may never let the interpreter finish.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent() -> None:
    """No orphans: end when the launcher is gone, however it went."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(EXIT_PEER_LOST)

    threading.Thread(target=follow, daemon=True).start()


def _port_in_use(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
