"""Many training runs, some at a time: on one or several devices, interruptible, beside other runners.

A job counts as done once its record, one JSON, is there. A job that another runner has locked is left to it. Each job
is one of the two training programs, started as anybody would start it, in a run folder that it resumes by itself.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tqdm import tqdm

from metaperturb.cli import PARENT
from metaperturb.errors import Diverged, UserError
from metaperturb.runs import clock
from metaperturb.storage import reason

LOG = "log.txt"
POLL = 0.5  # seconds between two looks at the processes
LINE_EVERY = 60.0  # seconds between two progress lines where there is no terminal


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        id: unique, also among jobs of other runners.
        program: `"meta_train"` or `"meta_test"`.
        arguments: its command line behind the program, without the device.
        run_dir: the folder that it works in.
        record: the JSON that says that it is done.
        finish: makes the record from the finished run folder.
        needs: ids of jobs that must be done before.
        steps: how many it has, for the time left.
        work: how much there is to compute, in any unit common to all jobs.
        diverge: called if the run diverged, with what it said last; keeps that, so that `diverged` tells.
        diverged: whether it was kept.
    """

    id: str
    program: str
    arguments: Sequence[str]
    run_dir: Path
    record: Path
    finish: Callable[[], None]
    needs: tuple[str, ...] = ()
    steps: int = 1
    work: float = 1.0
    diverge: Callable[[str], None] | None = None
    diverged: Callable[[], bool] = lambda: False

    @property
    def done(self) -> bool:
        return self.record.exists()

    def command(self, device: str) -> list[str]:
        """The process that does it on this device: GPU number or `"cpu"`."""
        key = "gpus" if self.program == "meta_train" else "gpu"
        return [sys.executable, "-m", f"metaperturb.{self.program}", *self.arguments, f"{key}={device}"]


@dataclass
class Outcome:
    """What became of the jobs that were not done before."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # id → the last line it said
    diverged: dict[str, str] = field(default_factory=dict)  # likewise; those that are kept as such
    elsewhere: list[str] = field(default_factory=list)  # in the hands of another runner


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    slot: int
    lock: IO
    said_before: int  # bytes in its log when it began


def run_jobs(title: str, jobs: Sequence[Job], devices: Sequence[str], at_once: int, retries: int = 1) -> Outcome:
    """Run the jobs that are not done, in their order as far as what they need allows.

    Args:
        title: heads the progress line.
        jobs: those that others need among them.
        devices: of each a share of the jobs, in turn.
        at_once: how many run at a time.
        retries: how often a job that failed, unless it diverged, is tried again, after the others.

    Returns:
        What finished, failed, diverged and is with another runner.
    """
    return _Runner(title, jobs, devices, at_once, retries).run()


class _Runner:
    def __init__(self, title: str, jobs: Sequence[Job], devices: Sequence[str], at_once: int, retries: int) -> None:
        self.jobs = {job.id: job for job in jobs}
        self.waiting = [job for job in jobs if not job.done]
        self.slots = dict(zip(range(at_once), itertools.cycle(devices), strict=False))  # slot → device
        self.tries = {job.id: retries for job in jobs}
        self.running: list[_Running] = []
        self.outcome = Outcome()
        self.progress = _Progress(title, jobs, self)

    def run(self) -> Outcome:
        try:
            while self.waiting or self.running:
                self._start()
                if not self.running and not self._worth_waiting():
                    break
                time.sleep(POLL)
                self._collect()
                self.progress.show()
            self.outcome.elsewhere = [job.id for job in self.waiting]
        finally:
            for each in self.running:
                each.process.terminate()
            for each in self.running:
                each.process.wait()
            self.progress.close()
        return self.outcome

    def _start(self) -> None:
        """Fill the free slots."""
        taken = {each.slot for each in self.running}
        free = [slot for slot in self.slots if slot not in taken]
        for job in [*self.waiting]:
            if not free:
                return
            if lost := [need for need in job.needs if need in self.outcome.failed]:
                self.waiting.remove(job)
                self._fail(job, f"not run, because {lost[0]} failed")
            elif all(self.jobs[need].done for need in job.needs) and (lock := _lock(job)):
                self.waiting.remove(job)
                if job.done or job.diverged():  # another runner has seen to it since we looked
                    lock.close()
                else:
                    try:
                        self.running.append(self._launch(job, free[0], lock))
                        del free[0]
                    except OSError as error:  # one that cannot start does not end the others
                        lock.close()
                        self._fail(job, f"{job.run_dir}: cannot be started ({reason(error)})")

    def _launch(self, job: Job, slot: int, lock: IO) -> _Running:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        with open(job.run_dir / LOG, "ab") as log:  # behind what earlier attempts said
            environment = {**os.environ, PARENT: str(os.getpid())}  # it ends when we are gone
            command = job.command(self.slots[slot])
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            said_before = log.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        return _Running(job, process, slot, lock, said_before)

    def _collect(self) -> None:
        """See which processes have ended, and how."""
        for each in [each for each in self.running if each.process.poll() is not None]:
            self.running.remove(each)
            job = each.job
            said = last_line(job.run_dir / LOG, each.said_before)
            if each.process.returncode == 0:
                try:
                    job.finish()
                except (UserError, OSError) as error:
                    said = str(error)
            if each.process.returncode == 0 and job.done:
                self.outcome.finished.append(job.id)
                _lock_path(job).unlink(missing_ok=True)  # whoever takes it now sees the record
                self.progress.write(f"{job.id}: {said}")
            elif self.tries[job.id] > 0 and each.process.returncode != Diverged.exit_code:
                self.tries[job.id] -= 1
                self.waiting.append(job)
                self.progress.write(f"{job.id}: failed, will be tried again: {said}")
            elif each.process.returncode == Diverged.exit_code and self._keep(job, said):
                self.outcome.diverged[job.id] = said
                self.progress.write(f"{job.id}: diverged: {said}")
            else:
                self._fail(job, said)
            each.lock.close()

    def _keep(self, job: Job, said: str) -> bool:
        if job.diverge is not None:
            try:
                job.diverge(said)
            except UserError as error:
                self.progress.write(f"{job.id}: {error}")
        return job.diverged()

    def _fail(self, job: Job, why: str) -> None:
        self.outcome.failed[job.id] = why
        self.progress.write(f"{job.id}: failed: {why}")

    def _worth_waiting(self) -> bool:
        """Whether something that is with another runner would let us go on once it is done."""
        self.waiting = [job for job in self.waiting if not job.done]
        return any(not self.jobs[need].done for job in self.waiting for need in job.needs)


class _Progress:
    """Jobs done, running and failed, and the time left: a bar on a terminal, elsewhere a line a minute."""

    def __init__(self, title: str, jobs: Sequence[Job], runner: _Runner) -> None:
        self.title, self.runner, self.total = title, runner, len(jobs)
        self.todo = sum(job.work * _remaining(job) for job in runner.waiting)
        self.before = [job.id for job in runner.waiting]
        self.started = self.last = time.monotonic()
        self.bar = tqdm(total=self.total, desc=title, unit="run") if sys.stderr.isatty() else None

    def show(self) -> None:
        now = time.monotonic()
        if now - self.last < (2.0 if self.bar is not None else LINE_EVERY):
            return
        self.last = now
        jobs = self.runner.jobs.values()
        outcome = self.runner.outcome
        done, failed = sum(job.done for job in jobs), len(outcome.failed) + len(outcome.diverged)
        text = f"{len(self.runner.running)} running, {failed} failed, {self.time_left(now)}"
        if self.bar is not None:
            self.bar.n = done
            self.bar.set_postfix_str(text)
        else:
            print(f"{self.title}: {done}/{self.total} done, {text}", file=sys.stderr, flush=True)

    def time_left(self, now: float) -> str:
        jobs = self.runner.jobs
        remaining = {id_: jobs[id_].work * _remaining(jobs[id_]) for id_ in self.before}
        done = self.todo - sum(remaining.values())
        ended = {*self.runner.outcome.failed, *self.runner.outcome.diverged}
        left = sum(work for id_, work in remaining.items() if id_ not in ended)
        if done <= 0:
            return "time left not known yet"
        return f"about {clock((now - self.started) * left / done)} left"

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.n = sum(job.done for job in self.runner.jobs.values())
            self.bar.close()


def _remaining(job: Job) -> float:
    """Share of its steps that a job has before it."""
    return 0.0 if job.done or not job.steps else 1.0 - min(1.0, last_step(job.run_dir) / job.steps)


def _lock(job: Job) -> IO | None:
    """Held until it is closed, or this process is gone; None: another runner holds it."""
    path = _lock_path(job)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115 (held as long as the job)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({reason(error)})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _lock_path(job: Job) -> Path:
    return job.record.parent / ".running" / job.id


def last_step(run_dir: Path) -> int:
    """The step that the newest complete line of a run's metrics is of; 0 before the first."""
    with contextlib.suppress(OSError, ValueError, KeyError), open(run_dir / "metrics.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        for line in reversed(file.read().split(b"\n")[:-1]):
            return int(json.loads(line)["step"])
    return 0


def last_line(log: Path, begin: int) -> str:
    """What a program said last behind the first `begin` bytes of its log."""
    said = ""
    with contextlib.suppress(OSError):
        said = log.read_bytes()[begin:].decode(errors="replace").strip()
    return said.splitlines()[-1].removeprefix("error: ") if said else "said nothing"
