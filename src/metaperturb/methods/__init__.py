"""The regularizers that meta-testing compares, behind one interface (`Method`), by the names of the setting `method`.

Base, MetaPerturb, Information Dropout, DropBlock and Manifold Mixup are those of the paper (section 4.1); dropout,
mixup, CutMix, label smoothing and TrivialAugment are further ones, which it does not report; adversarial training is
the reference of its figure 6. Every hyperparameter is a setting of its own. Its default is the value of the method's
original paper or code; each class says where it stands there. MetaPerturb's authors tuned their baselines on a holdout
set for each data set and report neither the values searched nor those chosen, so a fair comparison tunes anew, on
`eval_split=holdout` or `val`.

The setting `recipe` adds further ones to any of them (`Recipe`).

All randomness comes from PyTorch's global generators, which meta-testing seeds before each step; crops and flips are
drawn first. A method that is off (probability, α, ε or smoothing 0) draws nothing and trains what Base trains, to the
bit.

>>> from metaperturb.config import MetaTestConfig
>>> create(MetaTestConfig(method="dropblock", dropblock_prob=0.2)).prob
0.2
"""

import dataclasses
from collections.abc import Callable

from metaperturb.config import MetaTestConfig, default_of
from metaperturb.errors import UserError
from metaperturb.methods.adversarial import AdversarialTraining
from metaperturb.methods.augmentation import TrivialAugment
from metaperturb.methods.base import Method, SiteMethod
from metaperturb.methods.labels import LabelSmoothing
from metaperturb.methods.mixing import CutMix, ManifoldMixup, Mixup
from metaperturb.methods.noise import DropBlock, Dropout, InformationDropout
from metaperturb.methods.perturb import Perturbation
from metaperturb.methods.recipe import Recipe
from metaperturb.perturbation import MetaPerturb

METHODS: dict[str, Callable[[MetaTestConfig, MetaPerturb | None], Method]] = {
    "base": lambda config, phi: Method(),
    "metaperturb": lambda config, phi: Perturbation(
        phi, config.clip, config.anneal, config.sites, config.noise, config.gate, config.clip_eval
    ),
    "info_dropout": lambda config, phi: InformationDropout(config.info_dropout_beta, config.info_dropout_max_alpha),
    "dropblock": lambda config, phi: DropBlock(config.dropblock_prob, config.dropblock_size),
    "manifold_mixup": lambda config, phi: ManifoldMixup(config.manifold_mixup_alpha),
    "dropout": lambda config, phi: Dropout(config.dropout_prob),
    "mixup": lambda config, phi: Mixup(config.mixup_alpha),
    "cutmix": lambda config, phi: CutMix(config.cutmix_alpha),
    "label_smoothing": lambda config, phi: LabelSmoothing(config.label_smoothing),
    "trivial_augment": lambda config, phi: TrivialAugment(),
    "adversarial": lambda config, phi: AdversarialTraining(
        config.adversarial_eps, config.adversarial_steps, config.adversarial_step_size, config.precision
    ),
}

# Settings that some of the methods use, by the names of those.
USED_BY = {
    "phi": {"metaperturb"},
    "clip": {"metaperturb"},
    "clip_eval": {"metaperturb"},
    "anneal": {"metaperturb"},
    **{f"info_dropout_{name}": {"info_dropout"} for name in ("beta", "max_alpha")},
    **{f"dropblock_{name}": {"dropblock"} for name in ("prob", "size")},
    "manifold_mixup_alpha": {"manifold_mixup"},
    "dropout_prob": {"dropout"},
    "mixup_alpha": {"mixup"},
    "cutmix_alpha": {"cutmix"},
    **{f"adversarial_{name}": {"adversarial"} for name in ("eps", "steps", "step_size")},
    "label_smoothing": {"label_smoothing"},
}

__all__ = [
    "METHODS",
    "AdversarialTraining",
    "CutMix",
    "DropBlock",
    "Dropout",
    "InformationDropout",
    "LabelSmoothing",
    "ManifoldMixup",
    "Method",
    "Mixup",
    "Perturbation",
    "Recipe",
    "SiteMethod",
    "TrivialAugment",
    "create",
    "unused_settings",
]


def create(config: MetaTestConfig, phi: MetaPerturb | None = None) -> Method:
    """The method that `config.method` names, with its hyperparameters, and with it those of `config.recipe`.

    Args:
        config: settings of a run.
        phi: for `metaperturb` only.

    Raises:
        UserError: a hyperparameter that the method cannot work with, or methods that do not go together.
    """
    if twice := [name for name in config.recipe if config.recipe.count(name) > 1]:
        raise UserError(f"recipe: {twice[0]} stands in it more than once")
    method = METHODS[config.method](config, phi)
    further = {name: METHODS[name](config, None) for name in config.recipe}
    return Recipe({config.method: method}, further) if further else method


def unused_settings(config: MetaTestConfig) -> list[str]:
    """Settings of other methods that are off their defaults: what somebody may have meant to have an effect.

    >>> unused_settings(MetaTestConfig(method="base", dropblock_prob=0.2, recipe=["mixup"], mixup_alpha=0.5))
    ['dropblock_prob']
    """
    chosen = {config.method, *config.recipe}
    return [
        field.name
        for field in dataclasses.fields(config)
        if not chosen & USED_BY.get(field.name, chosen) and getattr(config, field.name) != default_of(field)
    ]
