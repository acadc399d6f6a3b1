"""The images of one run, as its settings name them."""

import numpy as np

from metaperturb.config import MetaTestConfig, MetaTrainConfig
from metaperturb.data.arrays import ImageArrays, subset
from metaperturb.data.registry import load
from metaperturb.data.splits import few_classes, few_per_class, holdout_split
from metaperturb.data_sets import SOURCES
from metaperturb.errors import UserError


def load_parts(config: MetaTestConfig) -> tuple[ImageArrays, ImageArrays]:
    """What the network is trained on and what it is evaluated on; with `eval_split=holdout` no test image is read.

    Raises:
        UserError: as `load` and `holdout_split`, or a class has fewer images than `train_per_class`.
    """
    hold_out, count = config.eval_split == "holdout", config.train_per_class
    splits = ("train",) if hold_out else ("train", config.eval_split)
    train, *rest = _load(config, config.target, config.target_paths, config.image_size, splits)
    if hold_out:
        kept, held_out = holdout_split(train.labels, config.holdout, train.classes)
        train, rest = subset(train, kept, "rest"), [subset(train, held_out, "holdout")]
    if count is not None:  # of what is not held out: other images than without holdout
        found = np.bincount(train.labels)
        if found.min() < count:
            has = "has, without those held out," if hold_out else "has"
            short = f"class {train.classes[found.argmin()]} {has} {found.min()} training images"
            raise UserError(f"train_per_class {count}: {short}")
        train = subset(train, few_per_class(train.labels, count), f"{count}-a-class")
    return train, *rest


def load_source_images(config: MetaTrainConfig, image_size: int | None = None) -> ImageArrays:
    """What φ is meta-trained on, before its split into tasks; in the first of several sizes if none is asked for.

    Raises:
        UserError: as `load` and `few_classes`.
    """
    size = image_size or config.image_sizes[0]
    (source,) = _load(config, SOURCES[config.source], config.source_paths, size, ("train",))
    if config.classes is None:
        return source
    return subset(source, few_classes(source.labels, config.classes), f"{config.classes}-classes")


def _load(
    config: MetaTestConfig | MetaTrainConfig, name: str, paths: list[str], size: int | None, splits: tuple
) -> tuple[ImageArrays, ...]:
    how = {key: getattr(config, key) for key in ("data_root", "download", "skip_unreadable")}
    return load(name, paths=paths, image_size=size, splits=splits, **how)
