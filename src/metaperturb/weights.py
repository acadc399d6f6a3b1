"""Reading and writing φ: our files, the authors' released state dict, and the φ shipped with the package.

Our format is a dict of plain values, loadable with `weights_only=True`:
`{"format": "metaperturb-phi", "version": 1, "state": {name: tensor}, "card": {…}}`. The card says how φ came about.
Version 2 adds `"scale_free": true`, and is written for such φ alone: what reads version 1 must not take it for another.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from metaperturb.errors import UserError
from metaperturb.kernels.plain import PHI_SHAPES
from metaperturb.perturbation import MetaPerturb
from metaperturb.storage import load_tensors, reason, save_tensors

FORMAT, VERSION = "metaperturb-phi", 2
SHIPPED = Path(__file__).parent / "shipped"

# The authors' names, in our order. Theirs have singleton dimensions that ours lack; the values are the same.
AUTHORS = ("phi_1.w_identity", "phi_1.w_all", "phi_2.w_identity", "phi_2.w_all", "kernel", "fc.weight")


def save_phi(phi: MetaPerturb, path: str | os.PathLike, card: Mapping[str, Any] | None = None) -> None:
    """Write φ atomically; `card` holds plain values that say how it was trained.

    Raises:
        UserError: not a φ that `load_phi` would read, a card that JSON cannot hold, or the file cannot be written.
    """
    if not isinstance(phi, MetaPerturb):
        raise UserError(f"phi: expected a MetaPerturb (of a network: model.metaperturb.phi), got {type(phi).__name__}")
    if not (_is_plain(phi.flat) and phi.flat.isfinite().all()):
        raise UserError(f"{path}: not written, since φ holds values that are not finite, or none (meta device)")
    state = {name: p.detach().cpu().clone() for name, p in phi.tensors()._asdict().items()}
    try:
        plain_card = json.loads(json.dumps(dict(card or {})))  # whatever JSON can hold, weights_only=True can load
    except (TypeError, ValueError) as error:
        raise UserError(f"card: expected names and plain values ({reason(error)})") from error
    content = {"format": FORMAT, "version": 1, "state": state, "card": plain_card}
    if phi.scale_free:
        content |= {"version": VERSION, "scale_free": True}
    save_tensors(content, Path(path).expanduser())


def phi_digest(phi: MetaPerturb) -> str:
    """Identifies φ by its 82 numbers and what they mean, as a file changes with what its card says: 64 hex digits."""
    values = phi.flat.detach().cpu().numpy().astype("<f4")
    return hashlib.sha256(values.tobytes() + b"scale-free" * phi.scale_free).hexdigest()


@torch.inference_mode(False)  # a φ made in it could not be trained with
def load_phi(source: str | os.PathLike) -> MetaPerturb:
    """Read φ from a file of ours or of the authors, or by the name of a φ shipped with the package.

    The result has `requires_grad=False` (Algorithm 2 keeps φ fixed) and its card, if any, as `phi.card`.
    Nothing in the file is executed.

    Raises:
        UserError: no such file or shipped name; not a PyTorch file; of a later version; parameters missing, of other
            shape or not finite.
    """
    path = find_phi(source)
    content = load_tensors(path)
    card, scale_free = {}, False
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        if content.get("version") not in (1, VERSION):
            raise UserError(f"{path}: of version {content.get('version')!r}; this code reads versions up to {VERSION}")
        content, card, scale_free = content.get("state"), content.get("card", {}), content.get("scale_free") is True
        if not isinstance(card, Mapping):
            raise UserError(f"{path}: its card is a {type(card).__name__}, expected names and values")
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds no φ (expected a file of save_phi or the authors' state dict)")

    ours = dict(zip(AUTHORS, PHI_SHAPES._fields, strict=True))
    state = {ours.get(name, name): value for name, value in content.items()}
    scale_free |= state.pop("scale_free_mark", None) is not None  # of a bare state dict
    with torch.random.fork_rng(devices=[]):  # what comes next draws the same with φ as without
        phi = MetaPerturb(scale_free)
    expected = {"flat": tuple(phi.flat.shape)} if "flat" in state else PHI_SHAPES._asdict()  # the former: a state dict
    wrong = [f"lacks {name}" for name in sorted(expected.keys() - state.keys())]
    wrong += [f"has unknown {name!r:.40}" for name in sorted(state.keys() - expected.keys(), key=str)]
    if wrong:
        raise UserError(f"{path}: not a φ of 82 parameters: {', '.join(wrong[:4])}")
    for name, shape in expected.items():
        value = state[name]
        if not _is_plain(value) or tuple(s for s in value.shape if s != 1) != shape:
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(f"{path}: {name} should be an array of numbers of shape {list(shape)}, found {found}")
        state[name] = value.flatten().float()
        if not torch.isfinite(state[name]).all():
            raise UserError(f"{path}: {name} holds values that are not finite in float32")
    phi.flat.requires_grad_(False).copy_(torch.cat([state[name] for name in expected]))
    phi.card = card
    return phi


def _is_plain(value: Any) -> bool:
    """A dense floating-point tensor that has values: a file may hold sparse, complex or value-less ones."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and value.is_floating_point() and not value.is_meta


def find_phi(source: str | os.PathLike) -> Path:
    """The file behind a path or a shipped name."""
    path, shipped = Path(source).expanduser(), SHIPPED / f"{source}.pt"
    if path.is_file():
        return path
    if shipped in SHIPPED.glob("*.pt"):
        return shipped
    if path.is_dir():
        raise UserError(f"{path}: is a folder; φ is a file, for instance {path / 'phi.pt'}")
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.pt")))
    raise UserError(f"{source}: no such φ file (shipped names: {names})")
