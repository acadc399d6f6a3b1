"""The regularizers by name: the one list that settings, `methods.create`, pictures and messages are made from.

It imports nothing, so that settings are checked before PyTorch is there.
"""

from typing import NamedTuple


class Regularizer(NamedTuple):
    """What a name of the setting `method` stands for."""

    title: str  # its name in tables and pictures
    made_by: str  # module and class in `metaperturb.methods`
    settings: tuple[str, ...] = ()  # of `MetaTestConfig` that only this one uses, as the class takes them
    in_recipe: bool = False  # whether the setting `recipe` may add it to another one


REGULARIZERS = {
    "base": Regularizer("Base", "base.Method"),
    "metaperturb": Regularizer(
        "MetaPerturb", "base.Perturbation", ("phi", "clip", "anneal", "clip_eval", "paper", "eval")
    ),
    "info_dropout": Regularizer(
        "Info. Dropout", "noise.InformationDropout", ("info_dropout_beta", "info_dropout_max_alpha")
    ),
    "dropblock": Regularizer("DropBlock", "noise.DropBlock", ("dropblock_prob", "dropblock_size")),
    "manifold_mixup": Regularizer("Manifold Mixup", "mixing.ManifoldMixup", ("manifold_mixup_alpha",)),
    "dropout": Regularizer("Dropout", "noise.Dropout", ("dropout_prob",)),
    "mixup": Regularizer("mixup", "mixing.Mixup", ("mixup_alpha",), in_recipe=True),
    "cutmix": Regularizer("CutMix", "mixing.CutMix", ("cutmix_alpha",), in_recipe=True),
    "label_smoothing": Regularizer("Label smoothing", "mixing.LabelSmoothing", ("label_smoothing",), in_recipe=True),
    "trivial_augment": Regularizer("TrivialAugment", "images.TrivialAugment", in_recipe=True),
    "adversarial": Regularizer(
        "Adversarial training",
        "images.AdversarialTraining",
        ("adversarial_eps", "adversarial_steps", "adversarial_step_size"),
    ),
}
