"""Methods that change the training images: adversarial training (the reference of figure 6 a-c), TrivialAugment."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.transforms import v2

from metaperturb.data.arrays import ImageArrays
from metaperturb.methods.base import Method
from metaperturb.training import autocast

PIXEL = 2.0  # images are in [-1, 1] where ε and step size count pixels in [0, 1]


class AdversarialTraining(Method):
    """Adversarial training (Madry et al. 2018, section 2.1): each batch is replaced by its worst case within L∞ ε.

    The worst case is sought by projected gradient ascent on the loss from a random start: the
    batch plus uniform noise, then `steps` times `x ← clip(x + step_size · sign(∇x loss))`, the clip being to the ball
    of radius ε about the image and to the range of pixels. A step of training costs `steps` passes forward and back
    more than one of Base.

    Args:
        eps: ε in pixels of [0, 1]; 0 is off. Default 8/255, the original's for CIFAR-10 (section 5).
        steps: of the ascent. Default 7 (section 5).
        step_size: in pixels of [0, 1]. Default 2/255 (section 5).
        precision: of the network's passes, that of the training they belong to.

    Attributes:
        attacked_loss: what the worst case is sought for, a function of logits and labels: that of the training.

    The network is attacked as it trains, in training mode, so batch norm takes the statistics of the perturbed batch:
    the gradient is that of the very loss that the step then minimizes, and Madry et al.'s code for CIFAR-10 does so,
    too. (In evaluation mode, the running statistics lag behind the weights, most in the first steps.) These passes work
    on a copy of the buffers, so that running statistics move once, in the step itself; and only images get a gradient.
    """

    def __init__(self, eps: float, steps: int, step_size: float, precision: str = "float32") -> None:
        self.eps, self.steps, self.step_size, self.precision = PIXEL * eps, steps, PIXEL * step_size, precision
        self.attacked_loss: Callable[[Tensor, Tensor], Tensor] = self.loss

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        self.model = model

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x, y) if self.eps == 0.0 else (self.attack(x, y), y)

    def attack(self, x: Tensor, y: Tensor) -> Tensor:
        """Images `[B, 3, S, S]` near `x`, in [-1, 1], whose loss with labels `y` `[B]` is high."""
        low, high = (x - self.eps).clamp_(min=-1.0), (x + self.eps).clamp_(max=1.0)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        adversarial = torch.empty_like(x).uniform_(-self.eps, self.eps).add_(x).clamp_(low, high)
        for _ in range(self.steps):
            adversarial.requires_grad_()
            with autocast(x.device, self.precision):
                loss = self.attacked_loss(functional_call(self.model, buffers, (adversarial,)), y)
            (gradient,) = torch.autograd.grad(loss, adversarial)
            adversarial = adversarial.detach().add_(gradient.sign_(), alpha=self.step_size).clamp_(low, high)
        return adversarial


class TrivialAugment(Method):
    """TrivialAugment (Müller & Hutter 2021, Algorithm 1): one random operation of random magnitude an image.

    The space is its "Wide" one, in torchvision's implementation: 14 operations of color or geometry with up to 31
    magnitudes. There are no hyperparameters. It acts on the 8-bit images that crop and flip return, as in torchvision's
    training reference, one image after the other: some 25 ms of a CPU core for a batch of 128 images of 32 pixels.
    """

    def __init__(self) -> None:
        self.transform = v2.TrivialAugmentWide()

    def augment(self, images: Tensor) -> Tensor:
        """uint8 images `[B, 3, S, S]`, cropped and flipped → the same, each changed in its own way."""
        return torch.stack([self.transform(image) for image in images])
