"""Several regularizers at once: a method on top of what images and labels are usually given today."""

from collections.abc import Mapping

from torch import Tensor, nn

from metaperturb.data.arrays import ImageArrays
from metaperturb.errors import UserError
from metaperturb.methods.adversarial import AdversarialTraining
from metaperturb.methods.base import Method
from metaperturb.methods.mixing import Mixing


class Recipe(Method):
    """A method, and further ones that change images, labels or the loss alone.

    8-bit images are augmented first, wherever TrivialAugment stands; batches then pass through the further ones, then
    through the method.

    Args:
        method: by its name; it may act on feature maps.
        further: name → method; none acts on feature maps.

    Raises:
        UserError: two of them are the same, mix images, or have a loss of their own.
    """

    def __init__(self, method: Mapping[str, Method], further: Mapping[str, Method]) -> None:
        if twice := method.keys() & further.keys():
            raise UserError(f"recipe: {twice.pop()} is the method already")
        parts = {**further, **method}
        for what, found in (
            ("mixes images", [name for name, part in parts.items() if isinstance(part, Mixing)]),
            ("has its own loss", [name for name, part in parts.items() if type(part).loss is not Method.loss]),
        ):
            if len(found) > 1:
                raise UserError(f"recipe: {' and '.join(found)} do not go together: each {what}")
        (self.method,) = method.values()
        self.parts = list(parts.values())
        self.augment = next((part.augment for part in self.parts if part.augment), None)
        self.ramp, self.stochastic = self.method.ramp, self.method.stochastic
        own = [part for part in self.parts if type(part).loss is not Method.loss]
        self._with_loss = own[0] if own else self.method
        if isinstance(self.method, AdversarialTraining):
            self.method.attacked_loss = self.loss

    @property
    def sites(self):
        return self.method.sites

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        for part in self.parts:
            part.prepare(model, train)

    def set_strength(self, strength: float) -> None:
        self.method.set_strength(strength)

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for part in self.parts:
            x, y = part.batch(x, y)
        return x, y

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._with_loss.loss(logits, labels)
