"""Finetuning: initial weights from a network that was trained before (section 4.1, the lower half of tables 1 and 2).

Everything is taken but the classifier, which has the classes of another data set, and, as in the authors' code, batch
norm: its affine parameters and running statistics start fresh unless asked for.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaperturb.attach import PERTURBATION, REGULARIZER
from metaperturb.dry_run import classifier_name
from metaperturb.errors import UserError
from metaperturb.modes import batch_norms
from metaperturb.runs import finished_meta_test
from metaperturb.storage import load_tensors

RECORDED = ("target", "model", "image_size", "method", "steps", "batch_size", "lr", "weight_decay", "seed", "init")


def read_weights(source: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read the network of a finished run of meta-testing, or a file of tensors. Nothing in it is executed.

    `source` is a run folder, a checkpoint of such a run (also of one under way), or a file of a state dict.

    Returns:
        name → tensor; and of a run folder what its training was (`RECORDED` settings, data, metrics, commit), else
        None.
    """
    path, run = Path(source), None
    if path.is_dir():
        try:
            result = finished_meta_test(path)
        except UserError as error:
            raise UserError(f"init: {error}") from error
        run = {key: result["config"].get(key) for key in RECORDED}
        run |= {"data": result["target"], "metrics": result["metrics"], "commit": result["commit"]}
        path = path / "checkpoints" / "latest.pt"
    if not path.is_file():
        raise UserError(f"init: {path}: no such file or run folder (./run.sh pretrain makes one)")
    content = load_tensors(path)
    content = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        raise UserError(f"init: {path}: holds no network (expected a checkpoint of a run, or a state dict)")
    return dict(content), run


def initialize(
    model: nn.Module,
    image_size: int,
    source: str | os.PathLike,
    batch_norm: str = "drop",
    *,
    verbose: bool = True,
) -> dict[str, Any]:
    """Copy a pretrained network into `model`, in place: all of it but the classifier.

    Args:
        model: a network without perturbation that maps images `[B, C, S, S]` to logits; on any device.
        image_size: S in pixels; may differ from the pretraining's where the network allows it.
        source: see `read_weights`; of the same network, with any number of classes. What a method had added to it is
            left out.
        batch_norm: `"drop"`: `model` keeps its own, fresh ones; `"keep"`: they are copied, too.
        verbose: say on stderr, in one line, what was taken.

    Returns:
        what `result.json` says of it, the SHA-256 of what was taken for one.

    Raises:
        UserError: a file that is not there or another network's, whose values are not finite, or a network without a
            classifier that could be left out. `model` is as it was, then.
    """
    state, run = read_weights(source)
    classifier = classifier_name(model, image_size)
    own = model.state_dict()  # tensors that share the network's memory
    norms = {*batch_norms(model)} if batch_norm == "drop" else set()
    fresh = tuple(f"{name}." for name, module in model.named_modules() if name == classifier or module in norms)
    added = {PERTURBATION, REGULARIZER}
    given = {name: value for name, value in state.items() if name in own or added.isdisjoint(name.split("."))}
    # Batch norm did not always count its batches, and does not use the number: files may lack it.
    absent = {name for name in own if name.endswith("num_batches_tracked") and name not in given}
    taken = [name for name in own if not name.startswith(fresh) and name not in absent]
    wrong = [f"lacks {name}" for name in taken if name not in given]
    wrong += [f"has unknown {name:.60}" for name in given if name not in own]
    wrong += [text for name in taken if name in given and (text := _mismatch(name, own[name], given[name]))]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"init: {source}: not the weights of this network: {', '.join(wrong[:3])}{more}")
    if not_finite := [name for name in taken if not torch.isfinite(given[name]).all()]:
        raise UserError(f"init: {source}: {not_finite[0]} holds values that are not finite")
    digest = hashlib.sha256()
    with torch.no_grad():
        for name in taken:
            value = own[name].copy_(given[name])
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if verbose:
        norms = f"the classifier {classifier} starts fresh; batch norm "
        norms += "starts fresh" if batch_norm == "drop" else "taken, too"
        print(f"init: {len(taken)} tensors from {source}; {norms}", file=sys.stderr)
    return {
        **{"from": os.fspath(source), "sha256": digest.hexdigest(), "tensors": len(taken)},
        **{"classifier": classifier, "batch_norm": batch_norm, "run": run},
    }


def _mismatch(name: str, own: Tensor, given: Any) -> str:
    """How an entry of a file differs from what the network needs, or nothing."""
    dense = isinstance(given, Tensor) and given.layout == own.layout and not given.is_meta
    if dense and given.shape == own.shape and given.is_floating_point() == own.is_floating_point():
        return ""
    found = f"{given.dtype} {list(given.shape)}" if dense else f"no dense tensor ({type(given).__name__})"
    return f"{name} should be {list(own.shape)}, found {found}"
