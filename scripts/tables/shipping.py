"""Put a meta-trained φ into the package.

    ./run.sh ship tiny_imagenet_resnet20 runs/selected/phi.pt     # into src/metaperturb/shipped
    ./run.sh ship tiny_imagenet_resnet20                          # its page again

The file keeps what its card says of source, settings, seed, code and selection, without this machine's folders. The
Markdown file beside it says the same to people.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaperturb.cli import argument_parser, run_program
from metaperturb.errors import UserError
from metaperturb.storage import write_atomically
from metaperturb.weights import SHIPPED, load_phi, save_phi
from tables.results import shortened

# What a card must say of the meta-training.
NEEDED = {
    **dict.fromkeys(("config", "source", "metrics", "versions", "hardware"), dict),
    **{"commit": str, "seconds": (int, float)},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("name", help="what load_phi will know it by")
    parser.add_argument("phi", type=Path, nargs="?", help="phi.pt of a meta-training or of ./run.sh select")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the shipped φ")
    arguments = parser.parse_args(argv)
    return run_program(
        lambda: ship(arguments.name, arguments.phi, arguments.out), show_traceback=arguments.traceback, resumes=False
    )


def ship(name: str, source: Path | None, out: Path) -> None:
    if not name.isidentifier():
        raise UserError(f"{name}: a name has letters, digits and underscores only, and does not begin with a digit")
    path = out / f"{name}.pt"
    if source is None and not path.exists():
        raise UserError(f"{path}: no such φ yet; name the file to ship")
    phi = load_phi(source or path)
    if isinstance(config := phi.card.get("config"), Mapping) and config.get("steps") == 0:
        raise UserError(f"{source or path}: was not meta-trained (0 steps)")
    if missing := [key for key, kind in NEEDED.items() if not isinstance(phi.card.get(key), kind)]:
        raise UserError(f"{source or path}: its card does not say how it was meta-trained: no {', '.join(missing)}")
    text = describe(name, phi.card)
    if source is not None:
        save_phi(phi, path, shortened(phi.card))
    write_atomically(path.with_suffix(".md"), lambda file: file.write(text.encode()))
    print(f"{path}: shipped, described in {path.with_suffix('.md')}", file=sys.stderr)


def describe(name: str, card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    config, source, metrics, versions, machine = (card[key] for key in [*NEEDED][:5])
    sizes, batch = config["image_size"], config["batch_size"]
    sizes = " and ".join(f"{size}×{size}" for size in (sizes if isinstance(sizes, list) else [sizes]))
    facts = {
        "source": f"{source['name']}: {source['images']:,} images of {source['classes']} classes at "
        f"{sizes} pixels (fingerprint `{source['fingerprint'][:12]}`)",
        "class split": f"{config['split']}, {config['tasks']} tasks, seed {card.get('split_seed', config['seed'])}",
        "meta-training": f"{config['model']}, {'scale-free noise, ' * config.get('scale_free', False)}"
        f"{config['steps']} steps, batches of {batch}, Adam {config['lr']:g}, "
        f"weight decay {config['weight_decay']:g}, {config['precision']}, annealing {config['anneal']:g}",
        "at its end": f"loss {metrics['train_loss']:.3f} on D_tr, {metrics['test_loss']:.3f} on D_te",
        "made by": f"commit `{card['commit']}`, torch {versions['torch']}, {machine['device']} "
        f"({machine['cpu']}), {card['seconds']:.0f} s",
    }
    if selection := card.get("selection"):
        ranked = sorted(selection["accuracy"].items(), key=lambda item: -item[1].get("mean", -1.0))
        found = [
            f"{run} {one['mean']:.2f} % ({one['seeds']})" if "mean" in one else f"{run} diverged" for run, one in ranked
        ]
        facts["selection"] = (
            f"{selection['chosen']}, the best of {len(found)} meta-trainings by accuracy (seeds) on "
            f"{selection['evaluated']}: {', '.join(found)}"
        )
    facts["tested"] = "the tables under [results](../../../results/README.md)"
    lines = [f"# φ `{name}`", "", f'`metaperturb.load_phi("{name}")`. Made by `./run.sh ship`.', ""]
    return "\n".join([*lines, *(f"- **{what}**: {text}" for what, text in facts.items())]) + "\n"
