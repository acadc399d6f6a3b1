"""The page of the benchmark, written from its JSON: no number on it is typed by hand."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.exchange import CLUSTER, COLUMNS, GOAL_STEP, HOPS

INTRODUCTION = """\
# Speed

Written by `scripts/benchmark.py` from the JSON beside it.

How times are taken: variants take turns within one run, after a warm-up; every round begins with another variant. On a
GPU the host waits for the device before and after a turn. Each time is the median of the rounds. Each ratio is that of
the medians; the quartiles behind it are those of the ratios of single rounds. "Plain" is the network without the
perturbation, run by the same code on the same images; the "plain kernel" is the perturbation in operators of PyTorch.
Images are noise. φ is frozen in θ-steps."""

SMOKE = "**A smoke run: tiny sizes, which test the program. Nothing here is a measurement of speed.**"

BAR_NAMES = {
    "theta_step": "θ-step: perturbed / plain",
    "meta_step": "meta-step of a task / two plain θ-steps",
    "memory": "peak memory of a θ-step: perturbed / plain",
    "loader": "images a second: our loader / `DataLoader`",
    "evaluation": "evaluation: one Monte-Carlo sample / plain pass",
}


def write_page(documents: Sequence[Mapping[str, Any]], figures: Mapping[tuple[str, str], Path], page: Path) -> str:
    """Markdown of all devices; `figures`: (device, suite) → file."""
    parts = [INTRODUCTION]
    for document in documents:
        device = document["device"]
        parts.append(heading(document))
        for suite, write in SUITES.items():
            if suite in document["suites"]:
                parts.append(write(document["suites"][suite], document))
                if (device, suite) in figures:
                    link = Path(os.path.relpath(figures[device, suite], page.parent)).as_posix()
                    parts.append(f"![{suite}]({link})")
    return "\n\n".join(parts) + "\n"


def heading(document: Mapping[str, Any]) -> str:
    hardware, versions = document["hardware"], document["versions"]
    name = hardware["cpu"] if document["device"] == "cpu" else hardware["device"]
    lines = [f"## {'CPU' if document['device'] == 'cpu' else 'GPU'}: {name}"]
    if document["smoke"]:
        lines.append(SMOKE)
    facts = [f"{hardware['cpu']}, {hardware['cores']} cores"]
    if document["device"] != "cpu":
        facts.append(f"{hardware['gpus']} × {hardware['device']}")
    facts += [f"Python {versions['python']}", f"PyTorch {versions['torch']}", f"kernel: {document['kernel']}"]
    lines.append("; ".join(facts) + ".")
    rows = [
        [
            *(f"`{name}`", f"`{suite['command']}`", suite["settings"]["threads"], suite["settings"]["rounds"]),
            *(suite["date"], suite["commit"] or "–", f"{suite['load_before']:.1f}", quantity(suite["seconds"], "s")),
        ]
        for name, suite in document["suites"].items()
    ]
    columns = ["suite", "command", "threads", "rounds", "date", "commit", "load before", "took"]
    lines.append(table(columns, rows))
    return "\n\n".join(lines)


def write_bars(suite: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    groups = suite["groups"]
    rows, further = [], []
    for ratio in suite["ratios"]:
        group = groups[ratio["group"]]
        above, below = (group["timings"][ratio[part]]["median"] for part in ("numerator", "denominator"))
        measured = f"{quantity(above, group['unit'])} / {quantity(below, group['unit'])}"
        if ratio.get("name") == "loader":
            batch = group["settings"]["batch"]
            measured = f"{short(batch / below)} / {short(batch / above)}"
        cells = [measured, f"**{ratio['ratio']:.2f}**", f"{ratio['q1']:.2f} – {ratio['q3']:.2f}"]
        if group["unit"] == "bytes":
            cells[-1] = "exact"
        if "bar" in ratio:
            sign = "≥" if ratio["name"] == "loader" else "≤"
            cells += [f"{sign} {ratio['bar']:g}", "yes" if ratio["met"] else "**no**"]
            rows.append([BAR_NAMES[ratio["name"]], *cells])
        else:
            further.append([f"{ratio['group']}: {ratio['numerator']} / {ratio['denominator']}", *cells])
    steps, evaluation, memory = groups["steps"]["settings"], groups["evaluation"]["settings"], groups["memory"]
    timings = groups["loader"]["timings"]
    batch = groups["loader"]["settings"]["batch"]
    rates = [f"{name}: {short(batch / timing['median'])}" for name, timing in timings.items()]
    held = [
        f"{name} {quantity(memory['held'][name], 'bytes')} + {quantity(memory['added'][name], 'bytes')}"
        for name in memory["held"]
    ]
    return f"""\
### Bars (`bars`)

{described(steps)}; evaluation in batches of {evaluation["batch"]}. Measured.

{table(["what", "measured", "ratio", "quartiles", "bar", "met"], rows)}

Beside them:

{table(["what", "measured", "ratio", "quartiles"], further)}

A θ-step draws and augments its batch, runs forward and backward, and updates θ with fused Adam. A meta-step is a θ-step
and the gradient of φ on another batch.

Memory is what is held between steps (parameters, buffers, the optimizer's state) plus the most that a θ-step adds:
batch, activations, gradients, workspace. {MEMORY[document["device"]]} Held + added: {"; ".join(held)}.

Images a second, augmented (crop, flip, normalization) and on the device: {"; ".join(rates)}. The `DataLoader` reads the
same uint8 images from memory through torchvision's transforms of PIL pictures; the better number of workers counts."""


MEMORY = {
    "cpu": "Counted is every block that PyTorch's allocator hands out; what a library takes for itself is not.",
    "cuda": "Counted is what PyTorch's allocator has handed out; its cache and what a library takes are not.",
}


def write_site(suite: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    rows = []
    for name, group in suite["groups"].items():
        for ratio in (ratio for ratio in suite["ratios"] if ratio["group"] == name):
            timings = group["timings"]
            plain, fused = timings[ratio["numerator"]], timings[ratio["denominator"]]
            what = ratio["numerator"].rpartition(", ")[0]
            rows.append([f"[{name}]", what.replace("with", "forward + backward, with") if "with" in what else what])
            rows[-1] += [quantity(fused["median"], "s"), quantity(plain["median"], "s")]
            rows[-1] += [f"{ratio['ratio']:.2f}", f"{ratio['q1']:.2f} – {ratio['q3']:.2f}"]
            rows[-1].append(quantity(timings["drawing the noise"]["median"], "s"))
    columns = ["feature map", "what", f"kernel `{document['kernel']}`", "plain kernel", "plain / kernel", "quartiles"]
    return f"""\
### One site (`site`)

One perturbation site in training mode. The last column is what `torch.randn_like` alone takes for that map. Measured.

{table([*columns, "noise alone"], rows)}"""


def write_scaling(suite: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    groups = suite["groups"]
    tasks, processes, channels = groups["tasks"], groups["processes"], groups["channels"]
    parts = ["### Growth (`scaling`)", "All measured."]

    rows = []
    for value in tasks["settings"]["values"]:
        timing = tasks["timings"][str(value)]
        rows.append([value, spread(timing), quantity(timing["median"] / value, "s")])
    parts.append(
        f"**Tasks** on one process: a joint step (every task's meta-step, the mean of the gradients, φ's update) of "
        f"{described(tasks['settings'])}. A task holds {quantity(tasks['held_by_a_task'], 'bytes')} between steps."
    )
    parts.append(table(["tasks", "joint step (quartiles)", "a task"], rows))

    first = processes["timings"][str(processes["settings"]["values"][0])]["median"]
    rows = []
    for value in processes["settings"]["values"]:
        timing = processes["timings"][str(value)]
        rows.append([value, spread(timing), f"{first / timing['median']:.2f}"])
    shared = "" if document["device"] == "cpu" else f" Processes share {document['hardware']['gpus']} GPU(s)."
    parts.append(
        f"**Processes**: {processes['settings']['tasks']} tasks, {described(processes['settings'])}, "
        f"{processes['settings']['threads_a_process']} CPU thread(s) a process.{shared}"
    )
    parts.append(table(["processes", "joint step (quartiles)", "speed-up"], rows))

    rows = []
    for value in channels["settings"]["values"]:
        fused, plain = (channels["timings"][f"{kernel} {value}"] for kernel in ("auto", "plain kernel"))
        rows.append([value, spread(fused), spread(plain)])
    side = channels["settings"]["side"]
    parts.append(
        f"**Channels**: one site forward and backward (gradient of h) on [{channels['settings']['batch']}, C, {side}, "
        f"{side}]."
    )
    parts.append(table(["C", f"kernel `{document['kernel']}` (quartiles)", "plain kernel (quartiles)"], rows))

    for name, what in (("image size", "Image size"), ("batch", "Batch")):
        group = groups[name]
        found = {ratio["numerator"]: ratio for ratio in suite["ratios"] if ratio["group"] == name}
        rows = []
        for value in group["settings"]["values"]:
            plain, perturbed = (group["timings"][f"{kind} {value}"] for kind in ("plain", "perturbed"))
            peaks = [group["peak_bytes"][f"{kind} {value}"] for kind in ("plain", "perturbed")]
            rows.append([value, spread(plain), spread(perturbed), f"{found[f'perturbed {value}']['ratio']:.2f}"])
            rows[-1] += [quantity(peak, "bytes") for peak in peaks] + [f"{peaks[1] / peaks[0]:.2f}"]
        parts.append(f"**{what}**: θ-steps of {described(group['settings'])}.")
        columns = [name, "plain (quartiles)", "perturbed (quartiles)", "ratio"]
        parts.append(table([*columns, "peak memory, plain", "perturbed", "ratio"], rows))
    return "\n\n".join(parts)


def write_exchange(suite: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    gather, task = suite["groups"]["gather"], suite["groups"]["task"]
    cores, tasks = document["hardware"]["cores"], gather["settings"]["tasks"]
    rows = []
    for count in gather["settings"]["processes"]:
        transport = gather["transport"][str(count)]
        if transport == "gloo" and count > cores:
            transport += ", cores oversubscribed"
        timings = [gather["timings"].get(f"{count} processes, {number} tasks") for number in tasks]
        rows.append([count, transport, *(spread(timing) if timing else "–" for timing in timings)])
    step = task["timings"]["meta-step"]
    fits = []
    for hops in HOPS:
        fitted = suite["fits"][hops]
        bandwidth = f"{short(1e-9 / fitted['seconds_a_byte'])} GB/s" if fitted["seconds_a_byte"] else "no limit"
        error = f"{100 * fitted['worst_relative_error']:.0f} %"
        fits.append([hops, quantity(fitted["start"], "s"), quantity(fitted["hop"], "s"), bandwidth, error])
    waiting = ""
    if document["device"] == "cpu" and max(gather["settings"]["processes"]) > cores:
        waiting = (
            f"\n\nWith more than {cores} processes on {cores} cores, the times, and so the fit, are mostly of waiting "
            "for a core, not for a network."
        )
    parts = [
        f"""\
### Exchange of φ's gradients (`exchange`)

**Measured**: seconds of `Group.gather_rows`, median (quartiles). Each task gives a row of {COLUMNS} float32 numbers and
every process receives all rows, so the table grows with the tasks.

{table(["processes", "transport", *(f"{number:,} tasks" for number in tasks)], rows)}

A task's meta-step beside it ({described(task["settings"])}): {spread(step)}, measured.

**Model**: latency = start + hop × hops(G) + bytes received / bandwidth, for G processes; hops(G) is log₂ G (tree) or
G − 1 (ring). Fitted to the table above, relative errors, no coefficient below 0:

{table(["hops", "start", "hop", "bandwidth", "largest error"], fits)}{waiting}""",
        """\
**Projected, not measured**: parallel efficiency of T tasks on T GPUs, that is a task's meta-step / (that step + the
exchange). Assumptions:

- every process has one task, and all take equally long; the columns "slowest" wait for the slowest of T, √(2 ln T)
  standard deviations above the mean, with the spread that the steps here had;
- nothing overlaps; reading the table and updating φ cost nothing;
- an all-gather needs log₂ T hops (tree) or T − 1 (ring). Which of them a library takes decides at many GPUs;
- the model holds far beyond the processes that were measured.""",
    ]
    for case in suite["projections"]:
        seconds = quantity(case["step_seconds"], "s")
        if case["case"] == "fitted":
            title = f"With this machine's model above and its step ({seconds}, spread {100 * case['spread']:.1f} %):"
        else:
            source = "measured above" if document["device"] == "cuda" else f"the goal: {quantity(GOAL_STEP, 's')}"
            start, hop = quantity(CLUSTER["start"], "s"), quantity(CLUSTER["hop"], "s")
            network = f"start {start}, hop {hop}, {short(1e-9 / CLUSTER['seconds_a_byte'])} GB/s"
            title = f"With an assumed cluster ({network}) and a step of {seconds} ({source}; spread as here):"
        rows = []
        for row in case["rows"]:
            cells = [f"{row['tasks']:,}", quantity(row["table_bytes"], "bytes")]
            for hops in HOPS:
                cells.append(quantity(row[f"{hops}_seconds"], "s"))
                cells += [f"{100 * row[f'{hops}_efficiency{end}']:.1f} %" for end in ("", "_slowest")]
            rows.append(cells)
        columns = [f"{hops}: {what}" for hops in HOPS for what in ("exchange", "efficiency", "slowest")]
        parts += [title, table(["tasks = GPUs", "table", *columns], rows)]
    return "\n\n".join(parts)


def write_training(suite: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    rows = []
    for name, run in suite["runs"].items():
        how = f"extrapolated from {run['steps']:,} steps in {quantity(run['measured_seconds'], 's')}"
        rows.append([name, f"{run['wanted_steps']:,}", quantity(run["seconds"], "s")])
        rows[-1].append(how if run["extrapolated"] else "measured")
        rows[-1] += [f"< {run['goal']:g} s", "yes" if run["met"] else "**no**"] if "goal" in run else ["–", "–"]
    at_once = suite["at_once"]
    alone = at_once["steps_a_second"]["1"]
    together = [[count, short(steps), f"{steps / alone:.2f}"] for count, steps in at_once["steps_a_second"].items()]
    lengths = suite["lengths"]
    return f"""\
### Trainings (`training`)

Whole runs of the two programs, from reading the settings to the result, evaluations and checkpoints included. Drawn
images; {lengths["model"]}, batch {lengths["batch"]}, {lengths["tasks"]} tasks.

{table(["run", "steps", "wall time", "how", "goal", "met"], rows)}

Meta-tests at once on one device ({at_once["image_size"]} px, {at_once["steps"]:,} steps each, no evaluation between):
steps a second of all together, while all of them train. Best relative to one:
{at_once["best_relative_to_one"]:.2f}; goal ≥ {at_once["goal"]:g}: {"met" if at_once["met"] else "**not met**"}.

{table(["at once", "steps a second", "relative to one"], together)}"""


SUITES = {
    "bars": write_bars,
    "site": write_site,
    "scaling": write_scaling,
    "exchange": write_exchange,
    "training": write_training,
}


# --- text


def table(columns: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    head, *body = ["| " + " | ".join(map(str, cells)) + " |" for cells in (columns, *rows)]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def short(value: float) -> str:
    """Three significant digits, without an exponent: 0.0123, 1.23, 123, 12,300."""
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def quantity(value: float, unit: str) -> str:
    """Seconds or bytes, in a unit that suits their size."""
    scales = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), "bytes": ((1e6, "MB"), (1e3, "kB"), (1.0, "B"))}[unit]
    scale, name = next((s for s in scales if value >= s[0]), scales[-1])
    return f"{short(value / scale)} {name}"


def spread(timing: Mapping[str, Any]) -> str:
    """Median (quartiles) in one unit."""
    scale, name = next((s for s in ((1.0, "s"), (1e-3, "ms")) if timing["median"] >= s[0]), (1e-6, "µs"))
    return f"{short(timing['median'] / scale)} ({short(timing['q1'] / scale)} – {short(timing['q3'] / scale)}) {name}"


def described(settings: Mapping[str, Any]) -> str:
    parts = [settings["model"]]
    if "batch" in settings:
        parts.append(f"batch {settings['batch']}")
    if "image_size" in settings:
        parts.append(f"{settings['image_size']} × {settings['image_size']} pixels")
    return ", ".join(parts)
