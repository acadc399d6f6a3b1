"""Whether two runs are the same, decided in one place: by their settings, and by the content of what these name.

Settings with `identity=False` (where a run is, how often it reports) never matter. Images, φ and initial weights count
by what they hold, not by the names of their files.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from metaperturb import finetuning, methods, models
from metaperturb.config import MetaTestConfig, MetaTrainConfig, read_yaml
from metaperturb.data import DATA_SETS
from metaperturb.data.registry import load_parts, load_source_images
from metaperturb.distributed import parse_devices
from metaperturb.dry_run import watch
from metaperturb.errors import UserError
from metaperturb.perturbation import MetaPerturb
from metaperturb.sites import find_sites
from metaperturb.training import ABLATION, check_ablation
from metaperturb.weights import load_phi, phi_digest

# Settings in which repetitions of a training differ, and that keep none from being at the paper's setting.
INCIDENTAL = frozenset({"seed", "threads", "eval_batch_size"})


# --- settings


def settings(cls: type, recorded: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """The settings that make a run of a program what it is, of those that were recorded.

    One that is missing came with a later version and was at its default.
    """
    known = {**vars(cls()), **recorded}
    return {
        field.name: known[field.name]
        for field in dataclasses.fields(cls)
        if field.metadata["identity"] and field.name not in without
    }


def differences(
    old: Mapping[str, Any], new: Any, *, without: Collection[str] = (), by_content: bool = False
) -> list[str]:
    """The settings in which recorded ones and a configuration differ, `"steps: 10000 → 1500"`.

    `by_content`: files may have other names now; the caller compares what they hold.
    """
    before, after = (settings(type(new), some, without) for some in (old, vars(new)))
    files = [field.name for field in dataclasses.fields(new) if by_content and field.metadata["by_content"]]
    after = {name: value for name, value in after.items() if not (name in files and value and before[name])}
    return [f"{name}: {before[name]} → {value}" for name, value in after.items() if before[name] != value]


def fingerprint(program: str, config: Any) -> str:
    """Identifies what repetitions of a run have in common: 8 hex digits.

    Settings at their defaults do not enter, so that one that a later version adds leaves the results of earlier ones.
    """
    chosen = settings(type(config), vars(config), INCIDENTAL)
    defaults = settings(type(config), {})
    return digest([program, {name: value for name, value in chosen.items() if value != defaults[name]}])


def digest(content: Any) -> str:
    """8 hex digits of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def data_name(recorded: MetaTestConfig | Mapping[str, Any]) -> str:
    """The target as pictures and tables call it; of an image folder or archive the name of that: `Birds.v1i.folder`."""
    known = recorded if isinstance(recorded, Mapping) else vars(recorded)
    target, path = known["target"], known.get("target_path")
    if target != "folder" or not path:
        return target
    names = (Path(part.strip()).resolve().name for part in path.split(","))
    return ",".join(re.sub(r"\.(zip|tar|tar\.gz|tgz)$", "", name) for name in names)


# --- a run and what is there already


def check_folder(config: Any, program: str) -> None:
    """Refuse a folder that holds a run with other settings, or one without a record of them."""
    if not config.run_dir:
        raise UserError("run_dir: must name a folder")
    folder, elsewhere = Path(config.run_dir), "choose another run_dir or remove the folder"
    if not (any(folder.glob("checkpoints/latest.*")) or (folder / "result.json").exists()):
        return  # a run that failed at its start may be put right and started again
    try:
        old = read_yaml(folder / "config.yaml")
    except UserError as error:
        raise UserError(f"{error}; {elsewhere}") from error
    other_program = [f"program: {old.get('program')} → {program}"] if old.get("program") != program else []
    if changed := other_program or differences(old, config, by_content=True):
        raise UserError(f"{config.run_dir}: holds a run with other settings ({'; '.join(changed)}); {elsewhere}")


def check_finished(config: MetaTestConfig, result: Mapping[str, Any]) -> None:
    """A finished run answers only for the images, φ and initial weights that it saw, under whatever names."""
    try:
        data = fingerprints(dataclasses.replace(config, download=False))
        phi = phi_digest(load_phi(config.phi)) if config.method == "metaperturb" else None
        init = initial_weights(config)
    except UserError as error:
        raise unanswered(config.run_dir, "result.json", error) from error
    saw = {"data": result["target"]["fingerprints"], "phi": result["phi_digest"], "init": result["init"]}
    _refuse_others(config, saw, data, phi, init)


def unanswered(run_dir: str, file: str, error: UserError) -> UserError:
    """The refusal of a finished run: what it is asked for cannot be read; its old result is in `file`."""
    return UserError(
        f"{run_dir}: a finished run cannot answer for what is not there: {error} ({file} in it has the old result)"
    )


def check_resumed(config: MetaTestConfig, state: Mapping[str, Any], data: list[str], phi: str | None) -> None:
    """Refuse to go on with other images, φ or initial weights than the checkpoint has; the last may be gone."""
    try:
        init = initial_weights(config)
    except UserError as error:
        print(f"{config.run_dir}: not compared with what it began with: {error}", file=sys.stderr)
        init = state["init"]
    _refuse_others(config, state, data, phi, init)


def _refuse_others(
    config: MetaTestConfig, saw: Mapping[str, Any], data: list[str], phi: str | None, init: Mapping[str, Any] | None
) -> None:
    for what, before, now in (
        ("the target", saw["data"], data),
        (f"φ in {config.phi}", saw["phi"], phi),
        (f"the network in {config.init}", (saw["init"] or {}).get("sha256"), (init or {}).get("sha256")),
    ):
        if before != now:
            raise UserError(f"{config.run_dir}: {what} changed since this run began; choose another run_dir")


def fingerprints(config: MetaTestConfig | MetaTrainConfig) -> list[str]:
    """Of the images of a run, which are loaded."""
    parts = load_parts(config) if isinstance(config, MetaTestConfig) else [load_source_images(config)]
    return [part.fingerprint for part in parts]


def initial_weights(config: MetaTestConfig) -> dict[str, Any] | None:
    """What `init` gives the network, as `finetuning.initialize` says it; None without."""
    if config.init is None:
        return None
    network = small_network(config)
    return finetuning.initialize(network, image_size(config), config.init, config.init_batch_norm, verbose=False)


# --- settings that do not go together


def check_settings(config: MetaTestConfig) -> torch.device:
    """Refuse, before data are prepared, settings that do not go together, files, devices and networks that fail.

    Returns the device.
    """
    if config.eval_split not in (*DATA_SETS[config.target].images, "holdout"):
        raise UserError(
            f"eval_split: {config.target} has no {config.eval_split} images (eval_split=holdout needs none)"
        )
    perturbed = config.method == "metaperturb"
    if perturbed and config.phi is None:
        raise UserError("phi: method metaperturb needs a file or shipped name of φ (run.sh src makes one)")
    check_ablation(config)
    if config.clip_eval and config.clip is None:
        raise UserError("clip_eval: needs a clip")
    ablated = [key for key in ABLATION if getattr(config, key) != getattr(MetaTestConfig, key)]
    if ablated and not perturbed:
        raise UserError(f"{ablated[0]}: only method metaperturb uses it, this is {config.method}")
    devices = parse_devices(config.gpu, "gpu")
    if len(devices) != 1:
        raise UserError(f"gpu: expected one device, got {config.gpu!r}")
    phi = load_phi(config.phi) if perturbed else None
    if phi is not None:
        tell_phi(config.phi, phi, noise=config.noise, gate=config.gate)
    methods.create(config, phi)
    if unused := methods.unused_settings(config):
        print(f"this run of {config.method} does not use {', '.join(unused)}", file=sys.stderr)
    check_network(config)
    if not (Path(config.run_dir) / "checkpoints" / "latest.pt").exists():
        initial_weights(config)
    return devices[0]


def check_network(config: MetaTestConfig) -> None:
    """Refuse a network that does not run on images of this size, or has no site."""
    look = find_sites if config.method == "metaperturb" else watch
    look(small_network(config), image_size(config))


def small_network(config: MetaTestConfig) -> torch.nn.Module:
    """The network, with two classes: how many the data have is not known without them."""
    return models.create(config.model, 2, image_size(config))


def image_size(config: MetaTestConfig) -> int:
    """In pixels; the data set's own where none is given."""
    return config.image_size or DATA_SETS[config.target].image_size


def tell_phi(source: str, phi: MetaPerturb, **parts: bool) -> None:
    """Say how φ was made, and warn where that is far from the paper's meta-training, or other `parts` are used here."""
    made, images = phi.card.get("config") or {}, phi.card.get("source") or {}
    how = f"meta-trained in {made['steps']} steps of {made.get('tasks')} tasks" if "steps" in made else ""
    saw = f", {images['images']:,} images of {images['name']}" if {"images", "name"} <= images.keys() else ""
    print(f"φ {source}: {how + saw if how else 'its file does not say how it was meta-trained'}", file=sys.stderr)
    for name in ("steps", "tasks"):
        usual = getattr(MetaTrainConfig, name)
        if made.get(name, usual) < usual / 2:
            print(f"warning: {made[name]} {name} are far from the paper's {usual}; φ may do little", file=sys.stderr)
    for part, here in parts.items():
        if made and made.get(part, True) != here:
            there, now = str(not here).lower(), str(here).lower()
            print(f"φ was meta-trained with {part}={there}, this run has {part}={now}", file=sys.stderr)
