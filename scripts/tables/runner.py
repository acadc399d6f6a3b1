"""Many training runs, some at a time: on one or several devices, interruptible, beside other runners.

A job is done when its record, one JSON, exists. A job that another runner has locked is left to that runner. Each job
is one of the two training programs, started as anybody would start it. It resumes in its run folder by itself.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from metaperturb.cli import PARENT
from metaperturb.errors import Diverged, UserError
from metaperturb.runs import clock, read_metrics
from metaperturb.storage import hold, reason, save_yaml

LOG, SETTINGS = "log.txt", "settings.yaml"  # what a job says, and what it is given, in its run folder
POLL = 0.5  # seconds between two looks at the processes
LINE_EVERY = 60.0  # seconds between two lines that say how far it is


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        id: unique, also among jobs of other runners.
        program: `"meta_train"` or `"meta_test"`.
        config: its settings but for the device.
        record: the JSON that says that it is done.
        finish: makes the record from the finished run folder.
        needs: ids of jobs that must be done before.
        weight: what one of its steps takes beside those of other jobs: for the time left.
        diverge: called if the run diverged, with what it said last; keeps that, so that `diverged` tells.
        diverged: whether it was kept.
    """

    id: str
    program: str
    config: Any
    record: Path
    finish: Callable[[], None] = lambda: None
    needs: tuple[str, ...] = ()
    weight: float = 1.0
    diverge: Callable[[str], None] | None = None
    diverged: Callable[[], bool] = lambda: False

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def done(self) -> bool:
        return self.record.exists()

    @property
    def lock(self) -> Path:
        return self.record.parent / ".running" / self.id

    def command(self, device: str) -> list[str]:
        """The process that does it on this device: GPU number or `"cpu"`."""
        key = "gpus" if self.program == "meta_train" else "gpu"
        settings = ["--config", str(self.run_dir / SETTINGS), "--set", f"{key}={device}"]
        return [sys.executable, "-m", f"metaperturb.{self.program}", *settings]

    def left(self) -> float:
        """The work before it."""
        return 0.0 if self.done else self.weight * max(0, self.config.steps - last_step(self.run_dir))


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
        title: heads the lines that say how far it is.
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
        self.title = title
        self.jobs = {job.id: job for job in jobs}
        self.waiting = [job for job in jobs if not job.done]
        self.slots = dict(zip(range(at_once), itertools.cycle(devices), strict=False))  # slot → device
        self.tries = dict.fromkeys(self.jobs, retries)
        self.running: list[_Running] = []
        self.outcome = Outcome()
        self.asked = [*self.waiting]
        self.work = sum(job.left() for job in self.asked)
        self.started = self.told = time.monotonic()

    def run(self) -> Outcome:
        try:
            while self.waiting or self.running:
                self._start()
                if not self.running and not self._worth_waiting():
                    break
                time.sleep(POLL)
                for each in [each for each in self.running if each.process.poll() is not None]:
                    self._end(each)
                self._tell()
            self.outcome.elsewhere = [job.id for job in self.waiting]
        finally:
            for each in self.running:
                each.process.terminate()
            for each in self.running:
                each.process.wait()
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
            elif all(self.jobs[need].done for need in job.needs) and (lock := hold(job.lock)):
                self.waiting.remove(job)
                if job.done or job.diverged():  # another runner has seen to it since we looked
                    lock.close()
                    continue
                try:
                    self.running.append(self._launch(job, free[0], lock))
                    del free[0]
                except (UserError, OSError) as error:  # one that cannot start does not end the others
                    lock.close()
                    self._fail(job, f"cannot be started ({reason(error)})")

    def _launch(self, job: Job, slot: int, lock: IO) -> _Running:
        save_yaml(dataclasses.asdict(job.config), job.run_dir / SETTINGS)
        with open(job.run_dir / LOG, "ab") as log:  # behind what earlier attempts said
            environment = {**os.environ, PARENT: str(os.getpid())}  # it ends when we are gone
            command = job.command(self.slots[slot])
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            said_before = log.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        return _Running(job, process, slot, lock, said_before)

    def _end(self, ended: _Running) -> None:
        """See how a process has ended."""
        self.running.remove(ended)
        job, code = ended.job, ended.process.returncode
        said = last_line(job.run_dir / LOG, ended.said_before)
        try:
            if code == 0:
                job.finish()
            elif code == Diverged.exit_code and job.diverge is not None:
                job.diverge(said)
        except (UserError, OSError) as error:
            said = f"{said}; {error}" if code else str(error)
        if code == 0 and job.done:
            self.outcome.finished.append(job.id)
            job.lock.unlink(missing_ok=True)  # whoever takes it now sees the record
            print(f"{job.id}: {said}", file=sys.stderr)
        elif code == Diverged.exit_code and job.diverged():
            self.outcome.diverged[job.id] = said
            print(f"{job.id}: diverged: {said}", file=sys.stderr)
        elif self.tries[job.id] > 0 and code != Diverged.exit_code:
            self.tries[job.id] -= 1
            self.waiting.append(job)
            print(f"{job.id}: failed, will be tried again: {said}", file=sys.stderr)
        else:
            self._fail(job, said)
        ended.lock.close()

    def _fail(self, job: Job, why: str) -> None:
        self.outcome.failed[job.id] = why
        print(f"{job.id}: failed: {why}", file=sys.stderr)

    def _worth_waiting(self) -> bool:
        """Whether something that is with another runner would let us go on once it is done."""
        self.waiting = [job for job in self.waiting if not job.done]
        return any(not self.jobs[need].done for job in self.waiting for need in job.needs)

    def _tell(self) -> None:
        """Now and then, how far it is."""
        now = time.monotonic()
        if now - self.told < LINE_EVERY:
            return
        self.told = now
        lost = {**self.outcome.failed, **self.outcome.diverged}
        work = {job.id: job.left() for job in self.asked}
        done = self.work - sum(work.values())
        left = sum(work for id_, work in work.items() if id_ not in lost)
        time_left = f"about {clock((now - self.started) * left / done)} left" if done > 0 else "time left not known yet"
        jobs = f"{sum(job.done for job in self.jobs.values())}/{len(self.jobs)} done, {len(self.running)} running"
        print(f"{self.title}: {jobs}, {len(lost)} failed, {time_left}", file=sys.stderr, flush=True)


def last_step(run_dir: Path) -> int:
    """The step that the newest line of a run's metrics is of; 0 before the first."""
    lines = read_metrics(run_dir)
    return lines[-1]["step"] if lines else 0


def last_line(log: Path, begin: int) -> str:
    """What a program said last behind the first `begin` bytes of its log."""
    said = ""
    with contextlib.suppress(OSError):
        said = log.read_bytes()[begin:].decode(errors="replace").strip()
    return said.splitlines()[-1].removeprefix("error: ") if said else "said nothing"
