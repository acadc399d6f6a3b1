"""What the steps of both training programs share."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from metaperturb.config import CommonConfig
from metaperturb.errors import Diverged, UserError

ABLATION = ("sites", "noise", "gate")  # settings of table 3, by the names that `attach` gives them


def check_ablation(config: CommonConfig) -> None:
    """Refuse to run with nothing left of φ.

    Raises:
        UserError: neither noise nor scale.
    """
    if not (config.noise or config.gate):
        raise UserError("noise, gate: with both false φ does nothing")


def tell_other_ablation(config: CommonConfig, card: Mapping[str, Any]) -> None:
    """Say aloud if φ, by its card, learned without a part that this run uses, or with one that it lacks."""
    learned = card.get("config")
    for key in ("noise", "gate"):
        if learned and learned.get(key, True) != getattr(config, key):
            here, there = (str(value).lower() for value in (getattr(config, key), learned.get(key, True)))
            print(f"phi: was meta-trained with {key}={there}, this run has {key}={here}", file=sys.stderr)


def annealed_strength(step: int, steps: int, share: float) -> float:
    """c at `step` (from 0): rises linearly to 1 over the first `share` of the steps (section 3.3)."""
    ramp = round(steps * share)
    return 1.0 if ramp == 0 else min(1.0, (step + 1) / ramp)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of forward passes: nothing for `"float32"`; for `"bfloat16"` PyTorch casts what bears it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of correct predictions, a scalar on the device; logits `[B, K]`, labels `[B]`.

    Of soft labels `[B, K]` each prediction counts what its class has.
    """
    prediction = logits.detach().argmax(dim=1)
    if labels.dim() == 2:
        return labels.gather(1, prediction[:, None]).mean()
    return (prediction == labels).float().mean()


def check_finite(values: Tensor, first_step: int, run_dir: str) -> None:
    """Stop before a checkpoint could follow a loss or gradient that is not finite.

    Args:
        values: `[steps, T, K]` of consecutive steps and all tasks, or `[steps, K]` without tasks.
        first_step: how many steps preceded them.

    Raises:
        Diverged: naming the first such step and task.
    """
    bad = (~torch.isfinite(values).all(dim=-1)).nonzero()
    if len(bad):
        step, *task = bad[0].tolist()
        where = f"task {task[0]}, " if task else ""
        _diverged("the loss or a gradient", f"{where}step {first_step + step + 1}", run_dir)


def check_finite_parameters(parameters: Iterable[Tensor], whose: str, step: int, run_dir: str) -> None:
    """The same for what a checkpoint after `step` steps is about to hold; `whose`: `"task 3"`, `"φ"`, `"θ"`.

    Raises:
        Diverged: a value is not finite.
    """
    if not all(torch.isfinite(p).all() for p in parameters):
        _diverged("a parameter", f"{whose}, step {step}", run_dir)


def _diverged(what: str, where: str, run_dir: str) -> NoReturn:
    raise Diverged(
        f"{where}: {what} is not finite; stopped, the last good checkpoint is kept in {run_dir} (a smaller lr or clip "
        "may help, in a new run_dir)"
    )
