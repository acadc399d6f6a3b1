"""The regularizers that meta-testing compares, behind one interface (`Method`), by their names in `regularizers.py`.

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

import importlib

from metaperturb.config import MetaTestConfig
from metaperturb.errors import UserError
from metaperturb.methods.base import Method, Perturbation, Recipe
from metaperturb.perturbation import MetaPerturb
from metaperturb.regularizers import REGULARIZERS


def create(config: MetaTestConfig, phi: MetaPerturb | None = None) -> Method:
    """The method that `config.method` names, with its hyperparameters, and with it those of `config.recipe`.

    Args:
        config: settings of a run.
        phi: for `metaperturb` only.

    Raises:
        UserError: a hyperparameter that the method cannot work with, or methods that do not go together.
    """
    names = [config.method, *config.recipe]
    if twice := [name for name in config.recipe if names.count(name) > 1]:
        why = "is the method already" if twice[0] == config.method else "stands in it more than once"
        raise UserError(f"recipe: {twice[0]} {why}")
    methods = {name: _make(name, config, phi) for name in names}
    return Recipe(methods) if config.recipe else methods[config.method]


def _make(name: str, config: MetaTestConfig, phi: MetaPerturb | None) -> Method:
    if name == "metaperturb":
        return Perturbation(phi, config)
    module, _, kind = REGULARIZERS[name].made_by.partition(".")
    hyperparameters = [getattr(config, setting) for setting in REGULARIZERS[name].settings]
    more = {"precision": config.precision} if name == "adversarial" else {}
    # Imported here: some need torchvision, which takes a second.
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(*hyperparameters, **more)


def unused_settings(config: MetaTestConfig) -> list[str]:
    """Settings off their defaults that a run does not use: what somebody may have meant to have an effect.

    >>> unused_settings(MetaTestConfig(method="base", dropblock_prob=0.2, recipe=["mixup"], mixup_alpha=0.5))
    ['dropblock_prob']
    """
    others = REGULARIZERS.keys() - {config.method, *config.recipe}
    theirs = {setting for name in others for setting in REGULARIZERS[name].settings}
    theirs |= {*["init_batch_norm"] * (config.init is None), *["holdout"] * (config.eval_split != "holdout")}
    usual = vars(MetaTestConfig())
    return [name for name, value in vars(config).items() if name in theirs and value != usual[name]]
