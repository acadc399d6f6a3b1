"""Predictions of a network with φ: the mean over draws of its noise, or one pass of a deterministic network.

Up to the first site that acts, a network computes the same for all draws of one image. So that site gets
`[B, C, H, W]` and returns `[draws · B, C, H, W]`, all images of the first draw first. Not every network bears that its
batch grows on the way. Each is therefore tried out, and where both ways do not give the same, the images are repeated.

In a deterministic network every site multiplies by E[z | h] in place of a draw of z. Statistics gathered under noise do
not fit then (the variance shift of Li et al. 2019), so they are taken anew. A mean over draws is less sure of itself
than one pass. The classifier is therefore scaled by one number, a temperature (Guo et al. 2017). What averaging gains
beyond that, one pass can learn from the draws (distillation, Hinton et al. 2015).

Examples:
    >>> model = metaperturb.make_deterministic(model.eval(), batches, steps=300)  # batches: of the training images
    >>> probabilities = model(images).softmax(dim=1)
"""

import copy
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaperturb.dry_run import classifier_name
from metaperturb.errors import NotFinite, UserError
from metaperturb.kernels.plain import HALF_PRECISION, MOMENTUM
from metaperturb.modes import batch_norms, eval_mode, set_mode
from metaperturb.perturbation import Attachment, PerturbSite, draws_at_first_site
from metaperturb.sites import unwrapped

# Of a forward pass, up to which images and draws run together; on a CPU more are slower than one pass a draw.
PIXELS = {"cpu": 2**16}
PIXELS_ELSEWHERE = 2**20
ALL, NONE = -2, -1  # of a network's modules, beside the number of one
LEARNED = 4  # draws of each image, in steps of training
DRAWS = 20  # together: what runs once for all of them is then a small part of the work

_bears_draws: "weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]]" = weakref.WeakKeyDictionary()


# --- means over draws


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, samples: int = 20) -> Tensor:
    """Probabilities `[B, K]` of images `[B, C, H, W]`: the mean over draws of the noise, in evaluation mode.

    Args:
        model: a network with φ that returns logits `[B, K]`. Each of its modules has its own mode again afterwards.
        x: the images. They go to the device, and floating-point ones to the precision, of the network's parameters.
        samples: draws. A network that draws nothing needs one pass and gets one.

    Raises:
        UserError: the network has no sites or returns no logits, `x` holds no images, or `samples` is below 1.
    """
    if samples < 1:
        raise UserError(f"samples must be at least 1, got {samples}")
    _check_images(x, "x")
    _attachments(model)
    with eval_mode(model):
        return log_prediction(model, _moved(x, model), samples).exp()


@torch.no_grad()
def log_prediction(model: nn.Module, x: Tensor, samples: int, tell: Callable[[float], None] = lambda _: None) -> Tensor:
    """Log of the mean of softmax over `samples` draws: `[B, K]` in float32, of images `[B, C, H, W]`.

    The network has to be in evaluation mode. One without sites gets all images at once, and one draw after the other.
    Calls `tell` with the share of the work that is done, after each pass.
    """
    draws, images, shared = 1, len(x), False
    sites = [module for module in model.modules() if isinstance(module, PerturbSite)]
    if sites and not any(site.attachment.current().draws for site in sites):
        samples = 1
    if sites and samples > 1:
        fits = max(1, PIXELS.get(x.device.type, PIXELS_ELSEWHERE) // (x.shape[2] * x.shape[3]))
        draws = max(1, fits // images)
        if shared := bears_draws(model, x):
            draws = max(draws, min(fits, DRAWS))
            images = max(1, fits // min(draws, samples))
    parts, done = [], 0
    for chunk in x.split(images):
        log_p = x.new_full((), -math.inf, dtype=torch.float32)
        for first in range(0, samples, draws):
            count = min(draws, samples - first)
            # In float32 whatever the network computes in: a sum of a hundred bfloat16 numbers loses the last ones.
            log_q = _logits(model, chunk, count, shared).float().log_softmax(dim=1).unflatten(0, (count, len(chunk)))
            log_p = torch.logaddexp(log_p, log_q.logsumexp(dim=0))
            done += count * len(chunk)
            tell(done / (samples * len(x)))
        parts.append(log_p - math.log(samples))
    return torch.cat(parts)


@torch.no_grad()
def bears_draws(model: nn.Module, x: Tensor) -> bool:
    """Whether the first site of a network may return several draws of each image like `x` `[B, C, H, W]`.

    Tried out on two of the images, once for each size and each state of the network. Leaves the random generators.
    """
    known = _bears_draws.setdefault(model, {})
    key = (x.shape[1:], x.dtype, x.device, *map(_state, model.modules()))
    if key not in known:
        agree = _agree(model, x[:2] if len(x) > 1 else torch.cat([x, x.flip(3)]))
        if agree is None:
            return False
        known[key] = agree
    return known[key]


def _state(module: nn.Module) -> tuple[Any, ...]:
    draws = isinstance(module, PerturbSite) and module.attachment.current().draws
    return weakref.ref(module), draws, module._compiled_call_impl is not None  # another one may get a module's id


def _agree(model: nn.Module, x: Tensor, draws: int = 3) -> bool | None:
    """Whether both ways give the same; None where all outputs are equal, as of a classifier of zeros."""
    devices = [x.device] if x.is_cuda else []

    def logits(x: Tensor, shared: bool) -> Tensor:
        with torch.random.fork_rng(devices):
            return _logits(model, x, draws, shared).float()

    try:
        found = logits(x, True)
    except Exception:  # whatever it is: where it has another cause, the images as they are will raise it again
        return False
    expected = logits(x, False)
    if (expected == expected[0]).all():
        return None
    half = torch.is_autocast_enabled(x.device.type) or x.dtype in HALF_PRECISION
    bound = (0.05 if half else 1e-3) * expected.abs().max()  # of rounding; another draw differs by more
    if not (found - expected).abs().max() <= bound:
        return False
    beside = logits(torch.cat([x[:1], x[1:] + 1]), False)  # where the others matter, images must not go in parts
    return bool((beside - expected)[:: len(x)].abs().max() <= bound)


def _logits(model: nn.Module, x: Tensor, draws: int, shared: bool) -> Tensor:
    """`[draws · B, K]`, all images of the first draw first."""
    if shared:
        with draws_at_first_site(draws):
            logits = model(x)
    else:
        logits = model(x.repeat(draws, 1, 1, 1) if draws > 1 else x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != draws * len(x):
        raise UserError(f"the network returns {_shape(logits)} where logits [{draws * len(x)}, K] are expected")
    return logits


# --- one pass


@torch.no_grad()
def make_deterministic(
    model: nn.Module, batches: Iterable[Any] | None = None, steps: int = 0, *, lr: float = 1e-3, fitted: int = 512
) -> nn.Module:
    """Turn `model` into one that predicts in one pass, in place, and return it. `make_stochastic` reverses it.

    Args:
        model: a network with φ, in evaluation mode.
        batches: training images `[B, C, H, W]`, or tuples that begin with them, augmented as in training, and
            moved as those of `predict`. The running statistics of batch norm and of the sites become the average over
            these batches. Weight and bias of the classifier are divided by the temperature that brings one pass
            closest to the mean over 20 draws, in cross-entropy. A network without batch norm needs no batches; then
            nothing of this is done.
        steps: of training with Adam, behind that: one pass learns the mean of 4 draws of the network as it was, a batch
            a step. Then the statistics are taken anew. `batches` is gone through again and again.
        lr: learning rate of these steps, after the first tenth of them; it falls to 0 like a cosine.
        fitted: how many images, the first ones, the temperature is fitted to.

    The mode is in the state dict of the network, together with the statistics and the classifier from before; after
    `steps` with all parameters from before.

    Raises:
        UserError: the network has no sites, is deterministic already, or is in training mode; it has batch norm, or
            there are steps, and there are no batches; a batch holds one image, or images that the network does not
            take; `steps` or `lr` is negative, or no parameter can be trained. The network is then as it was. So it is
            after whatever `batches` raises.

    Examples:
        >>> loader = torch.utils.data.DataLoader(training_images, batch_size=128, shuffle=True)
        >>> make_deterministic(model.eval(), loader, steps=300)(images).softmax(dim=1)
    """
    if steps < 0 or not lr >= 0:
        raise UserError(f"steps and lr must be at least 0, got {steps} and {lr}")
    wrapper, model = model, unwrapped(model)
    attachments = _attachments(model)
    if any(attachment.deterministic for attachment in attachments):
        raise UserError("this network is deterministic already (make_stochastic(model) reverses it)")
    if any(module.training for module in model.modules()):
        raise UserError("this network, or a part of it, is in training mode; call model.eval() first")
    batches = () if batches is None else batches
    images = _images(model, batches)
    first, few = [], []
    while (left := fitted - sum(map(len, few))) > 0 and (x := next(images, None)) is not None:
        first.append(x)
        few.append(x[:left])
    if not first and (steps or _norms(model)):
        why = "to learn from" if steps else "and this network has batch norm, whose statistics are taken anew"
        raise UserError(f"there are no batches{'' if steps else ','} {why}")
    layer = _classifier(model, first[0]) if first else None
    drawn = [predict(model, x) for x in few] if layer else []
    drawing = copy.deepcopy(model) if steps else None
    if first:
        scaled = NONE if layer is None else [*model.modules()].index(layer)
        attachments[0].before = torch.cat(
            [value.flatten().double().cpu() for value in _changed(model, ALL if steps else scaled)]
        )
    for attachment in attachments:
        attachment.deterministic = True
    try:
        if few:
            _gather(model, chain(first, images))
        cooled = layer is not None and _cool(model, layer, few, torch.cat(drawn))
        if drawing is not None:
            _learn(model, drawing, batches, steps, lr)
            _gather(model, _images(model, batches))
            if not torch.isfinite(model(few[0])).all():
                raise NotFinite(f"after {steps} steps the network's outputs are not finite; a smaller lr may help")
        elif few and not cooled:
            print("metaperturb: no classifier to scale; one pass may be surer of itself than draws", file=sys.stderr)
    except BaseException:
        make_stochastic(model)
        raise
    return wrapper


@torch.no_grad()
def make_stochastic(model: nn.Module) -> nn.Module:
    """Undo `make_deterministic`, in place, and return the network: it draws again, with the statistics of that time.

    Raises:
        UserError: the network has no sites or is not deterministic, or its batch norms are others now.
    """
    attachments = _attachments(network := unwrapped(model))
    if not all(attachment.deterministic for attachment in attachments):
        raise UserError("this network is not deterministic (make_deterministic(model, batches) makes it so)")
    if attachments[0].before is not None:
        _restore(network, attachments[0].before)
        attachments[0].before = None
    for attachment in attachments:
        attachment.deterministic = False
    return model


def _attachments(model: nn.Module) -> list[Attachment]:
    found = {id(m.attachment): m.attachment for m in model.modules() if isinstance(m, PerturbSite)}
    if not found:
        raise UserError("this network has no sites of φ: metaperturb.attach(model, phi, …) puts them there")
    return list(found.values())


def _norms(model: nn.Module) -> list[nn.Module]:
    return [norm for norm in batch_norms(model) if norm.running_mean is not None]


def _sites(model: nn.Module) -> list[PerturbSite]:
    """Those with statistics that matter."""
    sites = (m for m in model.modules() if isinstance(m, PerturbSite) and m.attachment.paper)
    return [site for site in sites if site.attachment.gate or site.phi.scale_free]


def _changed(model: nn.Module, number: int) -> Iterator[Tensor]:
    """What a deterministic network has anew: statistics, and parameters, all or those of the module of this number."""
    yield torch.tensor([number])
    if number == ALL:
        yield from model.parameters()
    elif layer := dict(enumerate(model.modules())).get(number):
        yield from layer.parameters(recurse=False)
    for norm in _norms(model):
        yield from (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    for site in _sites(model):
        yield from site.buffers(recurse=False)


def _restore(model: nn.Module, values: Tensor) -> None:
    changed = list(_changed(model, int(values[0])))
    sizes = [tensor.numel() for tensor in changed]
    if sum(sizes) != len(values):
        raise UserError("layers were exchanged or folded since make_deterministic")
    for tensor, value in zip(changed, values.split(sizes), strict=True):
        tensor.copy_(value.view(tensor.shape))
    torch.clear_autocast_cache()


def _images(model: nn.Module, batches: Iterable[Any]) -> Iterator[Tensor]:
    """The images of each batch, checked, on the network's device."""
    site = next(m for m in model.modules() if isinstance(m, PerturbSite))
    for number, batch in enumerate(batches, 1):
        name = f"batch {number}"
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        _check_images(x, name)
        if len(x) == 1 and _norms(model):
            raise UserError(f"{name} holds one image; batch norm's statistics need several (drop_last=True)")
        if x.shape[2] != site.size_norm:
            raise UserError(f"{name} holds images {_shape(x)}; φ was attached for a height of {site.size_norm} pixels")
        yield _moved(x, model)


def _forward(model: nn.Module, x: Tensor, number: int) -> Tensor:
    try:
        return model(x)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"batch {number}: the network does not take images {_shape(x)} ({reason})") from error


def _learn(model: nn.Module, drawing: nn.Module, batches: Iterable[Any], steps: int, lr: float) -> None:
    """Train one pass of `model` to predict what `drawing`, the network as it was, predicts with noise.

    One draw an image and step suffices: its mean over the steps is that of many, and the gradient is linear in it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters or torch.is_inference_mode_enabled():
        why = "inside torch.inference_mode()" if parameters else "as no parameter requires a gradient"
        raise UserError(f"steps: nothing can be trained {why}")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    share = lambda step: min(1, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    changing, done = [*_norms(model), *_sites(model)], 0
    set_mode(changing, True)
    try:
        while (before := done) < steps:
            for number, x in zip(range(1, steps - before + 1), _images(model, batches), strict=False):
                torch.clear_autocast_cache()  # of the weights as they were, or without a gradient
                optimizer.zero_grad()
                with torch.enable_grad():
                    logits = _forward(model, x, number)
                    loss = F.cross_entropy(logits.float(), predict(drawing, x, samples=LEARNED))
                loss.backward()
                optimizer.step()
                schedule.step()
                done += 1
            if done == before:
                raise UserError(f"batches end after {done} of {steps} steps; take a loader or a list")
            if not torch.isfinite(loss):
                raise NotFinite(f"in {done} of {steps} steps the loss became infinite or NaN; a smaller lr may help")
    finally:
        set_mode(changing, False)
        optimizer.zero_grad()
        torch.clear_autocast_cache()


def _gather(model: nn.Module, images: Iterable[Tensor]) -> None:
    """What `update_bn` of `torch.optim.swa_utils` does, for the sites, too, and with dropout in evaluation mode."""
    norms, sites = _norms(model), _sites(model)
    running = [statistic for site in sites for statistic in site.buffers(recurse=False)]
    sums = [torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in running]  # not in bfloat16
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        set_mode([*norms, *sites], True)
        for number, x in enumerate(images, 1):
            for statistic in running:  # which a batch then moves by its own, times the momentum
                statistic.zero_()
            _forward(model, x, number)
            for statistic, total in zip(running, sums, strict=True):
                total += statistic / MOMENTUM
        for statistic, total in zip(running, sums, strict=True):
            statistic.copy_(total / number)
        if not all(torch.isfinite(module.running_var).all() for module in [*norms, *sites]):
            raise NotFinite("these batches give statistics that are not finite")
    finally:
        set_mode([*norms, *sites], False)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _classifier(model: nn.Module, x: Tensor) -> nn.Module | None:
    """The layer whose outputs are the logits, if there is one whose weights can be scaled."""
    try:
        layer = model.get_submodule(classifier_name(model, example=x[:2]))
    except UserError:
        return None
    return layer if "weight" in layer._parameters else None  # not one that weight norm computes


def _cool(model: nn.Module, layer: nn.Module, images: list[Tensor], drawn: Tensor) -> bool:
    """Divide a classifier by the temperature T with the smallest cross-entropy of softmax(logits / T) with `drawn`.

    Cross-entropy is convex in 1 / T. At its minimum both give the logits the same mean. Returns whether that divides
    the logits, too. Where it does not (a second head, shared weights, a batch norm behind), the classifier stays.
    """
    logits = torch.cat([model(x) for x in images]).double()
    mean, low, high = (drawn * logits).sum(), -4.0, 4.0  # of log2(1 / T)
    if not torch.isfinite(mean):
        raise NotFinite("for these batches the network's outputs are not finite")
    for _ in range(30):
        middle = (low + high) / 2
        below = ((logits * 2**middle).softmax(dim=1) * logits).sum() < mean
        low, high = (middle, high) if below else (low, middle)
    parameters = list(layer.parameters(recurse=False))
    before = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.mul_(2**low)
    torch.clear_autocast_cache()  # of the weights as they were, in bfloat16
    found = model(images[0])
    tolerance = 0.05 if found.dtype in HALF_PRECISION else 0.01
    expected = logits[: len(found)] * 2**low
    found, expected = (v - v.mean(dim=1, keepdim=True) for v in (found.double(), expected))  # log_softmax shifts them
    if (found - expected).abs().max() <= tolerance * expected.abs().max():
        return True
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)
    torch.clear_autocast_cache()
    return False


def _moved(x: Tensor, model: nn.Module) -> Tensor:
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), x)
    return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)


def _check_images(x: Any, name: str) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4 or len(x) == 0:
        raise UserError(f"{name}: expected images [B, C, H, W], got {_shape(x)}")


def _shape(x: Any) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__
