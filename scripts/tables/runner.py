"""Many training runs on one machine, some at a time.

A job is done when its record, one JSON, exists. Each job is one of the two training programs, started as anybody would
start it. It resumes in its run folder by itself, and refuses a folder in which another process is at work.
"""

import dataclasses
import itertools
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
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
    """One training run."""

    id: str
    program: str  # "meta_train" or "meta_test"
    config: Any  # its settings but for the device
    record: Path  # the JSON that says that it is done
    finish: Callable[[], None] = lambda: None  # makes the record from the finished run folder
    needs: tuple["Job", ...] = ()  # that must be done before
    diverge: Callable[[str], None] | None = None  # keeps what a run that diverged said last

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


def run_jobs(jobs: Sequence[Job], devices: Sequence[str], at_once: int, retries: int = 1) -> dict[str, str]:
    """Run the jobs that are not done, `at_once` at a time, in their order as far as what they need allows.

    One that failed, unless it diverged, is tried again, after the others. Returns of each that failed in the end the
    last line that it said.
    """
    began, waiting, failed = time.monotonic(), [job for job in jobs if not job.done], {}
    done, tried = {job.id for job in jobs if job.done}, Counter()
    before = len(done)
    running: dict[Future, Job] = {}
    processes: set[subprocess.Popen] = set()
    free: SimpleQueue[str] = SimpleQueue()  # a device for each of those at once
    for device in itertools.islice(itertools.cycle(devices), at_once):
        free.put(device)
    pool = ThreadPoolExecutor(at_once)
    try:
        while waiting or running:
            for job in [*waiting]:
                if lost := [need.id for need in job.needs if need.id in failed]:
                    waiting.remove(job)
                    failed[job.id] = f"not run, because {lost[0]} failed"
                    print(f"{job.id}: failed: {failed[job.id]}", file=sys.stderr)
                elif done.issuperset(need.id for need in job.needs):
                    waiting.remove(job)
                    running[pool.submit(_train, job, free, processes)] = job
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                job, (became, said) = running.pop(ended), ended.result()
                if became == "done":
                    done.add(job.id)
                    left = (time.monotonic() - began) / (len(done) - before) * (len(jobs) - len(done))
                    so_far = f"{len(done)} of {len(jobs)} done" + f", about {clock(left)} left" * (left > 0)
                    print(f"{job.id}: {said} ({so_far})", file=sys.stderr, flush=True)
                    continue
                if became == "failed" and tried[job.id] < retries:
                    tried[job.id] += 1
                    waiting.append(job)
                    became = "failed, will be tried again"
                elif became != "diverged":
                    failed[job.id], became = said, "failed"
                print(f"{job.id}: {became}: {said}", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        pool.shutdown()
    return failed


def _train(job: Job, free: SimpleQueue, processes: set[subprocess.Popen]) -> tuple[str, str]:
    """One attempt: what became of it, and what was said last. What is `"hopeless"` need not be tried again."""
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
        return "hopeless", f"cannot be started ({reason(error)})"
    finally:
        free.put(device)
    said = last_line(log, said_before)
    try:
        if code == 0:
            job.finish()
            return "done" if job.done else "failed", said
        if code == Diverged.exit_code:
            if job.diverge is not None:
                job.diverge(said)
            return "hopeless" if job.diverge is None else "diverged", said
    except (UserError, OSError) as error:  # of keeping what came out
        return ("failed", str(error)) if code == 0 else ("hopeless", f"{said}; {error}")
    return "failed", said


def last_line(log: Path, begin: int = 0) -> str:
    """What a program said last behind the first `begin` bytes of its log."""
    said = log.read_bytes()[begin:].decode(errors="replace").strip() if log.exists() else ""
    lines = [line for line in said.splitlines() if not line.startswith(("srun: ", "submitit "))]
    return lines[-1].strip().removeprefix("error: ") if lines else "said nothing"
