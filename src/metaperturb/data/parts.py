"""The images of one run, as its settings name them."""

from pathlib import Path

from metaperturb.config import MetaTestConfig, MetaTrainConfig
from metaperturb.data.arrays import ImageArrays, subset
from metaperturb.data.sources import load_source
from metaperturb.data.splits import holdout_split
from metaperturb.data.targets import load_target


def load_parts(config: MetaTestConfig) -> tuple[ImageArrays, ImageArrays]:
    """What the network is trained on and what it is evaluated on; with `eval_split=holdout` no test image is read.

    Raises:
        UserError: as `load_target` and `holdout_split`.
    """
    hold_out = config.eval_split == "holdout"
    train, *rest = load_target(
        config.target,
        data_root=Path(config.data_root),
        path=config.target_path,
        image_size=config.image_size,
        download=config.download,
        skip_unreadable=config.skip_unreadable,
        splits=("train",) if hold_out else ("train", config.eval_split),
    )
    if not hold_out:
        return train, *rest
    kept, held_out = holdout_split(train.labels, config.holdout, train.classes)
    return subset(train, kept, "rest"), subset(train, held_out, "holdout")


def load_source_images(config: MetaTrainConfig) -> ImageArrays:
    """What φ is meta-trained on, before its split into tasks.

    Raises:
        UserError: as `load_source`.
    """
    return load_source(
        config.source,
        data_root=Path(config.data_root),
        paths=config.source_paths,
        image_size=config.image_size,
        download=config.download,
        skip_unreadable=config.skip_unreadable,
    )
