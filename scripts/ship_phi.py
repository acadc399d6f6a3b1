"""Put a meta-trained φ into the package, and write down what it was tested on.

    python scripts/ship_phi.py tiny_imagenet_resnet20 runs/selected/phi.pt     # into src/metaperturb/shipped
    python scripts/ship_phi.py tiny_imagenet_resnet20                          # again, after more tables

The file keeps what its card says of source, settings, seed, code and selection, without this machine's folders. The
Markdown file beside it says the same to people, and what the φ was tested on: every training in results/ that used it
(`PHI=tiny_imagenet_resnet20 ./run.sh table1 …`).
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.grid import Grid, digest
from experiments.results import shortened
from experiments.statistics import paired_difference, summarize
from experiments.table import markdown_table

from metaperturb.cli import run_program
from metaperturb.errors import UserError
from metaperturb.perturbation import MetaPerturb
from metaperturb.storage import load_json, write_atomically
from metaperturb.weights import SHIPPED, load_phi, save_phi

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what load_phi will know it by")
    parser.add_argument("phi", type=Path, nargs="?", help="phi.pt of a meta-training or of ./run.sh select")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the tables' JSONs")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the shipped φ")
    arguments = parser.parse_args(argv)
    return run_program(
        lambda: ship(arguments.name, arguments.phi, arguments.results, arguments.out), show_traceback=False
    )


def ship(name: str, source: Path | None, results: Path, out: Path) -> None:
    if not name.isidentifier():
        raise UserError(f"{name}: a name has letters, digits and underscores only")
    path = out / f"{name}.pt"
    if source is not None:
        phi = load_phi(source)
        if not {"config", "source", "versions", "hardware"} <= phi.card.keys():
            raise UserError(f"{source}: its card does not say how it was meta-trained")
        save_phi(phi, path, shortened(phi.card))
    if not path.exists():
        raise UserError(f"{path}: no such φ yet; name the file to ship")
    phi = load_phi(path)
    tested = [*trainings_with(phi, results)]
    text = describe(name, phi.card, tested)
    write_atomically(path.with_suffix(".md"), lambda file: file.write(text.encode()))
    print(f"{path}: tested in {len(tested)} places", file=sys.stderr)


def trainings_with(phi: MetaPerturb, results: Path) -> Iterator[list[str]]:
    """A row of the card for each place of a table with trainings that used this φ, and what it is compared with."""
    suffix = f"-{digest(phi):.8}"  # of the ids of given φ
    for folder in sorted(path for path in results.glob("*/*") if path.is_dir() and path.name != "smoke"):
        file = CONFIGS / f"{folder.parent.name}.yaml"
        if not file.exists():  # benchmarks, say
            continue
        grid = Grid(file, folder.name)
        accuracies: dict[tuple[str, str], dict[int, float]] = {}
        settings: dict[tuple[str, str], Mapping[str, Any]] = {}
        for record in map(load_json, sorted(folder.glob("*--*.json"))):
            place, is_ours = (record["row"], record["column"]), record["needs"].get("phi", "").endswith(suffix)
            if is_ours or place[0] in grid.baselines:
                accuracies.setdefault(place, {})[record["seed"]] = 100 * record["result"]["metrics"]["accuracy"]
            if is_ours:
                settings[place] = record["result"]["config"]
        for (row, column), config in settings.items():
            baseline = grid.baseline(row) or next(iter(grid.baselines), None)  # of a row that --phi added: the first
            ours, base = accuracies[row, column], accuracies.get((baseline, column), {})
            yield [
                f"{folder.parent.name}, preset {folder.name}",
                row,
                column,
                f"{config['model']}, {config['steps']:,} steps of {config['batch_size']}",
                ", ".join(map(str, sorted(ours))),
                f"{baseline}: {summarize([*base.values()])}" if base else "",
                str(summarize([*ours.values()])),
                str(paired_difference(ours, base) or ""),
            ]


def describe(name: str, card: Mapping[str, Any], tested: Sequence[Sequence[str]]) -> str:
    """The card as Markdown."""
    config, source, metrics, versions, machine = (
        card[key] for key in ("config", "source", "metrics", "versions", "hardware")
    )
    facts = {
        "source": f"{source['name']}: {source['images']:,} images of {source['classes']} classes at "
        f"{config['image_size']}×{config['image_size']} pixels (fingerprint `{source['fingerprint'][:12]}`)",
        "class split": f"{config['split']}, {config['tasks']} tasks, seed {config['seed']}",
        "meta-training": f"{config['model']}, {config['steps']} steps, batches of {config['batch_size']}, "
        f"Adam {config['lr']:g}, weight decay {config['weight_decay']:g}, {config.get('precision', 'float32')}, "
        f"annealing {config['anneal']:g}",
        "at its end": f"loss {metrics['train_loss']:.3f} on D_tr, {metrics['test_loss']:.3f} on D_te",
        "made by": f"commit `{card['commit']}`, torch {versions['torch']}, {machine['device']} "
        f"({machine['cpu']}), {card['seconds']:.0f} s",
    }
    if selection := card.get("selection"):
        found = [
            f"{run} {evidence['mean']:.2f} % ({evidence['seeds']})" for run, evidence in selection["accuracy"].items()
        ]
        facts["selection"] = f"{selection['chosen']}, of {', '.join(found)}; {selection['evaluated']}"
    lines = [f"# φ `{name}`", "", f'`metaperturb.load_phi("{name}")`. Made by `scripts/ship_phi.py`.', ""]
    lines += [f"- **{what}**: {text}" for what, text in facts.items()]
    lines += ["", "## Tested on", ""]
    head = ["table", "row", "data", "training", "seeds", "without φ %", "with φ %", "difference [95 %]"]
    lines.append(markdown_table(head, tested) if tested else "Nothing yet.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
