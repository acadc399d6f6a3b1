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

from metaperturb.analyses import begun
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
ATTACKS = {"linf": "LinfPGD", "l2": "L2PGD", "l1": "SparseL1DescentAttack"}  # of foolbox


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
        samples: S of `predict`; 1 for a network without noise.
    """

    def __init__(self, model: nn.Module, draws: int, samples: int = 1) -> None:
        super().__init__()
        self.model, self.draws, self.samples = model, draws, samples

    def forward(self, images: Tensor) -> Tensor:
        return self._log_sum(images, self.draws) - math.log(self.draws)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The same over `samples` draws, at most `draws` at once."""
        counts = [min(self.draws, self.samples - done) for done in range(0, self.samples, self.draws)]
        return torch.stack([self._log_sum(images, n) for n in counts]).logsumexp(dim=0) - math.log(self.samples)

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


def perturb(
    model: AttackedModel, images: Tensor, labels: Tensor, norm: str, eps: float, steps: int, step_size: float
) -> Tensor:
    """The worst images `[B, 3, S, S]` found in the ball of radius `eps` > 0 about `images`, within [0, 1].

    Random start and noise come from PyTorch's global generators. Kept and last iterate are compared by the model's
    `samples` draws of the noise; with one, the network, which is in evaluation mode, has no noise.
    """
    foolbox = _foolbox()
    from eagerpy import astensor  # foolbox's tensors

    attack, bounds, x0 = getattr(foolbox.attacks, ATTACKS[norm])(), foolbox.types.Bounds(0, 1), astensor(images)
    x = attack.get_random_start(x0, eps).clip(0, 1)
    worst, most = images, torch.full_like(images[:, 0, 0, 0], -math.inf)
    for step in range(steps + (model.samples == 1)):
        found, gradient = ascent(model, x.raw, labels)
        worse = found >= most
        worst, most = torch.where(worse[:, None, None, None], x.raw, worst), torch.where(worse, found, most)
        if step < steps:
            x = x + step_size * eps * attack.normalize(astensor(gradient), x=x, bounds=bounds)
            x = attack.project(x, x0, eps)
            if norm == "l1":
                delta = (x - x0).raw
                distance = torch.linalg.vector_norm(delta, 1, dim=(1, 2, 3), keepdim=True)
                x = x0 + astensor(delta * (eps / distance.clamp_min(eps)))
            x = x.clip(0, 1)
    if model.samples == 1:
        return worst
    seed = int(torch.randint(2**31, ()))
    margins = []
    for candidate in (worst, x.raw):
        torch.manual_seed(seed)
        margins.append(margin(model.predict(candidate), labels))
    return torch.where((margins[1] > margins[0])[:, None, None, None], x.raw, worst)


def ascent(model: AttackedModel, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The margins `[B]` of images, and the gradient of log((1 − p(y)) / p(y)) with respect to them."""
    images = images.detach().requires_grad_()
    log_p = model(images)
    own, others = split_off(log_p, labels)
    (gradient,) = torch.autograd.grad((others.logsumexp(dim=1) - own).sum(), images)  # weights need none
    # Where the network has been driven beyond what is finite, there is nothing left to ascend.
    return margin(log_p.detach(), labels), gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


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
    settings = {key: value for key, value in dataclasses.asdict(attack).items() if key not in NORMS}
    settings |= {"images": attack.images or len(run.test), "foolbox": version, "revision": REVISION}
    record = begun(path, run, "robustness", settings, {"clean": [], "points": [], "seconds": 0.0})
    known = {(point["norm"], point["eps"]): point for point in record["points"]}
    points = [known.setdefault((norm, e), {"norm": norm, "eps": e, "correct": []}) for norm, e in attack.points]
    record["points"] = [known[place] for place in sorted(known, key=lambda place: (ORDER.index(place[0]), place[1]))]
    device = next(run.model.parameters()).device
    model = AttackedModel(run.model, *((attack.draws, attack.samples) if run.stochastic else (1, 1))).eval()
    batches = attacked_images(run, settings["images"], attack.batch_size // model.draws, device)
    left = [(point, number) for point in points for number in range(len(point["correct"]), len(batches))]
    if not left:
        return {**record, "points": points}

    def answers(x: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Which predictions are correct and which are finite, bool `[B]` each."""
        # The same noise at every ε (common random numbers), and other noise than that of the attack.
        seed_torch(attack.seed, 0, "attacked", number)
        log_p = model.predict(x)
        finite = ~log_p.isnan().any(dim=1)
        return (log_p.argmax(dim=1) == labels) & finite, finite

    total = len(points) * len(batches)
    progress = StepProgress(f"attacks on {run.dir.name}", total, total - len(left))
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # which PyTorch has convolutions use on a GPU
    with eval_mode(model), exact:
        clean = [answers(images.float() / 255, labels, number) for number, (images, labels) in enumerate(batches)]
        if not all(finite.all() for _, finite in clean):
            raise UserError(f"{run.dir}: the network returns numbers that are not finite")
        record |= {"clean": [int(correct.sum()) for correct, _ in clean], **provenance(device)}
        for done, (point, number) in enumerate(left, total - len(left) + 1):
            began, norm, eps = time.monotonic(), point["norm"], point["eps"]
            (images, labels), (correct, finite) = batches[number], clean[number]
            if eps > 0:
                seed_torch(attack.seed, ORDER.index(norm), "attack", number)
                worst = perturb(model, images.float() / 255, labels, norm, eps, attack.steps, attack.step_size)
                withstood, finite = answers(worst, labels, number)
                correct = correct & withstood
            if broken := int((~finite).sum()):
                said = f"at {broken} perturbed images the network returns what is not finite, which counts as wrong"
                print(f"{run.dir.name}: {norm}, ε = {eps:g}: {said}", file=sys.stderr)
            point["correct"].append(int(correct.sum()))
            point["accuracy"] = sum(point["correct"]) / sum(len(labels) for _, labels in batches[: number + 1])
            record["seconds"] = round(record["seconds"] + time.monotonic() - began, 3)
            save_json(record, path)
            progress.update(done, accuracy=point["accuracy"])
    progress.close()
    return {**record, "points": points}


def attacked_images(run: TrainedRun, count: int, batch_size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Batches of 8-bit test images and their labels: the first `count` of an order that is the same for all runs."""
    order = torch.from_numpy(shuffled(np.arange(len(run.test)), np.random.PCG64(0))[:count]).to(device)
    return [*map(DeviceImages(run.test, device).take, order.split(max(1, batch_size)))]


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
