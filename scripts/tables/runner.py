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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaperturb.cli import PARENT, Stop
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
    running: dict[subprocess.Popen, tuple[Job, str, int]] = {}  # with its device, and where its log began
    free = [*itertools.islice(itertools.cycle(devices), at_once)]

    def end(job: Job, became: str, said: str) -> None:
        if became == "done":
            done.add(job.id)
            left = (time.monotonic() - began) / (len(done) - before) * (len(jobs) - len(done))
            so_far = f"{len(done)} of {len(jobs)} done" + f", about {clock(left)} left" * (left > 0)
            print(f"{job.id}: {said} ({so_far})", file=sys.stderr, flush=True)
            return
        if became == "failed" and tried[job.id] < retries:
            tried[job.id] += 1
            waiting.append(job)
            became = "failed, will be tried again"
        elif became != "diverged":
            failed[job.id], became = said, "failed"
        print(f"{job.id}: {became}: {said}", file=sys.stderr)

    try:
        while waiting or running:
            for job in [*waiting]:
                if lost := [need.id for need in job.needs if need.id in failed]:
                    waiting.remove(job)
                    end(job, "hopeless", f"not run, because {lost[0]} failed")
                elif free and done.issuperset(need.id for need in job.needs):
                    waiting.remove(job)
                    try:
                        process, log_begin = _start(job, free[0])
                        running[process] = job, free.pop(0), log_begin
                    except (UserError, OSError) as error:  # one that cannot start does not end the others
                        end(job, "hopeless", f"cannot be started ({reason(error)})")
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                job, device, log_begin = running.pop(process)
                free.append(device)
                end(job, *_outcome(job, process.returncode, last_line(job.run_dir / LOG, log_begin)))
    finally:
        with Stop(tell=False):  # Slurm passes on a signal twice, and ends what is left when we are gone
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    return failed


def _start(job: Job, device: str) -> tuple[subprocess.Popen, int]:
    """Its process, and where what this one says begins in its log, behind what earlier attempts said."""
    save_yaml(dataclasses.asdict(job.config), job.run_dir / SETTINGS)
    command = job.command(device)
    with open(job.run_dir / LOG, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        begin = file.tell()  # before the process moves it
        environment = {**os.environ, PARENT: str(os.getpid())}  # it ends when we are gone
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        return subprocess.Popen(command, **streams, env=environment), begin


def _outcome(job: Job, code: int, said: str) -> tuple[str, str]:
    """What became of an attempt, and what is to be said. What is `"hopeless"` need not be tried again."""
    try:
        if code == 0:
            job.finish()
            return "done" if job.done else "failed", said
        if code == Diverged.exit_code and job.diverge is not None:
            job.diverge(said)
            return "diverged", said
    except (UserError, OSError) as error:  # of keeping what came out
        return "failed", str(error)
    return "hopeless" if code == Diverged.exit_code else "failed", said


def last_line(log: Path, begin: int = 0) -> str:
    """What a program said last behind the first `begin` bytes of its log."""
    said = log.read_bytes()[begin:].decode(errors="replace").strip() if log.exists() else ""
    lines = [line for line in said.splitlines() if not line.startswith(("srun: ", "submitit "))]
    return lines[-1].strip().removeprefix("error: ") if lines else "said nothing"
