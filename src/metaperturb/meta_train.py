"""Meta-train φ jointly over T tasks (section 3.3, Algorithm 1).

    python -m metaperturb.meta_train --config configs/src.yaml                    # the paper's settings
    python -m metaperturb.meta_train --config configs/src.yaml --set gpus=0,1     # one process a GPU
    torchrun --nproc-per-node 8 -m metaperturb.meta_train --config configs/src.yaml   # one or many machines (which
                                                                                      # then share run_dir)

Each task owns a network θ_t, which learns on the task's D_tr with φ constant; φ learns on the D_te of all tasks with
every θ_t constant. Only φ's gradient crosses processes. Killed and started again, it continues from the last
checkpoint, with any number of processes; on CPUs the result is the same to the bit.

The run folder gets `phi.pt` (the result: `metaperturb.load_phi`), `metrics.jsonl`, `result.json`, `curves.png`.
"""

import dataclasses
import functools
import hashlib
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metaperturb import identity, kernels, models, training
from metaperturb.attach import attach
from metaperturb.cli import Stop, Stopped
from metaperturb.config import MetaTrainConfig, run_configured
from metaperturb.data import ImageArrays
from metaperturb.data.batches import DeviceImages, TrainingBatches, crop_padding
from metaperturb.data.registry import load_source_images
from metaperturb.data.splits import TaskSplit, class_split, load_split, save_split
from metaperturb.distributed import Group, choose_devices, launch
from metaperturb.errors import UserError
from metaperturb.modes import batch_norms, set_mode
from metaperturb.perturbation import MetaPerturb
from metaperturb.randomness import seed_torch
from metaperturb.runs import Run, StepProgress, finished_result, read_metrics
from metaperturb.storage import load_json, load_tensors, save_json, save_tensors
from metaperturb.weights import save_phi

MOMENTUM = 0.1  # of batch norm's running statistics, at least
METRICS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")  # a task's, beside φ's gradient in its row


def main(argv: list[str] | None = None) -> int:
    return run_configured(meta_train, MetaTrainConfig, __doc__, argv)


def meta_train(config: MetaTrainConfig) -> None:
    """One meta-training run in as many processes as `config.gpus` lists."""
    identity.check_folder(config, "meta_train")
    if finished_result(config.run_dir):
        check_kept(config, config.steps)
        try:  # not to answer for images or a split that the run did not see
            (source, *_), splits, _ = load_tasks(dataclasses.replace(config, download=False))
        except UserError as error:
            raise identity.unanswered(config.run_dir, "phi.pt", error) from error
        read_latest(config.run_dir, data_digest(source, splits))
        print(f"{config.run_dir}: already finished, φ is in {config.run_dir}/phi.pt", file=sys.stderr)
        return
    # Whatever is wrong is said now, the quick checks first, before any process starts.
    training.check_ablation(config)
    devices = choose_devices(config.gpus, config.tasks)
    if config.tasks < (least := len(config.model.split(",")) * len(config.image_sizes)):
        raise UserError(f"tasks: each network needs one at each image size, together {least}, got {config.tasks}")
    first = os.environ.get("RANK", "0") == "0"
    for name, size in dict.fromkeys(config.networks):
        model = models.create(name, num_classes=2, image_size=size)
        attach(model, MetaPerturb(), size, config.sites, paper=True, verbose=first)
        if (slowest := quicken(batch_norms(model))) < MOMENTUM and first:
            print(f"{name}: momentum of batch norm raised from {slowest:g} to {MOMENTUM}", file=sys.stderr)
    kernels.set_kernel(config.kernel)
    if devices[0].type == "cpu":
        kernels.kernel_name("cpu")  # built once, before the processes that will use it
    if late := [step for step in config.keep_phi if step >= config.steps]:
        raise UserError(f"keep_phi: step {late[0]} is not before the last, {config.steps}")
    if config.keep_phi and config.anneal > 0:
        raise UserError("keep_phi: with annealing, φ on the way is not the φ of a shorter run")
    load_tasks(config)
    launch(functools.partial(work, config=config), devices, timedelta(seconds=config.timeout))


def check_kept(config: MetaTrainConfig, done: int) -> None:
    """Refuse to keep a φ that a run has passed without keeping it."""
    for step in config.keep_phi:
        if step <= done and not kept_phi(config.run_dir, step).exists():
            raise UserError(f"keep_phi: {config.run_dir} is past step {step}, its φ is gone; choose another run_dir")


def kept_phi(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / f"phi-{step:06}.pt"


def load_tasks(config: MetaTrainConfig) -> tuple[list[ImageArrays], list[TaskSplit], int]:
    """The source in each image size, its split into tasks and the seed of that, the same in every process."""
    sources = [load_source_images(config, size) for size in config.image_sizes]
    source = sources[0]
    if config.split_file:
        splits, kind, seed = load_split(config.split_file, source.fingerprint, source.labels)
        for name, found, asked in (("tasks", len(splits), config.tasks), ("split", kind, config.split)):
            if found != asked:
                raise UserError(f"{config.split_file}: has {name}={found}, the settings ask for {name}={asked}")
    else:
        splits, seed = class_split(source.labels, config.tasks, config.split, config.seed), config.seed
    if any(len(split.classes) < 2 for split in splits):
        count = len(np.unique(source.labels))
        raise UserError(f"tasks {config.tasks}: some get one class only, of the {count} there are")
    return sources, splits, seed


def data_digest(source: ImageArrays, splits: list[TaskSplit]) -> str:
    """Identifies what a run learns from: the images and which task sees which."""
    digest = hashlib.sha256(source.fingerprint.encode())
    for split in splits:
        for part in (split.classes, split.train, split.test):
            digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
    return digest.hexdigest()


def read_latest(run_dir: str, data: str) -> dict[str, Any]:
    """Step, data, kernel and precision of the latest checkpoint, if there is one; a `UserError` if of other data.

    A checkpoint is a folder `step-000050/` with a file a task, so that a run goes on with another number of
    processes, and one for φ. It counts once `latest.json` names it, when all its files are on disk.
    """
    path = Path(run_dir) / "checkpoints" / "latest.json"
    if not path.exists():
        return {}
    with training.restoring(path):
        latest = load_json(path)
        if latest["data"] != data:
            raise UserError(f"{run_dir}: the source or its split changed since this run began; choose another run_dir")
    return latest


def quicken(norms: list[torch.nn.Module]) -> float:
    """Raise the momentum of batch norms to 0.1 and return the lowest that there was.

    φ learns with the running statistics of θ, from the first step. At 0.01, as in torchvision's MobileNetV3, they stay
    near their initial values for hundreds of steps, all images have the same logits, and φ learns nothing.
    """
    slowest = MOMENTUM
    for norm in norms:
        if norm.momentum is not None:
            slowest, norm.momentum = min(slowest, norm.momentum), max(MOMENTUM, norm.momentum)
    return slowest


class Task:
    """One task t: its data, in the size that its network takes, this network θ_t with φ attached, and its optimizer."""

    def __init__(
        self, index: int, split: TaskSplit, images: DeviceImages, phi: MetaPerturb, config: MetaTrainConfig
    ) -> None:
        self.index, self.phi, self.config, self.device = index, phi, config, images.device
        name, image_size = config.networks[index]

        def batches(indices, purpose: str) -> TrainingBatches:
            key = (config.seed, index, purpose)
            return TrainingBatches(images, indices, split.classes, config.batch_size, crop_padding(image_size), key)

        self.train_batches = batches(split.train, "order_train")
        self.test_batches = batches(split.test, "order_test")
        seed_torch(config.seed, index, "init")
        model = training.place(models.create(name, len(split.classes), image_size), images.device)
        ablation = {key: getattr(config, key) for key in training.ABLATION}
        self.model = attach(model, phi, image_size, **ablation, clip=config.clip, paper=True, verbose=False).train()
        self.batch_norms = batch_norms(self.model)
        quicken(self.batch_norms)
        self.autocast = training.autocast(images.device, config.precision)
        self.theta = list(self.model.parameters())  # φ is not among them
        self.optimizer = torch.optim.Adam(self.theta, lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def loss(self, model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy, on the device."""
        x, y = batch
        with self.autocast:
            logits = model(x)
            return F.cross_entropy(logits, y), training.accuracy(logits, y)

    def theta_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One step of θ on D_tr with φ constant (lines 8-9): loss and accuracy."""
        seed_torch(self.config.seed, self.index, "theta_step", step)
        set_mode(self.batch_norms, training=True)
        self.phi.requires_grad_(False)
        loss, accuracy = self.loss(self.model, self.train_batches.batch(step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.phi.requires_grad_(True)
        return loss.detach(), accuracy

    def phi_gradient(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the loss on D_te with respect to φ, θ constant (line 10): `[82]`, loss, accuracy."""
        seed_torch(self.config.seed, self.index, "phi_step", step)
        set_mode(self.batch_norms, training=False)
        for parameter in self.theta:
            parameter.requires_grad_(False)
        loss, accuracy = self.loss(self.model, self.test_batches.batch(step))
        gradient = gradient_of(loss, self.phi)
        for parameter in self.theta:
            parameter.requires_grad_(True)
        return gradient, loss.detach(), accuracy

    def lookahead_gradient(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same at θ − η ∇θ L_tr(θ, φ), differentiated through that step (Ren et al. 2018; plain SGD, no decay)."""
        seed_torch(self.config.seed, self.index, "phi_step", step)
        theta = dict(self.model.named_parameters())
        train, test = self.train_batches.batch(step), self.test_batches.batch(step)

        def at(parameters: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
            # On copies of the buffers: the step is only looked at, so it leaves no trace in the running statistics.
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            return lambda x: torch.func.functional_call(self.model, (parameters, buffers), x)

        set_mode(self.batch_norms, training=True)
        inner, _ = self.loss(at(theta), train)
        gradients = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
        steps = zip(theta.items(), gradients, strict=True)
        ahead = {name: parameter - self.config.lookahead * gradient for (name, parameter), gradient in steps}
        set_mode(self.batch_norms, training=False)
        loss, accuracy = self.loss(at(ahead), test)
        return gradient_of(loss, self.phi), loss.detach(), accuracy


def work(group: Group, config: MetaTrainConfig) -> None:
    """What one process does."""
    torch.set_num_threads(config.threads)
    second = config.lookahead and group.device.type == "cuda"  # derivatives, which compiled sites have not
    if second and config.kernel == "fused":
        raise UserError("kernel: fused sites of a GPU lack the second derivatives that lookahead needs; leave it out")
    kernels.set_kernel("plain" if second else config.kernel)
    if group.rank:  # the first process says it for all
        warnings.filterwarnings("ignore", "the perturbation runs in plain")

    # Data, φ and the tasks of this process
    sources, splits, split_seed = load_tasks(config)
    source, images = sources[0], {s.image_size: DeviceImages(s, group.device) for s in sources}
    data = data_digest(source, splits)
    precision = read_latest(config.run_dir, data).get("precision")  # a run goes on as it began
    precision = precision or group.of_first(training.choose_precision, config.precision, group.device)
    how = {"kernel": kernels.kernel_name(group.device), "precision": precision}
    seed_torch(config.seed, 0, "phi")
    phi = MetaPerturb(config.scale_free).to(group.device)
    phi_lr = config.lr if config.phi_lr is None else config.phi_lr
    phi_optimizer = torch.optim.Adam(phi.parameters(), lr=phi_lr, weight_decay=config.weight_decay, fused=True)
    computed = dataclasses.replace(config, precision=precision)
    own = range(group.rank, config.tasks, group.size)
    tasks = [Task(t, splits[t], images[config.networks[t][1]], phi, computed) for t in own]

    # Resume
    run = Run(config, "meta_train") if group.rank == 0 else None
    latest = read_latest(config.run_dir, data)  # anew: whoever held the folder until now may have saved
    checkpoints = Path(config.run_dir) / "checkpoints"
    start, recent = 0, []  # recent: tables that are not logged yet
    if latest:
        with training.restoring(checkpoints / "latest.json"):
            start = latest["step"]
            folder = checkpoints / f"step-{start:06}"
            for task in tasks:
                state = load_tensors(folder / f"task-{task.index:02}.pt")
                task.model.load_state_dict(state["model"])
                task.optimizer.load_state_dict(state["optimizer"])
            shared = load_tensors(folder / "phi.pt")
            phi.load_state_dict(shared["phi"])
            phi_optimizer.load_state_dict(shared["optimizer"])
            recent = [table.to(group.device) for table in shared["recent"]]
    check_kept(config, start)
    if run is not None:
        if latest:
            run.seconds_before = shared["seconds"]
            kernels.tell_change(latest["kernel"], how["kernel"], config.run_dir)
            print(f"{run.dir}: resuming after step {start}", file=sys.stderr)
        run.rewind(start)
        save_split(run.dir / "split.json", splits, source.fingerprint, config.split, split_seed)
        progress = StepProgress("meta-train", config.steps, start)

    def save(done: int) -> None:
        parameters = {f"task {task.index}, step {done}": task.theta for task in tasks}
        training.check_finite("a parameter", {f"φ, step {done}": [phi.flat], **parameters}, config.run_dir)
        folder = checkpoints / f"step-{done:06}"
        for task in tasks:
            state = {"model": task.model.state_dict(), "optimizer": task.optimizer.state_dict()}
            save_tensors(state, folder / f"task-{task.index:02}.pt")
        if run is not None:
            shared = {"phi": phi.state_dict(), "optimizer": phi_optimizer.state_dict()}
            save_tensors({**shared, "recent": recent, "seconds": run.seconds}, folder / "phi.pt")
        group.barrier()
        if run is not None:
            save_json({"step": done, "data": data, **how}, checkpoints / "latest.json")
            for old in checkpoints.glob("step-*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)

    def card(done: int) -> dict[str, Any]:
        """How φ came about, after the first `done` steps."""
        history = read_metrics(run.dir)
        made_from = {"name": source.name, "images": len(source), "fingerprint": source.fingerprint}
        content = {
            "source": {**made_from, "classes": len(np.unique(source.labels))},
            "split_seed": split_seed,
            "processes": group.size,
            "metrics": {name: history[-1][name] for name in METRICS} if history else None,
        }
        content = run.describe({**content, **how}, group.device)
        return {**content, "config": {**content["config"], "steps": done}}

    # Joint meta-training
    with Stop(tell=group.rank == 0) as stop:
        for step in range(start, config.steps):
            strength = training.annealed_strength(step, config.steps, config.anneal)
            for task in tasks:
                task.model.metaperturb.strength = strength
            table, stopping = joint_step(step, tasks, phi, phi_optimizer, group, config, bool(stop.number))
            recent.append(table)

            done = step + 1
            last = done == config.steps
            kept = done in config.keep_phi
            saves = done % config.checkpoint_every == 0 or kept or last  # a kept φ belongs to a run that is on record
            looks = done % config.log_every == 0 or saves
            stops = (group.on_host or looks) and stopping.item() and not last
            if looks or stops:
                tables = torch.stack(recent).cpu()  # the host waits for the device only here (and with gloo)
                steps = range(done - len(tables) + 1, done + 1)
                where = [f"task {task}, step {step}" for step in steps for task in range(config.tasks)]
                rows = dict(zip(where, tables.flatten(0, 1).split(1), strict=True))
                training.check_finite("the loss or a gradient", rows, config.run_dir)
            if looks:
                recent.clear()
                if run is not None:
                    metrics = summarize(tables)
                    norms = {name: round(p.norm().item(), 5) for name, p in phi.tensors()._asdict().items()}
                    seconds = round(run.seconds, 2)
                    run.log({"step": done, **metrics, "phi_norms": norms, "strength": strength, "seconds": seconds})
                    progress.update(done, loss=metrics["test_loss"], accuracy=metrics["test_accuracy"])
            if kept and run is not None:
                save_phi(phi, kept_phi(run.dir, done), card=card(done))
            if saves or stops:
                save(done)
            if stops:
                raise Stopped(stop.number or signal.SIGTERM, f"saved after step {done} of {config.steps}")

    # Result: the picture of the curves, φ with its card, `result.json`
    if run is None:
        return
    progress.close()
    if config.steps:
        from metaperturb.plots import plot_learning  # matplotlib: not before there is something to draw

        title = f"{source.name}, {config.model}"
        plot_learning({"MetaPerturb": [read_metrics(run.dir)]}, title, run.dir / "curves.png")
    content = card(config.steps)
    save_phi(phi, run.dir / "phi.pt", card=content)
    run.finish(content)
    print(f"φ: {run.dir / 'phi.pt'}  ({config.steps} steps, {run.seconds:.0f} s)")


def joint_step(
    step: int,
    tasks: list[Task],
    phi: MetaPerturb,
    phi_optimizer: torch.optim.Optimizer,
    group: Group,
    config: MetaTrainConfig,
    stopping: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of every θ_t and of φ (lines 6-12); `stopping`: whether this process was asked to stop.

    Returns:
        what all tasks reported, `[T, 82 + metrics]`, and whether any process was asked to stop, on the device.
    """
    rows = []
    for task in tasks:
        if config.lookahead is None:
            train_loss, train_accuracy = task.theta_step(step)
            gradient, test_loss, test_accuracy = task.phi_gradient(step)
        else:  # looks from where θ is, so before θ moves
            gradient, test_loss, test_accuracy = task.lookahead_gradient(step)
            train_loss, train_accuracy = task.theta_step(step)
        asked = torch.full_like(test_loss, stopping)
        rows.append(torch.cat([gradient, torch.stack([train_loss, test_loss, train_accuracy, test_accuracy, asked])]))
    table = group.gather_rows(torch.stack(rows), config.tasks)
    table, stopping = table[:, :-1], table[:, -1].any()
    phi.flat.grad = table[:, : -len(METRICS)].mean(dim=0)
    phi_optimizer.step()
    return table, stopping


def gradient_of(loss: Tensor, phi: MetaPerturb) -> Tensor:
    """dloss/dφ: `[82]`. Parameters that an ablation leaves without use have gradient 0."""
    return torch.autograd.grad(loss, phi.flat, allow_unused=True, materialize_grads=True)[0]


def summarize(tables: Tensor) -> dict:
    """Metrics of some steps `[steps, T, 82 + 4]`: means over steps, overall and a task."""
    values = tables[:, :, -len(METRICS) :].mean(dim=0)  # [T, 4]
    overall = {name: round(v, 6) for name, v in zip(METRICS, values.mean(dim=0).tolist(), strict=True)}
    gradient_norm = tables[:, :, : -len(METRICS)].mean(dim=1).norm(dim=1).mean().item()
    by_task = {f"{name}_by_task": [round(v, 4) for v in values[:, i].tolist()] for i, name in enumerate(METRICS[:2])}
    return {**overall, "phi_gradient_norm": round(gradient_norm, 6), **by_task}


if __name__ == "__main__":
    sys.exit(main())
