"""Train a network on a target data set, with a meta-learned φ or another regularizer, and evaluate it (Algorithm 2).

    python -m metaperturb.meta_test --config configs/tgt.yaml --set target=cub phi=runs/src/phi.pt gpu=0
    python -m metaperturb.meta_test --config configs/tgt.yaml --set target=cub method=base gpu=0
    python -m metaperturb.meta_test --config configs/tgt.yaml --set target=cub init=runs/pretrain …     # finetuning

φ is frozen; its strength rises linearly over the first 40 % of the steps. The other regularizers are those of
`metaperturb.methods`. Killed and started again, the run continues from its last checkpoint. The run folder gets
`result.json` (accuracy, NLL and ECE on every test image, or every held-out one), `metrics.jsonl`, `curves.png` and the
checkpoint with the trained network.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from metaperturb import finetuning, kernels, methods, models
from metaperturb.cli import run_program
from metaperturb.config import MetaTestConfig, load_config, parse_arguments
from metaperturb.data import TARGETS
from metaperturb.data.batches import DeviceImages, TrainingBatches, crop_padding
from metaperturb.data.parts import load_parts
from metaperturb.distributed import make_current, parse_devices
from metaperturb.dry_run import watch
from metaperturb.errors import Diverged, UserError
from metaperturb.evaluation import NotFinite, evaluate
from metaperturb.plots import plot_convergence
from metaperturb.provenance import available_cores
from metaperturb.randomness import seed_torch
from metaperturb.runs import Run, StepProgress, check_same_run, finished_result, read_metrics
from metaperturb.sites import find_sites
from metaperturb.storage import load_tensors, save_tensors
from metaperturb.training import (
    ABLATION,
    accuracy,
    annealed_strength,
    autocast,
    check_ablation,
    check_finite,
    check_finite_parameters,
    tell_other_ablation,
)
from metaperturb.weights import load_phi, phi_digest


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(MetaTestConfig, __doc__, argv)
    return run_program(
        lambda: meta_test(load_config(MetaTestConfig, arguments.config, arguments.set)),
        show_traceback=arguments.traceback,
    )


def meta_test(config: MetaTestConfig) -> dict:
    """One training run on a target; returns the content of `result.json`."""
    check_same_run(config, "meta_test")
    if finished := finished_result(config.run_dir):
        check_unchanged(config, finished)
        print(f"{config.run_dir}: already finished", file=sys.stderr)
        report(finished)
        return finished

    device = check_settings(config)
    make_current(device)
    perturbed = config.method == "metaperturb"
    phi = load_phi(config.phi) if perturbed else None
    method = methods.create(config, phi)
    kernels.set_kernel(config.kernel)
    kernel = kernels.kernel_name(device) if perturbed else None
    torch.set_num_threads(config.threads or available_cores())
    run = Run(config, "meta_test")
    checkpoint = run.dir / "checkpoints" / "latest.pt"

    # Data
    train, test = load_parts(config)
    train_images, test_images = DeviceImages(train, device), DeviceImages(test, device)
    padding = crop_padding(train.image_size)
    key = (config.seed, 0, "order_train")
    everything = torch.arange(len(train)).numpy()
    batches = TrainingBatches(train_images, everything, None, config.batch_size, padding, key, method.augment)

    # Network and optimizer
    seed_torch(config.seed, 0, "init")
    model = models.create(config.model, train.num_classes, train.image_size).to(device)
    origin = None  # of the initial weights, where they are not drawn
    if config.init is not None and not checkpoint.exists():
        weights = finetuning.read_weights(config.init)
        origin = finetuning.initialize(model, train.image_size, weights, config.init_batch_norm)
    seed_torch(config.seed, 0, "method_init")  # what a method adds leaves the network's initial weights as they are
    method.prepare(model, train)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    milestones = [round(share * config.steps) for share in config.lr_milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, config.lr_factor)

    # Resume
    data = [train.fingerprint, test.fingerprint]
    phi_values = torch.nn.utils.parameters_to_vector(phi.parameters()).cpu() if perturbed else torch.empty(0)
    start = 0
    if checkpoint.exists():
        state = load_tensors(checkpoint)
        check_inputs(config, state["data"] == data, torch.equal(state["phi"], phi_values), state["init"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, run.seconds_before, origin = state["step"], state["seconds"], state["init"]
        if perturbed:
            kernels.tell_change(state["kernel"], kernel, str(run.dir))
        print(f"{run.dir}: resuming after step {start}", file=sys.stderr)
    run.rewind(start)
    progress = StepProgress(f"{config.method} on {config.target}", config.steps, start)

    def evaluated(step: int, samples: int) -> dict[str, float]:
        seed_torch(config.seed, 0, "evaluate", step)
        samples = samples if method.stochastic else 1
        with autocast(device, config.precision):
            return evaluate(model, test_images, samples, config.eval_batch_size, progress.within)

    # Training
    recent: list[torch.Tensor] = []  # [loss, accuracy] of the steps since the last look, on the device
    metrics: dict[str, float] = {}
    model.train()
    for step in range(start, config.steps):
        method.set_strength(annealed_strength(step, config.steps, method.ramp))
        seed_torch(config.seed, 0, "theta_step", step)
        x, y = method.batch(*batches.batch(step))
        with autocast(device, config.precision):
            logits = model(x)
            loss = method.loss(logits, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(torch.stack([loss.detach(), accuracy(logits, y)]))

        done = step + 1
        last = done == config.steps
        evaluates = done % config.eval_every == 0 and not last  # the trained network is evaluated below, at length
        saves = done % config.checkpoint_every == 0 or last
        if done % config.log_every == 0 or evaluates or saves:
            values = torch.stack(recent).cpu()  # the only place where the host waits for the device
            recent.clear()
            check_finite(values, done - len(values), config.run_dir)
            mean_loss, mean_accuracy = values.mean(dim=0).tolist()
            line = {"step": done, "train_loss": round(mean_loss, 6), "train_accuracy": round(mean_accuracy, 6)}
            if evaluates:
                try:
                    metrics = evaluated(done, config.eval_samples)
                except NotFinite as error:
                    progress.say(f"step {done}: {error}; not evaluated")  # training may yet bring it back
                    metrics = {}
                line |= logged(metrics)
            run.log({**line, "seconds": round(run.seconds, 2)})
            shown = {"test_accuracy": metrics["accuracy"]} if metrics and not last else {}
            progress.update(done, loss=mean_loss, accuracy=mean_accuracy, **shown)
        if saves:
            check_finite_parameters(model.parameters(), "θ", done, config.run_dir)
            learned = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            given = {"data": data, "phi": phi_values, "kernel": kernel, "init": origin}
            state = {**learned, **given, "schedule": schedule.state_dict(), "step": done, "seconds": run.seconds}
            save_tensors(state, checkpoint)

    # Result
    try:
        metrics = evaluated(config.steps, config.final_samples)
    except NotFinite as error:
        advice = "clip_eval=true" if perturbed and config.clip and not config.clip_eval else "a smaller lr or clip"
        raise Diverged(
            f"{config.run_dir}: after the last step {error}: it has diverged ({advice} may help, in a new run_dir)"
        ) from error
    run.log({"step": config.steps, **logged(metrics), "seconds": round(run.seconds, 2)})
    progress.close()
    plot_convergence(
        {config.method: [read_metrics(run.dir)]}, f"{config.target}, {config.model}", run.dir / "curves.png"
    )
    target = {"name": train.name, "train": len(train), "test": len(test), "fingerprints": data}
    result = {
        "target": target,
        "metrics": metrics,
        "init": origin,
        "sites": [spec.name for spec in method.sites.specs] if perturbed else None,
        "phi_card": phi.card if perturbed else None,
        "phi_digest": phi_digest(phi) if perturbed else None,
        "kernel": kernel,
    }
    result = run.describe(result, device)
    run.finish(result)
    report(result)
    return result


def check_settings(config: MetaTestConfig) -> torch.device:
    """Whatever is wrong with the settings, and with the files they name, is said before data are prepared.

    Returns:
        the device that `config.gpu` names.

    Raises:
        UserError: settings that do not go together, a device or file that is not there, a network that does not run.
    """
    if config.target not in TARGETS:
        raise UserError(f"target: unknown {config.target!r} (known: {', '.join(TARGETS)})")
    spec = TARGETS[config.target]
    if config.eval_split not in (*spec.splits, "holdout"):
        raise UserError(
            f"eval_split: {config.target} has no {config.eval_split} images (eval_split=holdout needs none)"
        )
    perturbed = config.method == "metaperturb"
    if perturbed and config.phi is None:
        raise UserError("phi: method metaperturb needs a file or shipped name of φ (run.sh src makes one)")
    check_ablation(config)
    if config.clip_eval and config.clip is None:
        raise UserError("clip_eval: needs a clip")
    ablated = [key for key in ABLATION if getattr(config, key) != getattr(MetaTestConfig, key)]
    if ablated and not perturbed:
        raise UserError(f"{ablated[0]}: only method metaperturb uses it, this is {config.method}")
    devices = parse_devices(config.gpu, "gpu")
    if len(devices) != 1:
        raise UserError(f"gpu: expected one device, got {config.gpu!r}")
    phi = load_phi(config.phi) if perturbed else None
    if perturbed:
        tell_other_ablation(config, phi.card)
    methods.create(config, phi)
    if unused := methods.unused_settings(config):
        print(f"method {config.method} does not use {', '.join(unused)}", file=sys.stderr)
    if config.init is None and config.init_batch_norm != MetaTestConfig.init_batch_norm:
        print("init_batch_norm does nothing without init", file=sys.stderr)
    if config.eval_split != "holdout" and config.holdout != MetaTestConfig.holdout:
        print("holdout does nothing without eval_split=holdout", file=sys.stderr)
    model, image_size = small_network(config), config.image_size or spec.image_size
    if perturbed:
        find_sites(model, image_size)
    else:
        watch(model, image_size)
    if config.init is not None and not (Path(config.run_dir) / "checkpoints" / "latest.pt").exists():
        weights = finetuning.read_weights(config.init)
        finetuning.initialize(model, image_size, weights, config.init_batch_norm, verbose=False)
    return devices[0]


def small_network(config: MetaTestConfig) -> torch.nn.Module:
    """The network, with two classes: how many the data have is not known without them."""
    return models.create(config.model, 2, config.image_size or TARGETS[config.target].image_size)


def check_unchanged(config: MetaTestConfig, result: dict[str, Any]) -> None:
    """Refuse to answer from a finished run for images, φ or initial weights that it did not see, whatever their files
    are called.

    Raises:
        UserError: they are others now.
    """
    try:
        phi = load_phi(config.phi) if config.method == "metaperturb" else None
        parts = load_parts(dataclasses.replace(config, download=False))
    except UserError as error:
        print(f"{config.run_dir}: not compared with what it saw: {error}", file=sys.stderr)
        return
    same_target = [part.fingerprint for part in parts] == result["target"]["fingerprints"]
    same_phi = phi is None or result.get("phi_digest") in (None, phi_digest(phi))
    check_inputs(config, same_target, same_phi, result.get("init"))


def check_inputs(config: MetaTestConfig, same_target: bool, same_phi: bool, origin: dict[str, Any] | None) -> None:
    """Refuse a run folder that had another target, φ or initial weights; what settings call them tells nothing.

    Args:
        origin: of its initial weights, as `finetuning.initialize` returned it.

    Raises:
        UserError: naming which.
    """
    changed = [] if same_target else ["the target"]
    changed += [] if same_phi else [f"φ in {config.phi}"]
    changed += [] if same_init(config, origin) else [f"the network in {config.init}"]
    if changed:
        raise UserError(f"{config.run_dir}: {changed[0]} changed since this run began; choose another run_dir")


def same_init(config: MetaTestConfig, origin: dict[str, Any] | None) -> bool:
    """Whether `init` still holds what a run began with; true, and said aloud, where it cannot be read any more."""
    if config.init is None or origin is None:
        return True
    image_size = config.image_size or TARGETS[config.target].image_size
    try:
        weights = finetuning.read_weights(config.init)
        given = finetuning.initialize(small_network(config), image_size, weights, config.init_batch_norm, verbose=False)
    except UserError as error:
        print(f"{config.run_dir}: not compared with what it began with: {error}", file=sys.stderr)
        return True
    return given["sha256"] == origin["sha256"]


def logged(metrics: dict[str, float]) -> dict[str, float]:
    """As `metrics.jsonl` has them."""
    return {f"test_{name}": round(value, 6) for name, value in metrics.items()}


def report(result: dict) -> None:
    m, config = result["metrics"], result["config"]
    print(
        f"{config['method']} on {config['target']}, {config['model']}, seed {config['seed']}: "
        f"accuracy {100 * m['accuracy']:.2f} %  NLL {m['nll']:.3f}  ECE {100 * m['ece']:.2f} %  "
        f"({result['target']['test']} {config['eval_split']} images, {m['samples']} sample{'s' * (m['samples'] > 1)})"
    )


if __name__ == "__main__":
    sys.exit(main())
