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
        methods: by name; the first may act on feature maps, no other.

    Raises:
        UserError: two of them mix images, or have a loss of their own.
    """

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self.method, *further = methods.values()
        self.parts = [*further, self.method]
        own_loss = [part for part in self.parts if type(part).loss is not Method.loss]
        mixing = [part for part in self.parts if isinstance(part, Mixing)]
        for what, found in (("mixes images", mixing), ("has its own loss", own_loss)):
            if len(found) > 1:
                names = " and ".join(name for part in found for name in methods if methods[name] is part)
                raise UserError(f"recipe: {names} do not go together: each {what}")
        self.augment = next((part.augment for part in self.parts if part.augment), None)
        self.ramp, self.stochastic = self.method.ramp, self.method.stochastic
        self._with_loss = own_loss[0] if own_loss else self.method
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
