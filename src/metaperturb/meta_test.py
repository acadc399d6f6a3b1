"""Train a network on a target data set, with a meta-learned φ or another regularizer, and evaluate it (Algorithm 2).

    python -m metaperturb.meta_test --config configs/tgt.yaml --set target=cub phi=runs/src/phi.pt gpu=0
    python -m metaperturb.meta_test --config configs/tgt.yaml --set target=cub method=base gpu=0
    python -m metaperturb.meta_test --config configs/tgt.yaml --set target=cub init=runs/pretrain …     # finetuning

φ is frozen; its strength rises linearly over the first 40 % of the steps. The other regularizers are those of
`metaperturb.methods`. Killed and started again, the run continues from its last checkpoint. The run folder gets
`result.json` (accuracy, NLL and ECE on every test image, or every held-out one; for MetaPerturb as the mean over draws
and in one pass), `metrics.jsonl`, `curves.png` and the checkpoint with the trained network.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from metaperturb import finetuning, identity, kernels, methods, models, training
from metaperturb.cli import Stop, Stopped
from metaperturb.config import MetaTestConfig, run_configured
from metaperturb.data.batches import DeviceImages, TrainingBatches, crop_padding
from metaperturb.data.registry import load_parts
from metaperturb.distributed import make_current
from metaperturb.errors import Diverged, NotFinite
from metaperturb.evaluation import METRICS, evaluate
from metaperturb.modes import eval_mode
from metaperturb.prediction import make_deterministic, make_stochastic
from metaperturb.randomness import seed_torch
from metaperturb.runs import Run, StepProgress, finished_result, read_metrics
from metaperturb.storage import load_tensors, save_tensors
from metaperturb.weights import load_phi, phi_digest

ONE_PASS_SHARE = 0.03  # of the steps of training: so many more, in which one pass learns from the draws


@dataclasses.dataclass
class Epochs:
    """Batches that can be gone through again and again; `epoch(number)` gives those of one time, from 0."""

    epoch: Callable[[int], Iterator[torch.Tensor]]
    number: int = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.number += 1
        return self.epoch(self.number - 1)


def main(argv: list[str] | None = None) -> int:
    return run_configured(meta_test, MetaTestConfig, __doc__, argv)


def meta_test(config: MetaTestConfig) -> dict:
    """One training run on a target; returns the content of `result.json`."""
    identity.check_folder(config, "meta_test")
    if finished := finished_result(config.run_dir):
        identity.check_finished(config, finished)
        print(f"{config.run_dir}: already finished", file=sys.stderr)
        report(finished)
        return finished

    device = identity.check_settings(config)
    make_current(device)
    perturbed = config.method == "metaperturb"
    checkpoint = Path(config.run_dir) / "checkpoints" / "latest.pt"
    with training.restoring(checkpoint):  # a run goes on as it began
        state = dict(load_tensors(checkpoint)) if checkpoint.exists() else None
    threads = (state or {}).get("threads") or config.threads or training.choose_threads()
    torch.set_num_threads(threads)
    precision = (state or {}).get("precision") or training.choose_precision(config.precision, device)
    phi = load_phi(config.phi) if perturbed else None
    method = methods.create(dataclasses.replace(config, precision=precision), phi)
    kernels.set_kernel(config.kernel)
    how = {"kernel": kernels.kernel_name(device) if perturbed else None, "threads": threads, "precision": precision}

    # Data
    train, test = load_parts(config)
    train_images, test_images = DeviceImages(train, device), DeviceImages(test, device)
    padding = crop_padding(train.image_size)
    key = (config.seed, 0, "order_train")
    everything = torch.arange(len(train)).numpy()
    batches = TrainingBatches(train_images, everything, None, config.batch_size, padding, key, method.augment)

    # Network and optimizer
    seed_torch(config.seed, 0, "init")
    model = training.place(models.create(config.model, train.num_classes, train.image_size), device)
    origin = None  # of the initial weights, where they are not drawn
    if config.init is not None and state is None:
        origin = finetuning.initialize(model, train.image_size, config.init, config.init_batch_norm)
    seed_torch(config.seed, 0, "method_init")  # what a method adds leaves the network's initial weights as they are
    method.prepare(model, train)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    milestones = [round(share * config.steps) for share in config.lr_milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, config.lr_factor)

    # Resume
    run = Run(config, "meta_test")  # not before: what fails above leaves no folder
    data = [train.fingerprint, test.fingerprint]
    phi_id = phi_digest(phi) if perturbed else None
    start = 0
    recent: list[torch.Tensor] = []  # [loss, accuracy] of the steps since the last look, on the device
    if state is not None:
        with training.restoring(checkpoint):
            identity.check_resumed(config, state, data, phi_id)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            start, run.seconds_before, origin = state["step"], state["seconds"], state["init"]
            recent = [values.to(device) for values in state["recent"]]
            if perturbed:
                kernels.tell_change(state["kernel"], how["kernel"], str(run.dir))
        print(f"{run.dir}: resuming after step {start}", file=sys.stderr)
    run.rewind(start)
    progress = StepProgress(f"{config.method} on {identity.data_name(config)}", config.steps, start)

    metrics: dict[str, float] = {}
    draws = perturbed and config.noise
    once = draws and config.eval == "one_pass"

    def tell(share: float) -> None:
        progress.within(share)
        if stop.number:
            raise Stopped(stop.number, f"saved after step {config.steps} of {config.steps}")

    def evaluated(step: int, samples: int) -> dict[str, float]:
        seed_torch(config.seed, 0, "evaluate", step)
        samples = samples if method.stochastic else 1
        with training.autocast(device, precision):
            return evaluate(model, test_images, samples, config.eval_batch_size, tell)

    def evaluated_in_one_pass(steps: int, **how: int) -> dict[str, float]:
        """The network is deterministic for the time of it; `steps` and `how` as `make_deterministic` takes them."""
        key, count = (config.seed, 0, "one_pass"), max(1, len(train) // config.batch_size)
        size = min(len(train), config.batch_size)
        stream = TrainingBatches(train_images, everything, None, size, padding, key, method.augment)

        def epoch(number: int) -> Iterator[torch.Tensor]:
            """The training images once, augmented as in training."""
            for step in range(number * count, (number + 1) * count):
                tell(min(1.0, step / (count + steps)))
                seed_torch(*key, step)
                yield stream.batch(step)[0]

        with eval_mode(model), training.autocast(device, precision):
            make_deterministic(model, Epochs(epoch), steps, lr=config.lr, **how)
            try:
                return evaluate(model, test_images, 1, config.eval_batch_size, tell)
            finally:
                make_stochastic(model)

    def save(done: int) -> None:
        training.check_finite("a parameter", {f"θ, step {done}": model.parameters()}, config.run_dir)
        learned = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        given = {"data": data, "phi": phi_id, "init": origin}
        save_tensors({**learned, **given, **how, "recent": recent, "step": done, "seconds": run.seconds}, checkpoint)

    def look(done: int) -> None:
        """What is due after `done` steps: metrics, evaluation, checkpoint."""
        nonlocal metrics
        last = done == config.steps
        evaluates = done % config.eval_every == 0 and not last  # the trained network is evaluated below, at length
        saves = done % config.checkpoint_every == 0 or last
        if done % config.log_every == 0 or evaluates or saves:
            values = torch.stack(recent).cpu()  # the only place where the host waits for the device
            steps = {f"step {done - len(values) + i}": [row] for i, row in enumerate(values, 1)}
            training.check_finite("the loss or a gradient", steps, config.run_dir)
            mean_loss, mean_accuracy = values.mean(dim=0).tolist()
            line = {"step": done, "train_loss": round(mean_loss, 6), "train_accuracy": round(mean_accuracy, 6)}
            if evaluates:
                try:
                    metrics = evaluated_in_one_pass(0, fitted=128) if once else evaluated(done, config.eval_samples)
                except NotFinite as error:
                    progress.say(f"step {done}: {error}; not evaluated")  # training may yet bring it back
                    metrics = {}
                line |= logged(metrics)
            recent.clear()
            run.log({**line, "seconds": round(run.seconds, 2)})
            shown = {"test_accuracy": metrics["accuracy"]} if metrics and not last else {}
            progress.update(done, loss=mean_loss, accuracy=mean_accuracy, **shown)
        if saves:
            save(done)

    # Training
    model.train()
    with Stop() as stop:
        for step in range(start, config.steps + 1):
            try:
                if stop.number and step < config.steps:
                    raise Stopped(stop.number)
                if recent:  # of the step before, or of that behind which a run was stopped before it looked
                    look(step)
            except Stopped as stopped:
                save(step)
                raise Stopped(stopped.number, f"saved after step {step} of {config.steps}") from None
            if step == config.steps:
                break
            method.set_strength(training.annealed_strength(step, config.steps, method.ramp))
            seed_torch(config.seed, 0, "theta_step", step)
            x, y = method.batch(*batches.batch(step))
            with training.autocast(device, precision):
                logits = model(x)
                loss = method.loss(logits, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            recent.append(torch.stack([loss.detach(), training.accuracy(logits, y)]))

        # Result
        try:
            metrics = evaluated(config.steps, config.final_samples)
        except NotFinite as error:
            advice = "clip_eval=true" if perturbed and config.clip and not config.clip_eval else "a smaller lr or clip"
            raise Diverged(
                f"{config.run_dir}: after the last step {error}: it has diverged ({advice} may help, in a new run_dir)"
            ) from error
        try:
            one_pass = evaluated_in_one_pass(round(ONE_PASS_SHARE * config.steps)) if draws else {}
        except NotFinite as error:
            progress.say(f"not evaluated in one pass: {error}")
            one_pass = {}
    run.log({"step": config.steps, **logged(metrics), "seconds": round(run.seconds, 2)})
    progress.close()
    from metaperturb.plots import plot_convergence  # matplotlib: not before there is something to draw

    title = f"{identity.data_name(config)}, {config.model}"
    plot_convergence({config.method: [read_metrics(run.dir)]}, title, run.dir / "curves.png")
    target = {"name": train.name, "train": len(train), "test": len(test), "fingerprints": data}
    result = {
        "target": target,
        "metrics": metrics,
        "init": origin,
        "sites": [spec.name for spec in method.sites.specs] if perturbed else None,
        "phi_card": phi.card if perturbed else None,
        "phi_digest": phi_id,
        **how,
        **({"one_pass": {name: one_pass[name] for name in METRICS}} if one_pass else {}),
    }
    result = run.describe(result, device)
    run.finish(result)
    report(result)
    return result


def logged(metrics: dict[str, float]) -> dict[str, float]:
    """As `metrics.jsonl` has them."""
    return {f"test_{name}": round(value, 6) for name, value in metrics.items()}


def report(result: dict) -> None:
    config, samples = result["config"], result["metrics"]["samples"]
    print(
        f"{config['method']} on {identity.data_name(config)}, {config['model']}, seed {config['seed']}: "
        f"{shown(result['metrics'])}  "
        f"({result['target']['test']} {config['eval_split']} images, {samples} sample{'s' * (samples > 1)})"
    )
    if one_pass := result.get("one_pass"):
        print(f"in one pass: {shown(one_pass)}")


def shown(metrics: dict[str, float]) -> str:
    accuracy, nll, ece = (metrics[name] for name in METRICS)
    return f"accuracy {100 * accuracy:.2f} %  NLL {nll:.3f}  ECE {100 * ece:.2f} %"


if __name__ == "__main__":
    sys.exit(main())
