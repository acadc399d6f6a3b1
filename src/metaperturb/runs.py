"""One folder a run: `config.yaml`, `metrics.jsonl`, `checkpoints/`, and at the end `result.json` and `curves.png`."""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from metaperturb.errors import UserError
from metaperturb.provenance import provenance
from metaperturb.storage import hold, load_json, reason, remove_leftovers, save_json, save_yaml, write_atomically

clock = tqdm.format_interval  # of seconds: `1:02:03`, or `02:03` below an hour


class Run:
    """The folder that a run's settings name, held by one process at a time."""

    def __init__(self, config: Any, program: str) -> None:
        self.config, self.program = config, program
        self.dir = Path(config.run_dir)
        self.metrics_path = self.dir / "metrics.jsonl"
        self.seconds_before = 0.0  # wall time of earlier sittings, from the checkpoint
        self._started = time.monotonic()
        self._lock = hold(self.dir / ".lock")
        if self._lock is None:
            raise UserError(f"{self.dir}: in use by another process; choose another run_dir")
        remove_leftovers(self.dir)
        save_yaml({"program": program, **dataclasses.asdict(config)}, self.dir / "config.yaml")

    @property
    def seconds(self) -> float:
        """Wall time of the run in seconds, over all sittings."""
        return self.seconds_before + time.monotonic() - self._started

    def rewind(self, step: int) -> None:
        """Drop what a resumed run does again, steps after `step` and the final evaluation, and a half-written line."""
        lines = [line for line in read_metrics(self.dir) if line["step"] <= step and "train_loss" in line]
        kept = [json.dumps(line) + "\n" for line in lines]
        write_atomically(self.metrics_path, lambda file: file.write("".join(kept).encode()))

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line, which has a `step`."""
        try:
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise UserError(f"{self.metrics_path}: cannot write ({reason(error)})") from error

    def describe(self, result: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The result and all that is needed to place it: settings, seed, versions, commit, hardware, wall time."""
        return {
            "program": self.program,
            **result,
            "seed": self.config.seed,
            "seconds": round(self.seconds, 1),
            "config": dataclasses.asdict(self.config),
            **provenance(device),
        }

    def finish(self, content: dict[str, Any]) -> None:
        """Write `result.json`, the last of the files (a run counts as finished once it is there), and let go."""
        save_json(content, self.dir / "result.json")
        self._lock.close()


def read_result(path: str | os.PathLike) -> dict[str, Any]:
    """What a run left: its `result.json`, or a record of it under `results/`, which has the same shape.

    A record adds `cell`, its place in a table, and `curve`, its evaluations. One of a training that diverged has
    `diverged`, what it said last, and no `metrics`.

    Raises:
        UserError: the file cannot be read, or is none of these.
    """
    result = load_json(Path(path))
    match result:
        case {"program": "meta_train", "config": dict()}:
            return result
        case {"program": "meta_test", "config": {"seed": _}, "target": {"fingerprints": [_, _]}, "phi_digest": _, **of}:
            match of:
                case {"init": _, "metrics": {"accuracy": _, "nll": _, "ece": _}} | {"metrics": None, "diverged": str()}:
                    return result
    raise UserError(f"{path}: is no result of a run; remove it")


def finished_result(run_dir: str | os.PathLike) -> dict[str, Any] | None:
    """The content of `result.json`, or None while the run is not finished."""
    path = Path(run_dir) / "result.json"
    return read_result(path) if path.exists() else None


def finished_meta_test(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of `result.json` of a finished run of meta-testing; any other folder is refused."""
    result = finished_result(folder)
    if result is None:
        raise UserError(f"{folder}: holds no finished run (no result.json; what began a run also continues it)")
    if result["program"] != "meta_test":
        raise UserError(f"{folder}: a run of {result['program']}, which trains no network on a target")
    return result


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`. One that is damaged is left out, as is a last one of a killed process."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = []
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError):  # no JSON, or no UTF-8
            match json.loads(text):
                case {"step": int()} as line:
                    lines.append(line)
    return lines


class StepProgress:
    """Steps done, metrics and time left: a line every `interval` seconds; on a terminal one that is written over."""

    def __init__(self, title: str, total: int, done: int, interval: float = 15.0) -> None:
        self.title, self.total, self.done, self.first = title, total, done, done
        self.terminal, self.started = sys.stderr.isatty(), time.monotonic()
        self.interval = 0.2 if self.terminal else interval
        self.last = self.started - self.interval  # so that the first update prints

    def update(self, done: int, **metrics: float) -> None:
        now, self.done = time.monotonic(), done
        if now - self.last >= self.interval or done == self.total:
            left = (now - self.started) / max(done - self.first, 1) * (self.total - done)
            text = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            self._tell(now, f"{text}  {clock(left)} left")

    def within(self, share: float) -> None:
        """How much is done of what takes its time between two steps or after the last: an evaluation."""
        now = time.monotonic()
        if now - self.last >= self.interval:
            self._tell(now, f"evaluating: {share:.0%}")

    def say(self, text: str) -> None:
        """A line of its own."""
        print("\r\x1b[K" * self.terminal + text, file=sys.stderr)

    def close(self) -> None:
        print(end="\n" * self.terminal, file=sys.stderr)

    def _tell(self, now: float, text: str) -> None:
        self.last, text = now, f"{self.title}: step {self.done}/{self.total}  {text}"
        if self.terminal:
            text = f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K"
        print(text, end="" if self.terminal else "\n", file=sys.stderr, flush=True)
