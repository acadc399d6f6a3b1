"""Suite `training`: whole trainings on one GPU, by the programs themselves."""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.timing import rounded
from bench.workload import Bench
from metaperturb.cli import PARENT
from metaperturb.errors import UserError
from metaperturb.provenance import available_cores
from metaperturb.runs import finished_result, read_metrics

GOALS = {"meta-training": 120.0, "meta-test, 32 px": 90.0, "meta-test, 84 px": 300.0}  # seconds
THROUGHPUT_GOAL = 2.0  # several trainings at once on one GPU, relative to one
TARGET_STEPS = 10_000  # section 4.1; where fewer are run, the rest is extrapolated


@dataclass(frozen=True)
class Lengths:
    """How much of the trainings is run."""

    model: str
    batch: int
    tasks: int
    meta_steps: int
    steps: dict[int, int]  # of a meta-test, by image size
    eval_every: int
    eval_samples: int
    final_samples: int
    at_once: tuple[int, ...]
    at_once_steps: int


PAPER = Lengths("resnet20", 128, 10, 750, {32: 2000, 84: 1000}, 200, 5, 100, (1, 2, 4, 8), 1000)
SMOKE = Lengths("resnet8", 8, 2, 4, {12: 4}, 2, 1, 1, (1, 2), 4)


def training(bench: Bench) -> dict[str, Any]:
    """Wall seconds of meta-training and of meta-tests, and the throughput of several meta-tests at once."""
    lengths = SMOKE if bench.smoke else PAPER
    common = [f"model={lengths.model}", f"batch_size={lengths.batch}"]
    device = "cpu" if bench.device.type == "cpu" else "0"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = [
            "source=embedded",
            f"gpus={device}",
            f"tasks={lengths.tasks}",
            f"steps={lengths.meta_steps}",
            f"run_dir={folder / 'src'}",
        ]
        if bench.smoke:
            own.append(f"image_size={min(lengths.steps)}")
        run_all([("meta_train", [*common, *own])])
        results = {"meta-training": finished(folder / "src", lengths.meta_steps, lengths.meta_steps)}

        target = [*common, "target=embedded", f"gpu={device}", f"phi={folder / 'src' / 'phi.pt'}"]
        evaluated = [
            f"eval_every={lengths.eval_every}",
            f"eval_samples={lengths.eval_samples}",
            f"final_samples={lengths.final_samples}",
        ]
        for size, steps in lengths.steps.items():
            run_dir = folder / f"tgt-{size}"
            own = [f"image_size={size}", f"steps={steps}", f"run_dir={run_dir}"]
            run_all([("meta_test", [*target, *evaluated, *own])])
            results[f"meta-test, {size} px"] = finished(run_dir, steps, TARGET_STEPS)

        throughput = {}
        quiet = [
            f"image_size={min(lengths.steps)}",
            f"steps={lengths.at_once_steps}",
            f"eval_every={lengths.at_once_steps}",
            "final_samples=1",
            f"log_every={max(1, lengths.at_once_steps // 20)}",
            f"checkpoint_every={lengths.at_once_steps}",
            f"threads={max(1, available_cores() // max(lengths.at_once))}",
        ]
        for count in lengths.at_once:
            run_dirs = [folder / f"at-once-{count}-{i}" for i in range(count)]
            run_all([("meta_test", [*target, *quiet, f"run_dir={run_dir}"]) for run_dir in run_dirs])
            throughput[str(count)] = rounded(steps_together(run_dirs))
    for name, result in results.items():
        if name in GOALS:
            result |= {"goal": GOALS[name], "met": result["seconds"] <= GOALS[name]}
    alone = throughput["1"]
    best = rounded(max(throughput.values()) / alone)
    return {
        "groups": {},
        "ratios": [],
        "lengths": dataclasses.asdict(lengths),
        "runs": results,
        "at_once": {
            "steps": lengths.at_once_steps,
            "image_size": min(lengths.steps),
            "steps_a_second": throughput,
            "best_relative_to_one": best,
            "goal": THROUGHPUT_GOAL,
            "met": best >= THROUGHPUT_GOAL,
        },
    }


def run_all(programs: list[tuple[str, list[str]]]) -> None:
    """Run the programs with these settings, all at once, and wait; the first failure stops the others."""
    environment = {**os.environ, PARENT: str(os.getpid())}
    with ExitStack() as stack:
        running = []
        for program, settings in programs:
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, "-m", f"metaperturb.{program}", "--set", *settings]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
            stack.callback(_end, process)
            running.append((process, program, said))
        while running:
            time.sleep(0.1)
            for process, program, said in [each for each in running if each[0].poll() is not None]:
                running = [each for each in running if each[0] is not process]
                if process.returncode:
                    said.seek(0)
                    lines = said.read().strip().splitlines() or ["no output"]
                    raise UserError(f"training: {program} failed: {lines[-1].removeprefix('error: ')}")


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait()


def finished(run_dir: Path, steps: int, wanted: int) -> dict[str, Any]:
    """Wall seconds of the run, from settings to result; of fewer steps than wanted, extrapolated by its later half."""
    seconds = finished_result(run_dir)["seconds"]
    found = {"steps": steps, "measured_seconds": seconds, "wanted_steps": wanted, "extrapolated": steps < wanted}
    if steps < wanted:
        seconds += (wanted - steps) / steps_a_second(run_dir)
    return {**found, "seconds": rounded(seconds)}


def steps_a_second(run_dir: Path) -> float:
    """In the later half of the run, without its end; where it evaluates, from evaluation to evaluation."""
    lines = read_metrics(run_dir)[:-1]
    evaluations = [line for line in lines if "test_accuracy" in line]
    if len(evaluations) >= 2:
        lines = evaluations
    first = lines[len(lines) // 2 - 1] if len(lines) > 1 else {"step": 0, "seconds": 0.0}
    return (lines[-1]["step"] - first["step"]) / max(lines[-1]["seconds"] - first["seconds"], 1e-3)


def steps_together(run_dirs: list[Path]) -> float:
    """Steps a second of all runs together, while all of them train: without the first fifth of each."""
    clocks = []
    for run_dir in run_dirs:
        started = (run_dir / "config.yaml").stat().st_mtime  # written when the run's own clock starts
        lines = read_metrics(run_dir)
        lines = lines[len(lines) // 5 : -1]  # the last line's seconds hold the last evaluation
        clocks.append(([started + line["seconds"] for line in lines], [line["step"] for line in lines]))
    begin, end = max(times[0] for times, _ in clocks), min(times[-1] for times, _ in clocks)
    if begin >= end:  # runs so short that they hardly met
        begin, end = min(times[0] for times, _ in clocks), max(times[-1] for times, _ in clocks)
    done = sum(np.interp(end, times, steps) - np.interp(begin, times, steps) for times, steps in clocks)
    return float(done / max(end - begin, 1e-3))
