"""Figure 6 (a-c): accuracy under attack, by projected gradient ascent with expectation over the network's noise (EoT).

The attacker knows the network and its noise, but not the draws. Each step ascends the cross-entropy of the *mean*
prediction p over E draws. Its gradient is the expectation over the noise (Athalye et al. 2018) of the very quantity
that decides. The final prediction is a mean over S draws that the attack has not seen.

The random start, the steps and the projections are foolbox's (`LinfPGD`, `L2PGD`, `SparseL1DescentAttack`). An image
counts as correct if it is classified correctly both as it is and after the attack. These things differ from foolbox:

- It returns the last iterate; here the one with the largest margin (best other class over the true one) is kept. With
  noise a large margin may be luck of E draws, so S fresh draws judge this iterate and the last one, and the worse is
  taken. (The kept one alone is a weaker attack: on a ResNet8 with φ, at L2 0.4 with E = 4 and 10 steps, it left 63.8 %,
  the last one 59.5 %.)
- The gradient is that of log((1 − p(y)) / p(y)), a positive multiple of cross-entropy's; normalized steps are the same.
  Cross-entropy's own loses its direction in float32 where 1 − p(y) is below 1e-7, so that networks look robust which
  are merely sure of themselves. With its logits times 10, that ResNet8 keeps 81 % at ε = 1.5 in L2 by cross-entropy
  and 50 % by this; without the factor, 48 % by either.
- In L1 a step moves the one percent of pixels with the largest gradient (Tramèr & Boneh 2019). foolbox's `L1PGD` moves
  all and finds less: of a ResNet8 on 12-pixel images 100 of its steps leave 97.0 % at ε = 6, 20 sparse ones 80.0 %.
- An image at which the network returns what is not finite counts as misclassified once the attack has found it; the
  program says how many there were. On images as they are, this is an error.
- The projection of foolbox 3.3.4 onto the L1 ball overshoots by up to 0.1 %. What lies outside is scaled back.
"""

import dataclasses
import importlib
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metaperturb.analyses.records import begun
from metaperturb.config import option
from metaperturb.data.batches import DeviceImages
from metaperturb.data.splits import shuffled
from metaperturb.errors import UserError
from metaperturb.modes import eval_mode
from metaperturb.provenance import provenance
from metaperturb.randomness import seed_torch
from metaperturb.runs import StepProgress
from metaperturb.storage import reason, save_json
from metaperturb.trained import TrainedRun

REVISION = 2  # of the attack: results of another one are not continued
NORMS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}  # name → order, in the order of figure 6
ORDER = [*NORMS]


@dataclass(frozen=True)
class Attack:
    """How networks are attacked: projected gradient ascent in balls about an image whose pixels are in [0, 1].

    A network that draws no noise is attacked with `draws` and `samples` of 1.
    """

    linf: list[float] = option([k / 255 for k in (0, 0.25, 0.5, 1, 2, 4, 8)], "radii ε of L∞ balls; 0: none", low=0)
    l2: list[float] = option([0.0, 0.05, 0.1, 0.2, 0.4, 0.8], "radii of L2 balls", low=0)
    l1: list[float] = option([0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0], "radii of L1 balls", low=0)
    steps: int = option(40, "of the ascent", low=1)
    step_size: float = option(0.1, "relative to ε, whatever the number of steps", low=1e-6)
    draws: int = option(10, "E: of the noise in each step", low=1)
    samples: int = option(20, "S: of the noise in the final prediction", low=1)
    images: int | None = option(None, "test images, the first of a fixed random order; null: all", low=1)
    batch_size: int = option(500, "network inputs at once (images × E): what memory has to hold", low=1)
    seed: int = option(0, "of the random starts and the noise")

    def __post_init__(self) -> None:
        if not self.points:
            raise UserError("linf, l2, l1: no ε is given")

    @property
    def points(self) -> list[tuple[str, float]]:
        """(norm, ε), each once, ε rising."""
        return [(norm, float(eps)) for norm in NORMS for eps in sorted(set(getattr(self, norm)))]


class AttackedModel(nn.Module):
    """A network as the attacker sees it: images `[B, 3, S, S]` in [0, 1] → log of the mean prediction `[B, K]`.

    The mean is over draws of the noise, of softmax, and its logarithm is computed from log-softmax throughout, so that
    nothing is lost where a probability underflows. Log-softmax leaves log-probabilities as they are, so that they serve
    as logits.

    Args:
        model: images in [-1, 1] → logits `[B, K]`, in evaluation mode.
        draws: E of a forward pass; they pass the network as one batch of E·B images.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, draws

    def forward(self, images: Tensor) -> Tensor:
        return self._log_sum(images, self.draws) - math.log(self.draws)

    @torch.no_grad()
    def predict(self, images: Tensor, samples: int) -> Tensor:
        """The same over `samples` draws, at most `draws` at once."""
        parts = [self._log_sum(images, min(self.draws, samples - done)) for done in range(0, samples, self.draws)]
        return torch.stack(parts).logsumexp(dim=0) - math.log(samples)

    def _log_sum(self, images: Tensor, draws: int) -> Tensor:
        """Log of the sum of softmax over draws: `[B, K]`."""
        logits = self.model((2 * images - 1).repeat(draws, 1, 1, 1))  # exactly what `normalize` makes of 8-bit pixels
        return logits.log_softmax(dim=1).unflatten(0, (draws, len(images))).logsumexp(dim=0)


def split_off(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[B, K]` → those of the labels `[B]`, and all `[B, K]` with −∞ in their places."""
    index = labels[:, None]
    return log_p.gather(1, index).squeeze(1), log_p.scatter(1, index, -math.inf)


def margin(log_p: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the best other class less that of the true one: `[B]`, positive where that class wins.

    It is ∞ where the network returns what is not finite: that is no answer.
    """
    own, others = split_off(log_p, labels)
    return (others.amax(dim=1) - own).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


class _KeepWorst:
    """What is done otherwise than in foolbox's attacks, which leave these three methods to be overridden."""

    def begin(self, images: Tensor) -> None:
        self.worst, self.margin = images, torch.full_like(images[:, 0, 0, 0], -math.inf)

    def get_loss_fn(self, model, labels):
        def loss_fn(images: Tensor) -> Tensor:
            log_p = model(images)
            self.consider(images, log_p, labels.raw)
            own, others = split_off(log_p, labels.raw)
            return (others.logsumexp(dim=1) - own).sum()

        return loss_fn

    def value_and_grad(self, loss_fn, x):
        images = x.raw.detach().requires_grad_()
        loss = loss_fn(images)
        (gradient,) = torch.autograd.grad(loss, images)  # of images alone: weights need none
        # Where the network has been driven beyond what is finite, there is nothing left to ascend.
        return loss, type(x)(gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))

    @torch.no_grad()
    def consider(self, images: Tensor, log_p: Tensor, labels: Tensor) -> None:
        """Keep those images that are worse than all before."""
        found = margin(log_p, labels)
        worse = found >= self.margin
        self.worst = torch.where(worse[:, None, None, None], images.detach(), self.worst)
        self.margin = torch.where(worse, found, self.margin)


class _Sparse(_KeepWorst):
    """Besides, an L1 projection that ends in the ball."""

    def project(self, x, x0, epsilon):
        delta = super().project(x, x0, epsilon).raw - x0.raw
        norm = torch.linalg.vector_norm(delta, 1, dim=(1, 2, 3), keepdim=True)
        return x0 + type(x0)(delta * (epsilon / norm.clamp_min(epsilon)))


def perturb(
    model: AttackedModel,
    images: Tensor,
    labels: Tensor,
    norm: str,
    eps: float,
    steps: int,
    step_size: float,
    judges: int = 0,
) -> Tensor:
    """The worst images `[B, 3, S, S]` found in the ball of radius `eps` > 0 about `images`, within [0, 1].

    Random start and noise come from PyTorch's global generators. `judges`: draws of the noise by which kept and last
    iterate are compared; 0: the network, which is in evaluation mode, has no noise.
    """
    foolbox = _foolbox()
    bases = {
        "linf": (_KeepWorst, foolbox.attacks.LinfPGD),
        "l2": (_KeepWorst, foolbox.attacks.L2PGD),
        "l1": (_Sparse, foolbox.attacks.SparseL1DescentAttack),
    }
    attack = type("Attack", bases[norm], {})(steps=steps, rel_stepsize=step_size, random_start=True)
    attack.begin(images)
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    last = attack.run(bounded, images, labels, epsilon=eps)
    if judges == 0:
        with torch.no_grad():
            attack.consider(last, model(last), labels)
        worst = attack.worst
    else:
        seed = int(torch.randint(2**31, ()))
        margins = []
        for candidate in (attack.worst, last):
            torch.manual_seed(seed)
            margins.append(margin(model.predict(candidate, judges), labels))
        worst = torch.where((margins[1] > margins[0])[:, None, None, None], last, attack.worst)
    check_within(worst, images, norm, eps)
    return worst


def check_within(perturbed: Tensor, images: Tensor, norm: str, eps: float) -> None:
    """Refuse what is not finite, not in [0, 1], or not within `eps` of `images`, but for rounding and 1e-4 of it."""
    order, low, high = NORMS[norm], *(value.item() for value in perturbed.aminmax())
    distance = torch.linalg.vector_norm((perturbed - images).double().flatten(1), order, dim=1).max().item()
    rounding = torch.finfo(images.dtype).eps * (1 if order == math.inf else images[0].numel() ** (1 / order))
    if not (low >= 0 and high <= 1 and distance <= eps * (1 + 1e-4) + rounding):  # true of no number: NaN
        found = f"pixels in [{low:g}, {high:g}] instead of [0, 1], or an image at a distance of {distance:g}"
        raise UserError(f"attack {norm}, ε = {eps:g}: foolbox returned {found}")


def measure_robustness(run: TrainedRun, attack: Attack, path: Path) -> dict[str, Any]:
    """Attack a run's network and write what it withstands to `path`, after each batch at each ε.

    Called again after it was cut off, it goes on where it was, to the same numbers. Called with further ε, it adds
    them. Networks compute in float32 whatever they trained in: a coarse gradient would be a weaker attack. The images
    are those of the run's `eval_split`.

    Returns:
        the content of `path`, of its points those asked for: what it is about; `clean`, the counts of correct images by
        batch; `points`, each of `norm`, `eps`, `correct` (such counts) and `accuracy` in [0, 1]; `seconds` in all;
        versions and hardware.
    """
    version = check_attack(run, attack)
    victim = _Victim(run, attack)
    settings = {key: value for key, value in dataclasses.asdict(attack).items() if key not in NORMS}
    settings |= {"images": victim.count, "foolbox": version, "revision": REVISION}
    record = begun(path, run, "robustness", settings, {"clean": [], "points": [], "seconds": 0.0})
    known = {(point["norm"], point["eps"]): point for point in record["points"]}
    points = [known.setdefault((norm, e), {"norm": norm, "eps": e, "correct": []}) for norm, e in attack.points]
    record["points"] = [known[place] for place in sorted(known, key=lambda place: (ORDER.index(place[0]), place[1]))]
    batches = range(len(victim.batches))
    left = [(point, number) for point in points for number in batches[len(point["correct"]) :]]
    if not left:
        return {**record, "points": points}
    total = len(points) * len(batches)
    progress = StepProgress(f"attacks on {run.dir.name}", total, total - len(left))
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # which PyTorch has convolutions use on a GPU
    with eval_mode(victim.model), exact:
        clean = [victim.clean(number) for number in batches]
        record |= {"clean": [int(correct.sum()) for correct in clean], **provenance(victim.device)}
        for done, (point, number) in enumerate(left, total - len(left) + 1):
            began = time.monotonic()
            point["correct"].append(victim.withstands(number, point["norm"], point["eps"], clean[number]))
            attacked = sum(len(labels) for _, labels in victim.batches[: number + 1])
            point["accuracy"] = sum(point["correct"]) / attacked
            record["seconds"] = round(record["seconds"] + time.monotonic() - began, 3)
            save_json(record, path)
            progress.update(done, accuracy=point["accuracy"])
    progress.close()
    return {**record, "points": points}


def check_attack(run: TrainedRun, attack: Attack) -> str:
    """What can be wrong with an attack on a run, told before anything is computed; returns foolbox's version."""
    for norm, eps in attack.points:
        reach = (3 * run.test.image_size**2) ** (1 / NORMS[norm])  # from the black image to the white one
        if eps > reach:
            raise UserError(f"{norm}: ε = {eps:g} is beyond {reach:g}, the largest distance of two images")
    if attack.images is not None and attack.images > len(run.test):
        raise UserError(f"images: {run.test.name} has {len(run.test)}, got {attack.images}")
    return _foolbox().__version__


def _foolbox() -> ModuleType:
    """The package, which only this analysis needs."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox imports GitPython, which else wants the git program
    try:
        return importlib.import_module("foolbox")
    except ImportError as error:
        how = '.venv/bin/pip install foolbox, or with the package, in the clone: pip install -e ".[analyses]"'
        raise UserError(f"foolbox cannot be imported ({reason(error)}): install it by {how}") from error


class _Victim:
    """A run's network and images as `measure_robustness` attacks them."""

    def __init__(self, run: TrainedRun, attack: Attack) -> None:
        self.count = len(run.test) if attack.images is None else attack.images
        self.dir, self.attack = run.dir, attack
        draws, self.samples = (attack.draws, attack.samples) if run.stochastic else (1, 1)
        self.judges = attack.samples if run.stochastic else 0
        self.device = next(run.model.parameters()).device
        self.model = AttackedModel(run.model, draws).eval()
        images = DeviceImages(run.test, self.device)
        order = shuffled(np.arange(len(run.test)), np.random.PCG64(0))[: self.count]
        parts = torch.from_numpy(order).to(self.device).split(max(1, attack.batch_size // draws))
        self.batches = [images.take(part) for part in parts]  # 8-bit images and labels

    def clean(self, number: int) -> Tensor:
        """Which images of a batch are classified correctly as they are: bool `[B]`."""
        images, labels = self.batches[number]
        correct, finite = self._answers(images.float() / 255, labels, number)
        if not finite.all():
            raise UserError(f"{self.dir}: the network returns numbers that are not finite")
        return correct

    def withstands(self, number: int, norm: str, eps: float, clean: Tensor) -> int:
        """How many images of a batch are classified correctly as they are and after the attack."""
        if eps == 0:
            return int(clean.sum())
        images, labels = self.batches[number]
        seed_torch(self.attack.seed, ORDER.index(norm), "attack", number)
        how = self.attack.steps, self.attack.step_size, self.judges
        worst = perturb(self.model, images.float() / 255, labels, norm, eps, *how)
        correct, finite = self._answers(worst, labels, number)
        if broken := int((~finite).sum()):
            said = f"at {broken} perturbed images the network returns what is not finite, which counts as wrong"
            print(f"{self.dir.name}: {norm}, ε = {eps:g}: {said}", file=sys.stderr)
        return int((clean & correct).sum())

    def _answers(self, x: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Which predictions are correct and which are finite, bool `[B]` each."""
        # The same noise at every ε (common random numbers), and other noise than that of the attack.
        seed_torch(self.attack.seed, 0, "attacked", number)
        log_p = self.model.predict(x, self.samples)
        finite = ~log_p.isnan().any(dim=1)
        return (log_p.argmax(dim=1) == labels) & finite, finite
