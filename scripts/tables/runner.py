"""Many training runs on one machine, some at a time.

A job is done when its record, one JSON, exists. Each job is one of the two training programs, started as anybody would
start it. It resumes in its run folder by itself, and refuses a folder in which another process is at work.
"""

import contextlib
import dataclasses
import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from metaperturb.cli import PARENT
from metaperturb.errors import Diverged, UserError
from metaperturb.runs import clock
from metaperturb.storage import reason, save_yaml

LOG, SETTINGS = "log.txt", "settings.yaml"  # what a job says, and what it is given, in its run folder


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        id: unique.
        program: `"meta_train"` or `"meta_test"`.
        config: its settings but for the device.
        record: the JSON that says that it is done.
        finish: makes the record from the finished run folder.
        needs: ids of jobs that must be done before.
        weight: what one of its steps takes beside those of other jobs: for the time left.
        diverge: called if the run diverged, with what it said last; keeps that.
    """

    id: str
    program: str
    config: Any
    record: Path
    finish: Callable[[], None] = lambda: None
    needs: tuple[str, ...] = ()
    weight: float = 1.0
    diverge: Callable[[str], None] | None = None

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def done(self) -> bool:
        return self.record.exists()

    def command(self, device: str) -> list[str]:
        """The process that does it on this device: GPU number or `"cpu"`."""
        key = "gpus" if self.program == "meta_train" else "gpu"
        settings = ["--config", str(self.run_dir / SETTINGS), "--set", f"{key}={device}"]
        return [sys.executable, "-m", f"metaperturb.{self.program}", *settings]


@dataclass
class Outcome:
    """What became of the jobs that were not done before."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # id → the last line it said
    diverged: dict[str, str] = field(default_factory=dict)  # likewise; those that are kept as such


def run_jobs(jobs: Sequence[Job], devices: Sequence[str], at_once: int, retries: int = 1) -> Outcome:
    """Run the jobs that are not done, in their order as far as what they need allows.

    Args:
        jobs: those that others need among them.
        devices: of each a share of the jobs.
        at_once: how many run at a time.
        retries: how often a job that failed, unless it diverged, is tried again, after the others.
    """
    began, outcome, waiting = time.monotonic(), Outcome(), [job for job in jobs if not job.done]
    done, tries = {job.id for job in jobs if job.done}, {job.id: retries for job in jobs}
    running: dict[Future, Job] = {}
    processes: set[subprocess.Popen] = set()
    free: SimpleQueue[str] = SimpleQueue()  # a device for each of those at once
    for device in itertools.islice(itertools.cycle(devices), at_once):
        free.put(device)
    pool = ThreadPoolExecutor(at_once)
    try:
        while waiting or running:
            for job in [*waiting]:
                if lost := [need for need in job.needs if need in outcome.failed]:
                    waiting.remove(job)
                    _fail(outcome, job, f"not run, because {lost[0]} failed")
                elif done.issuperset(job.needs):
                    waiting.remove(job)
                    running[pool.submit(_train, job, free, processes)] = job
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                job, (code, said) = running.pop(ended), ended.result()
                if code == 0 and job.done:
                    done.add(job.id)
                    outcome.finished.append(job.id)
                    left = (time.monotonic() - began) / len(outcome.finished) * (len(jobs) - len(done))
                    so_far = f"{len(done)} of {len(jobs)} done" + f", about {clock(left)} left" * (left > 0)
                    print(f"{job.id}: {said} ({so_far})", file=sys.stderr, flush=True)
                elif code == Diverged.exit_code and _kept(job, said, outcome):
                    print(f"{job.id}: diverged: {said}", file=sys.stderr)
                elif code not in (Diverged.exit_code, CANNOT_START) and tries[job.id] > 0:
                    tries[job.id] -= 1
                    waiting.append(job)
                    print(f"{job.id}: failed, will be tried again: {said}", file=sys.stderr)
                elif job.id not in outcome.failed:
                    _fail(outcome, job, said)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        pool.shutdown()
    return outcome


CANNOT_START = -1000  # in place of an exit code


def _train(job: Job, free: SimpleQueue, processes: set[subprocess.Popen]) -> tuple[int, str]:
    """One attempt: the exit code, and what was said last."""
    device = free.get()
    try:
        save_yaml(dataclasses.asdict(job.config), job.run_dir / SETTINGS)
        command, log = job.command(device), job.run_dir / LOG
        with open(log, "ab") as file:  # behind what earlier attempts said
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            said_before = file.tell()
            environment = {**os.environ, PARENT: str(os.getpid())}  # it ends when we are gone
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            processes.add(process := subprocess.Popen(command, **streams, env=environment))
            code = process.wait()
            processes.remove(process)
    except (UserError, OSError) as error:  # one that cannot start does not end the others
        return CANNOT_START, f"cannot be started ({reason(error)})"
    finally:
        free.put(device)
    try:
        if code == 0:
            job.finish()
    except (UserError, OSError) as error:
        return 1, str(error)
    return code, last_line(log, said_before)


def _kept(job: Job, said: str, outcome: Outcome) -> bool:
    """Whether it is kept that the job diverged."""
    if job.diverge is None:
        return False
    try:
        job.diverge(said)
    except (UserError, OSError) as error:
        _fail(outcome, job, f"{said}; {error}")
        return False
    outcome.diverged[job.id] = said
    return True


def _fail(outcome: Outcome, job: Job, why: str) -> None:
    outcome.failed[job.id] = why
    print(f"{job.id}: failed: {why}", file=sys.stderr)


def last_line(log: Path, begin: int = 0) -> str:
    """What a program said last behind the first `begin` bytes of its log."""
    said = ""
    with contextlib.suppress(OSError):
        said = log.read_bytes()[begin:].decode(errors="replace").strip()
    lines = [line for line in said.splitlines() if not line.startswith(("srun: ", "submitit "))]
    return lines[-1].strip().removeprefix("error: ") if lines else "said nothing"
