"""What is chosen by validation images, as the paper did (section 4.1), and the φ that goes into the package."""

import argparse
import itertools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from metaperturb.cli import argument_parser
from metaperturb.errors import UserError
from metaperturb.identity import data_name, differences
from metaperturb.perturbation import MetaPerturb
from metaperturb.storage import save_json, write_atomically
from metaperturb.weights import SHIPPED, load_phi, phi_digest, save_phi
from tables.grid import config_of
from tables.page import listed
from tables.results import Entry, Results, shortened
from tables.trainings import grid_parser, read_grid, run_grid

Found = dict[str, dict[str, Any]]  # row → mean and deviation of accuracy, or how many seeds diverged
TUNE = """Choose the regularizers' hyperparameters on held-out training images, as the paper did for its baselines.

    ./run.sh tune                                   # all values of configs/tune.yaml on every data set of table 1
    ./run.sh tune --preset quick --columns CUB

Test images are never opened. Of each method the values with the best mean accuracy over seeds are written to
results/tune/<preset>.json, which `./run.sh table1 --tuned` takes, with what all the others reached.
"""
SELECT = """Choose the best of several meta-trained φ on validation images, as the paper did (section 4.1).

    SEED="0 1 2 3 4" ./run.sh src       # five meta-trainings
    ./run.sh select                     # of all finished ones in runs/; or name them: ./run.sh select runs/src-…
    ./run.sh select --report            # no training, no choice: the page of the choice that was made

Each φ trains networks on s-CIFAR100, which are evaluated on images of CIFAR-100 that are in neither its training nor
its test set. The φ with the best mean accuracy is copied to --out, its card extended by the evidence.
"""
SHIP = """Put a meta-trained φ into the package.

    ./run.sh ship tiny_imagenet_resnet20 runs/selected/phi.pt     # into src/metaperturb/shipped
    ./run.sh ship tiny_imagenet_resnet20                          # its page again: what its card says, to people
"""
# What the card of a φ must say of the meta-training, if it is to be shipped.
NEEDED = ("config", "source", "metrics", "versions", "hardware", "commit", "seconds")


def select_parser() -> argparse.ArgumentParser:
    parser = grid_parser(SELECT, "select.yaml")
    parser.add_argument("sources", type=Path, nargs="*", help="run folders of meta-trainings [runs/src-*]")
    parser.add_argument("--out", type=Path, help="where the chosen φ goes [<runs>/selected/phi.pt]")
    return parser


def ship_parser() -> argparse.ArgumentParser:
    parser = argument_parser(SHIP)
    parser.add_argument("name", help="what load_phi will know it by")
    parser.add_argument("phi", type=Path, nargs="?", help="phi.pt of a meta-training or of ./run.sh select")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the shipped φ")
    return parser


def choose(results: Results, column: str, groups: Mapping[str, Iterable[str]]) -> tuple[dict[str, str], Found]:
    """Group → its row of the best mean accuracy, the first of equally good ones, and the accuracy of all their rows.

    A row of which a training diverged is not chosen. Refused while trainings are missing.
    """
    found: Found = {}
    for row in itertools.chain(*groups.values()):
        entry = Entry(results, row, column)
        mean, std, n = entry.metrics["accuracy"]
        found[row] = {"diverged": entry.diverged} if entry.diverged else {"mean": mean, "std": std, "seeds": n}
    seeds = len(results.grid.seeds)
    if missing := sum(one.get("seeds", seeds) < seeds for one in found.values()):
        raise UserError(f"{column}: {missing} of {len(found)} candidates have not run yet: nothing chosen")
    tried = {group: [row for row in of if "mean" in found[row]] for group, of in groups.items()}
    return {group: max(of, key=lambda row: found[row]["mean"]) for group, of in tried.items() if of}, found


# --- hyperparameters


def tune(arguments: argparse.Namespace) -> None:
    grid = read_grid(arguments)
    if wrong := [cell.row for cell in grid.cells() if cell.config.eval_split != "holdout"]:
        raise UserError(f"{grid.path}: {wrong[0]}: eval_split must be holdout, so that tuning sees no test image")
    if not (page := run_grid(grid, arguments)):
        return
    results, chosen, accuracy = Results(grid, page.with_suffix("")), {}, {}
    methods: dict[str, list[str]] = {}
    for row, settings in grid.rows.items():
        methods.setdefault(settings["method"], []).append(row)
    for column in grid.columns:
        try:
            best, accuracy[column] = choose(results, column, methods)
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        chosen[column] = {}
        for method in methods:
            said = "all candidates diverged, nothing chosen"
            if method in best:
                settings = {key: value for key, value in grid.rows[best[method]].items() if key != "method"}
                chosen[column][method], said = settings, listed(settings) or "nothing to choose"
                for key, value in settings.items():
                    tried = [*dict.fromkeys(str(grid.rows[row][key]) for row in methods[method])]
                    if len(tried) > 2 and str(value) in (tried[0], tried[-1]):
                        said += f" ({key}: an end of those tried; the best may lie beyond)"
            print(f"{column}: {method}: {said}")
    if not chosen:
        raise UserError("nothing was chosen: no column has all its candidates yet")
    save_json({"chosen": chosen, "accuracy": accuracy}, page.with_suffix(".json"))
    print(f"chosen: {page.with_suffix('.json')}   all values: {page}", file=sys.stderr)


# --- the best of several φ


def select(arguments: argparse.Namespace) -> None:
    grid = read_grid(arguments)
    if arguments.report and not arguments.sources:
        print(f"{run_grid(grid, arguments)}: of the choice that is recorded", file=sys.stderr)
        return
    sources = find_sources(arguments)
    phis = {name: load_phi(path) for name, path in sources.items()}
    changed = other_settings(phis)
    print(*changed, sep="\n", end="\n" * bool(changed), file=sys.stderr)
    if changed and not arguments.sources:
        raise UserError("these runs are no repetitions of one meta-training (above); name those to choose from")
    for name, path in sources.items():  # by its digest: whichever come before it, its cells keep their names
        grid.add_row(name, f"phi_{phi_digest(phis[name]):.8}", path)
    config = grid.cells()[0].config
    if any(cell.config.eval_split == "test" for cell in grid.cells()):
        raise UserError(f"{grid.path}: eval_split must not be test: choosing on test images is cheating")
    if not (page := run_grid(grid, arguments)):
        return
    of_all, accuracy = choose(Results(grid, page.with_suffix("")), next(iter(grid.columns)), {"φ": sources})
    if not (best := of_all.get("φ")):
        raise UserError("with each φ some trainings diverged; nothing was chosen")
    seeds = ", ".join(map(str, grid.seeds))
    of = f"{data_name(config)}, {config.eval_split} images, {config.model}, {config.steps} steps, seeds {seeds}"
    selection = {"chosen": best, "evaluated": of, "accuracy": accuracy}
    save_json(selection, page.with_suffix(".json"))
    out = arguments.out or arguments.runs / "selected" / "phi.pt"
    save_phi(phis[best], out, {**phis[best].card, "selection": selection})
    for name, one in accuracy.items():
        text = f"{one['mean']:.2f} % over {one['seeds']} seeds" if "mean" in one else f"{one['diverged']} diverged"
        print(f"{'*' if name == best else ' '} {name}: {text}")
    print(f"chosen: {out}   evidence: {page}", file=sys.stderr)


def find_sources(arguments: argparse.Namespace) -> dict[str, Path]:
    """Name of a meta-training → its φ: of two or more that are finished and have names of their own."""
    folders = arguments.sources or [path for path in sorted(arguments.runs.glob("src-*")) if (path / "phi.pt").exists()]
    if len(folders) < 2:
        raise UserError(f'needs two or more finished meta-trainings, found {len(folders)} (SEED="0 1 …" ./run.sh src)')
    if no_run := [folder for folder in folders if not (folder / "phi.pt").is_file()]:
        raise UserError(f"{no_run[0]}: no folder of a finished meta-training (it holds no phi.pt)")
    sources = {folder.name: folder / "phi.pt" for folder in sorted(folder.absolute() for folder in folders)}
    if len(sources) < len(folders):
        raise UserError("two of the runs have the same folder name, by which the result would call both")
    return sources


def other_settings(phis: Mapping[str, MetaPerturb]) -> list[str]:
    """What the runs differ in, beside their seed, a line each: a choice among other settings is tuning."""
    made = {name: config_of("meta_train", phi.card) for name, phi in phis.items()}
    lines = [f"{name}: nothing is recorded of its settings" for name, config in made.items() if config is None]
    images = {name: (phi.card.get("source") or {}).get("fingerprint") for name, phi in phis.items()}
    first, *others = [name for name, config in made.items() if config is not None] or [""]
    for name in others:
        changed = differences(vars(made[first]), made[name], without=["seed"])
        if changed := changed + ["other images"] * (images[name] != images[first]):
            lines.append(f"{name} differs from {first} in more than the seed: {'; '.join(changed)}")
    return lines


# --- φ in the package


def ship(arguments: argparse.Namespace) -> None:
    name, source, out = arguments.name, arguments.phi, arguments.out
    if not name.isidentifier():
        raise UserError(f"{name}: a name has letters, digits and underscores only, and does not begin with a digit")
    path = out / f"{name}.pt"
    if source is None and not path.exists():
        raise UserError(f"{path}: no such φ yet; name the file to ship")
    phi = load_phi(source or path)
    if missing := [key for key in NEEDED if not phi.card.get(key)]:
        raise UserError(f"{source or path}: its card does not say how it was meta-trained: no {', '.join(missing)}")
    text = describe(name, phi.card)
    if source is not None:
        save_phi(phi, path, shortened(phi.card))
    write_atomically(path.with_suffix(".md"), lambda file: file.write(text.encode()))
    print(f"{path}: shipped, described in {path.with_suffix('.md')}", file=sys.stderr)


def describe(name: str, card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    config, source, metrics, versions, machine = (card[key] for key in NEEDED[:5])
    sizes = config["image_size"] if isinstance(config["image_size"], list) else [config["image_size"]]
    facts = {
        "source": f"{source['name']}: {source['images']:,} images of {source['classes']} classes at "
        f"{' and '.join(f'{size}×{size}' for size in sizes)} pixels (fingerprint `{source['fingerprint'][:12]}`)",
        "class split": f"{config['split']}, {config['tasks']} tasks, seed {card.get('split_seed', config['seed'])}",
        "meta-training": f"{config['model']}, {'scale-free noise, ' * config.get('scale_free', False)}"
        f"{config['steps']} steps, batches of {config['batch_size']}, Adam {config['lr']:g}, "
        f"weight decay {config['weight_decay']:g}, {config['precision']}, annealing {config['anneal']:g}",
        "at its end": f"loss {metrics['train_loss']:.3f} on D_tr, {metrics['test_loss']:.3f} on D_te",
        "made by": f"commit `{card['commit']}`, torch {versions['torch']}, {machine['device']} "
        f"({machine['cpu']}), {card['seconds']:.0f} s",
    }
    if selection := card.get("selection"):
        ranked = sorted(selection["accuracy"].items(), key=lambda item: -item[1].get("mean", -1.0))
        found = ", ".join(
            f"{run} {one['mean']:.2f} % ({one['seeds']})" if "mean" in one else f"{run} diverged" for run, one in ranked
        )
        best = f"{selection['chosen']}, the best of {len(ranked)} meta-trainings by accuracy (seeds)"
        facts["selection"] = f"{best} on {selection['evaluated']}: {found}"
    facts["tested"] = "the tables under [results](../../../results/README.md)"
    lines = [f"# φ `{name}`", "", f'`metaperturb.load_phi("{name}")`. Made by `./run.sh ship`.', ""]
    return "\n".join([*lines, *(f"- **{what}**: {text}" for what, text in facts.items())]) + "\n"
