"""One mechanism for all settings: a dataclass a program, filled from a YAML file and `--set key=value`.

Every key is checked by name, type and range before any work starts. Keys marked `identity=False` do not change what a
run computes (how often it reports), so a run may be resumed with other values of them; likewise those marked
`path=True` (where it runs). Keys marked `by_content=True` name files whose content a resumed run compares with what it
began with: they may have moved.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from metaperturb.cli import argument_parser, run_program
from metaperturb.data_sets import DATA_SETS, SOURCES
from metaperturb.errors import UserError
from metaperturb.regularizers import REGULARIZERS

Config = TypeVar("Config")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def option(default: Any, doc: str, low=None, high=None, below=None, identity=True, path=False, by_content=False) -> Any:
    """A dataclass field with its one-line description and, for numbers, bounds: `low` and `high` are allowed values.

    `identity` and `by_content`: see above. `path`: where something is, of one or several files or folders, separated by
    commas. Of these, as of files `by_content`, a leading `~` is the home folder: shells leave that of `run_dir=~/runs`.
    """
    factory = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    about = {"identity": identity and not path, "by_content": by_content, "path": path or by_content}
    return dataclasses.field(**factory, metadata={"doc": doc, "bounds": (low, high, below), **about})


@dataclass(frozen=True)
class CommonConfig:
    """Settings of both training programs."""

    run_dir: str = option("", "folder of the run: settings, metrics, checkpoints, result", path=True)
    data_root: str = option("data", "downloads and cached image arrays", path=True)
    download: bool = option(True, "fetch a data set that is not there", identity=False)
    skip_unreadable: bool = option(False, "leave out files that are no images instead of stopping")
    model: str = option("resnet20", "network: of the zoo, of torchvision, or timm/<name>")
    batch_size: int = option(128, "images a step", low=2)
    lr: float = option(1e-3, "learning rate of Adam", low=0.0)
    weight_decay: float = option(5e-4, "L2 term inside Adam's gradient, as in the authors' code", low=0.0)
    clip: float | None = option(100.0, "upper bound of perturbed values in training (k of section 3.2)", low=1e-6)
    seed: int = option(0, "of initial weights, data order, augmentation and noise", low=0)
    precision: Literal["float32", "bfloat16"] = option(
        "float32", "of convolutions (float32 is TF32 on a GPU) and maps; bfloat16: autocast, faster on some, coarser"
    )
    kernel: Literal["auto", "fused", "plain"] = option(
        "auto", "of φ: auto: fused where it can be; fused: or an error; plain: in PyTorch operators", identity=False
    )
    noise: bool = option(True, "the stochastic noise z; false: 1 instead (ablation of table 3 (a))")
    gate: bool = option(True, "the scale s of each channel; false: 1 instead (ablation of table 3 (a))")
    sites: Literal["all", "before_pooling", "top", "bottom"] = option(
        "all", "where φ acts (table 3 (b)): top, bottom: last or first stage's; before_pooling: each stage's last"
    )
    log_every: int = option(10, "steps between two lines of metrics", low=1, identity=False)


@dataclass(frozen=True)
class MetaTrainConfig(CommonConfig):
    """Meta-training (section 3.3, Algorithm 1). Defaults: the paper's settings."""

    run_dir: str = option("runs/src", "folder of the run", path=True)
    source: Literal[*SOURCES] = option("tiny_imagenet", "source data set")
    source_paths: list[str] = option([], "zips or folders of the source; default: under data_root", path=True)
    model: str = option("resnet20", "as for meta_test; of n of them, separated by commas, task t gets number t mod n")
    image_size: int | list[int] = option(32, "S of S×S pixels; of m sizes task t gets number ⌊t/n⌋ mod m", low=8)
    classes: int | None = option(None, "classes of the source to use, a fixed choice; null: all", low=1)
    tasks: int = option(10, "T, the number of tasks", low=1)
    split: Literal["disjoint", "paired", "homogeneous"] = option("disjoint", "how the classes are split into tasks")
    split_file: str = option("", "read the split from this file instead of drawing it", by_content=True)
    steps: int = option(750, "meta-training steps; 0: φ as it is drawn, the control", low=0)
    scale_free: bool = option(False, "beyond the paper: the noise sees h divided by its root mean square")
    phi_lr: float | None = option(None, "learning rate of φ; null: lr, as in the paper", low=0.0)
    anneal: float = option(0.0, "strength rises linearly over this share of the steps; 0: full at once", low=0, high=1)
    lookahead: float | None = option(None, "inner step size of the one-step lookahead; null: joint training", low=1e-9)
    threads: int = option(1, "CPU threads a process; other numbers may change the last bits", low=1, high=1024)
    gpus: str = option("auto", "a process each: '0,1', 'cpu', 'cpu,cpu'; auto: all GPUs, else the CPU", identity=False)
    timeout: int = option(600, "seconds to wait for other processes and their reading of data", low=1, identity=False)
    checkpoint_every: int = option(50, "steps between two checkpoints", low=1, identity=False)
    keep_phi: list[int] = option([], "also keep φ after these steps, as phi-000050.pt", low=1, identity=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", ",".join(name.strip() for name in self.model.split(",")))

    @property
    def image_sizes(self) -> list[int]:
        return self.image_size if isinstance(self.image_size, list) else [self.image_size]

    @property
    def networks(self) -> list[tuple[str, int]]:
        """Name and image size of each task's network: every network with every size, as often as the tasks allow.

        >>> MetaTrainConfig(model="resnet20,vgg9", image_size=[32, 48], tasks=4).networks
        [('resnet20', 32), ('vgg9', 32), ('resnet20', 48), ('vgg9', 48)]
        """
        pairs = [(name, size) for size in self.image_sizes for name in self.model.split(",")]
        return [pairs[task % len(pairs)] for task in range(self.tasks)]


@dataclass(frozen=True)
class MetaTestConfig(CommonConfig):
    """Meta-testing (Algorithm 2): train a network on a target data set. Defaults: the paper's settings."""

    run_dir: str = option("runs/tgt", "folder of the run", path=True)
    target: Literal[*DATA_SETS] = option("s_cifar100", "target data set")
    target_path: str | None = option(None, "folder or archive of the target, if not under data_root", path=True)
    image_size: int | None = option(None, "S in pixels; null: the data set's own", low=8)
    train_per_class: int | None = option(None, "train on so many images of each class, a fixed choice", low=1)
    clip_eval: bool = option(False, "clip in evaluation, too, which the paper does not")
    paper: bool = option(True, "φ as the paper has it; false: noise of mean one, bounded in total, as in any CNN")
    method: Literal[*REGULARIZERS] = option("metaperturb", "the regularizer; base is none")
    recipe: list[Literal[*(name for name, of in REGULARIZERS.items() if of.in_recipe)]] = option(
        [], "further regularizers of images and labels, together with the method, in any order"
    )
    phi: str | None = option(None, "file or shipped name of φ (method metaperturb)", by_content=True)
    init: str | None = option(None, "run folder or file of the network to begin from", by_content=True)
    init_batch_norm: Literal["drop", "keep"] = option("drop", "its batch norm; drop: fresh, as in the authors' code")
    # The methods' hyperparameters; metaperturb.methods says where each default comes from.
    info_dropout_beta: float = option(3.0, "β, the weight of the KL term", low=0.0)
    info_dropout_max_alpha: float = option(0.7, "upper bound of α(h), the spread of the log-normal noise", low=0.0)
    dropblock_prob: float = option(0.1, "share of units dropped at the end of training", low=0.0, below=1.0)
    dropblock_size: int = option(7, "side of a block in units, odd; smaller maps take the largest that fits", low=1)
    manifold_mixup_alpha: float = option(2.0, "λ ~ Beta(α, α); 0: off", low=0.0)
    dropout_prob: float = option(0.25, "share of units dropped", low=0.0, below=1.0)
    mixup_alpha: float = option(1.0, "λ ~ Beta(α, α); 0: off", low=0.0)
    cutmix_alpha: float = option(1.0, "λ ~ Beta(α, α); 0: off", low=0.0)
    adversarial_eps: float = option(8 / 255, "ε, radius of the L∞ ball in pixels of [0, 1]; 0: off", low=0.0, high=1.0)
    adversarial_steps: int = option(7, "steps of the attack on each training batch", low=1)
    adversarial_step_size: float = option(2 / 255, "size of these steps in pixels of [0, 1]", low=1e-6, high=1.0)
    label_smoothing: float = option(0.1, "share of the label spread evenly over all classes", low=0.0, below=1.0)
    steps: int = option(10_000, "training steps", low=1)
    lr_milestones: list[float] = option([0.4, 0.7, 0.9], "shares of the steps after which lr falls", low=0, high=1)
    lr_factor: float = option(0.3, "what lr is multiplied with", low=0.0, high=1.0)
    anneal: float = option(0.4, "φ's strength rises linearly from 0 to 1 over this share of the steps", low=0, high=1)
    eval_split: Literal["test", "val", "holdout"] = option("test", "to tune: val, or holdout, of training images")
    holdout: float = option(0.2, "share of each class's images that is held out", low=0.001, below=1.0)
    eval_every: int = option(200, "steps between two evaluations", low=1, identity=False)
    eval: Literal["draws", "one_pass"] = option("draws", "of MetaPerturb during training", identity=False)
    eval_samples: int = option(5, "Monte-Carlo samples of an evaluation during training", low=1, identity=False)
    final_samples: int = option(100, "Monte-Carlo samples of the final evaluation", low=1)
    eval_batch_size: int = option(500, "images a batch in evaluation", low=1)
    threads: int = option(0, "CPU threads, 0: one a core; other numbers may change the last bits", low=0, high=1024)
    gpu: str = option("auto", "GPU number or 'cpu'; auto: GPU 0, else the CPU", identity=False)
    checkpoint_every: int = option(500, "steps between two checkpoints", low=1, identity=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", sorted(self.recipe))  # their order changes nothing: one run, one identity

    @property
    def target_paths(self) -> list[str]:
        """What `target_path` names: of Tiny ImageNet, which is published in parts, several, separated by commas."""
        paths = (self.target_path or "").split(",") if self.target == "tiny_imagenet" else [self.target_path or ""]
        return [path.strip() for path in paths if path.strip()]


# --- filling and checking


def load_config(
    cls: type[Config],
    path: str | None,
    assignments: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
    origin: str = "",
) -> Config:
    """Defaults, then the YAML file, then `values` as a YAML file would hold them (from `origin`), then `--set` texts.

    Raises:
        UserError: unknown key, wrong type, value out of range, or unreadable file; the message names the key.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = [] if path is None else [(path, *item) for item in read_yaml(Path(path)).items()]
    given += [(origin, *item) for item in (values or {}).items()]
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(f"--set {assignment}: expected key=value")
        given.append((f"--set {assignment}", key.strip(), text.strip()))
    settings: dict[str, Any] = {}
    for source, key, value in given:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"{source}: unknown setting {key!r} ({hint})")
        try:
            settings[key] = _convert(value, fields[key].type)
            _check_bounds(settings[key], *fields[key].metadata["bounds"])
        except ValueError as error:
            raise UserError(f"{source}: {key}: {error}") from None
        if fields[key].metadata["path"]:
            settings[key] = _at_home(settings[key])
    return cls(**settings)


def parse_arguments(cls: type, doc: str, argv: list[str] | None, prog: str | None = None) -> argparse.Namespace:
    """The command line shared by the programs: `--config FILE --set key=value … --traceback`."""
    parser = argument_parser(doc, prog)
    parser.epilog = "settings (--set key=value):"
    for field, default in zip(dataclasses.fields(cls), vars(cls()).values(), strict=True):
        choices = f"; {_describe(field.type)}" if get_origin(field.type) is Literal else ""
        default = "null" if default is None else default
        parser.epilog += f"\n  {field.name:<24}{field.metadata['doc']}{choices} [{default}]"
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="override settings")
    return parser.parse_args(argv)


def run_configured(program: Callable[[Config], Any], cls: type[Config], doc: str, argv: list[str] | None) -> int:
    """Run `program` with the settings of a command line; returns the exit code."""
    arguments = parse_arguments(cls, doc, argv)
    return run_program(
        lambda: program(load_config(cls, arguments.config, arguments.set)), show_traceback=arguments.traceback
    )


def from_record(cls: type[Config], recorded: Mapping[str, Any]) -> Config:
    """The configuration that a run kept; without settings that no longer exist."""
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in recorded.items() if key in known})


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a `UserError`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the settings ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(content, Mapping | None):
        raise UserError(f"{path}: expected 'key: value' lines")
    return {str(key): value for key, value in (content or {}).items()}


def _convert(value: Any, kind: Any) -> Any:
    """What a file or a command line has for a setting, as its type; of several types the first that takes it."""
    if isinstance(kind, UnionType):
        for member in sorted(get_args(kind), key=lambda member: member is not NoneType):
            with contextlib.suppress(ValueError):
                if (converted := _convert(value, member)) != []:  # which `A | list[A]` is not
                    return converted
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif get_origin(kind) is list:
        if isinstance(value, str):
            text = value.strip("[], ")
            value = [item.strip() for item in text.split(",")] if text else []
        if isinstance(value, list):
            return [_convert(item, get_args(kind)[0]) for item in value]
    elif isinstance(value, str) and kind is not str:
        with contextlib.suppress(LookupError, ValueError, ZeroDivisionError):
            return _from_text(value, kind)
    elif type(value) is kind:
        return value
    elif type(value) is int and kind in (float, str):  # as in `lr: 1` and `gpu: 0`
        return kind(value)
    raise ValueError(f"expected {_describe(kind)}, got {'nothing' if value is None else repr(value)}")


def _from_text(text: str, kind: type) -> Any:
    """Also where YAML 1.1 reads as text what is none, as in `1e-3`, without a point."""
    if kind is float:
        return functools.reduce(operator.truediv, map(float, text.split("/")))  # 8/255
    words = {bool: {"true": True, "false": False}, NoneType: {"null": None, "none": None}}
    return words[kind][text.lower()] if kind in words else kind(text)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if isinstance(kind, UnionType):
        return " or ".join(map(_describe, get_args(kind)))
    return KINDS.get(kind, "a list")


def _check_bounds(value: Any, low: float | None, high: float | None, below: float | None) -> None:
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, int | float):
            continue
        if not math.isfinite(number):
            raise ValueError(f"must be finite, got {number}")
        too_high = (high is not None and number > high) or (below is not None and number >= below)
        if (low is not None and number < low) or too_high:
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            bounds += "" if below is None else f" and below {below:g}"
            raise ValueError(f"must be {bounds}, got {number}")


def _at_home(path: str | list[str] | None) -> str | list[str] | None:
    """The same path or paths with the home folder for a leading `~`."""
    if isinstance(path, list):
        return [_at_home(part) for part in path]
    return path and ",".join(map(os.path.expanduser, path.split(",")))
