"""A network that meta-testing trained, read back from its run folder: what the analyses begin with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaperturb import methods, models
from metaperturb.config import MetaTestConfig, from_record
from metaperturb.data.arrays import ImageArrays
from metaperturb.data.registry import load_parts
from metaperturb.errors import UserError
from metaperturb.perturbation import MetaPerturb
from metaperturb.runs import finished_meta_test
from metaperturb.storage import load_tensors


@dataclass(frozen=True)
class TrainedRun:
    """A finished run of meta-testing, with the images it was trained and evaluated on.

    The network is in evaluation mode: images `[B, 3, S, S]` in [-1, 1] → logits `[B, K]`. MetaPerturb is at full
    strength, and each call draws anew.
    """

    dir: Path
    config: MetaTestConfig
    result: dict[str, Any]  # the content of `result.json`
    model: nn.Module
    stochastic: bool  # whether it draws in evaluation
    train: ImageArrays
    test: ImageArrays


def load_run(folder: str | Path, device: torch.device | str = "cpu", **places: Any) -> TrainedRun:
    """Read a finished run back.

    Args:
        folder: of a finished run.
        device: where the network goes.
        places: where the data are now, if elsewhere than when it ran: `data_root`, `target_path`.

    Raises:
        UserError: what is missing, of other images, or not finite.
    """
    folder = Path(folder)
    result = finished_meta_test(folder)
    config = from_record(MetaTestConfig, result["config"] | places)
    checkpoint = folder / "checkpoints" / "latest.pt"
    if not checkpoint.exists():
        raise UserError(f"{checkpoint}: no such file: the trained network of this run was not kept")
    train, test = load_parts(config)
    state = load_tensors(checkpoint)
    if state["data"] != [train.fingerprint, test.fingerprint]:
        raise UserError(f"{folder}: was trained or evaluated on other images than {train.name} and {test.name} are now")
    model = models.create(config.model, train.num_classes, train.image_size)
    scale_free = any(name.endswith(".running_rms") for name in state["model"])
    phi = MetaPerturb(scale_free).requires_grad_(False) if config.method == "metaperturb" else None  # values: the state
    method = methods.create(config, phi)
    method.prepare(model, train)
    model.load_state_dict(state["model"])
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise UserError(f"{folder}: the trained network holds values that are not finite")
    method.set_strength(1.0)
    model.to(device).eval()
    return TrainedRun(folder, config, result, model, method.stochastic, train, test)
