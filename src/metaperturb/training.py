"""What the steps of both training programs share."""

import torch
from torch import Tensor

from metaperturb.errors import UserError


def annealed_strength(step: int, steps: int, share: float) -> float:
    """c at `step` (from 0): rises linearly to 1 over the first `share` of the steps (section 3.3)."""
    ramp = int(steps * share)
    return 1.0 if ramp == 0 else min(1.0, (step + 1) / ramp)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of correct predictions, a scalar on the device; logits `[B, K]`, labels `[B]`."""
    return (logits.detach().argmax(dim=1) == labels).float().mean()


def check_finite(values: Tensor, first_step: int, run_dir: str) -> None:
    """Stop before a checkpoint could follow a loss or gradient that is not finite.

    Args:
        values: `[steps, T, …]`, of consecutive steps and all tasks.
        first_step: how many steps preceded them.

    Raises:
        UserError: naming the first such step and task.
    """
    bad = ~torch.isfinite(values.flatten(2)).all(dim=2)
    if bad.any():
        step, task = (int(i) for i in bad.nonzero()[0])
        raise UserError(
            f"task {task}, step {first_step + step + 1}: the loss or a gradient is not finite; stopped, the last good "
            f"checkpoint is kept in {run_dir} (a smaller lr or clip may help, in a new run_dir)"
        )
