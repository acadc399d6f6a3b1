"""Put a meta-trained φ into the package, and write down what it was tested on.

    ./run.sh ship tiny_imagenet_resnet20 runs/selected/phi.pt     # into src/metaperturb/shipped
    ./run.sh ship tiny_imagenet_resnet20                          # again, after more tables

The file keeps what its card says of source, settings, seed, code and selection, without this machine's folders. The
Markdown file beside it says the same to people, and what the φ was tested on: every training in results/ that used it
(`PHI=tiny_imagenet_resnet20 ./run.sh table1 …`).
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metaperturb.cli import argument_parser, run_program
from metaperturb.config import MetaTestConfig
from metaperturb.errors import UserError
from metaperturb.perturbation import MetaPerturb
from metaperturb.storage import write_atomically
from metaperturb.weights import SHIPPED, load_phi, phi_digest, save_phi
from tables.grid import Grid, fingerprint
from tables.page import markdown_table
from tables.results import DIVERGED, SETTINGS, images_of, read_diverged, read_record, shortened
from tables.statistics import paired_difference, summarize

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
# What a card must say of the meta-training.
NEEDED = {
    **{"config": dict, "source": dict, "metrics": dict, "versions": dict, "hardware": dict},
    **{"commit": str, "seconds": (int, float)},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("name", help="what load_phi will know it by")
    parser.add_argument("phi", type=Path, nargs="?", help="phi.pt of a meta-training or of ./run.sh select")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the tables' JSONs")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the shipped φ")
    arguments = parser.parse_args(argv)
    return run_program(
        lambda: ship(arguments.name, arguments.phi, arguments.results, arguments.out),
        show_traceback=arguments.traceback,
        resumes=False,
    )


def ship(name: str, source: Path | None, results: Path, out: Path) -> None:
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
    tested = [cells for _, cells in sorted(trainings_with(phi, results), key=lambda found: found[0])]
    text = describe(name, phi.card, tested, [*diverged_with(phi, results)])
    if source is not None:
        save_phi(phi, path, shortened(phi.card))
    write_atomically(path.with_suffix(".md"), lambda file: file.write(text.encode()))
    print(f"{path}: tested in {len(tested)} places", file=sys.stderr)


def trainings_with(phi: MetaPerturb, results: Path) -> Iterator[tuple[tuple[int, int], list[str]]]:
    """A row of the card for each place of a table with trainings that used this φ, and what it is compared with.

    With each comes what it is sorted by: the longest trainings, and those of most seeds, first.

    Trainings that were evaluated on other images than the test set chose something, φ for instance, and test nothing.
    Those that a table took over from another count there.
    """
    suffix = id_suffix(phi)
    folders = sorted(path for path in results.glob("*/*") if path.is_dir() and path.name != "smoke")
    found = {folder: [read_record(path) for path in sorted(folder.glob("*--*.json"))] for folder in folders}
    controls = not_meta_trained(record for records in found.values() for record in records)
    for folder, records in found.items():
        records = [record for record in records if record["result"]["config"].get("eval_split", "test") == "test"]
        with_it = [record for record in records if record["needs"].get("phi", "").endswith(suffix)]
        own = [r for r in with_it if "taken_from" not in r or not (results / r["taken_from"]).is_file()]
        ours = by_place(folder, own)
        if not ours:
            continue
        try:
            grid = Grid(CONFIGS / f"{folder.parent.name}.yaml", folder.name)
        except UserError as error:  # the folder of a run with --set, or of a preset that is no more
            print(f"{folder}: left out ({error})", file=sys.stderr)
            continue
        first = next(iter(grid.baselines), None)  # that of a row that --phi added
        versus = {row: grid.baseline(row) or first for row, _ in ours}
        baselines = {*grid.baselines, *versus.values()}
        others = by_place(folder, [record for record in records if record["row"] in baselines])
        for (row, column), with_phi in ours.items():
            baseline = versus[row]
            result = next(iter(with_phi.values()))["result"]
            config = result["config"]
            accuracies, without = (
                {seed: 100 * some[seed]["result"]["metrics"]["accuracy"] for seed in with_phi if seed in some}
                for some in (with_phi, others.get((baseline, column), {}))
            )
            control = summarize([*controls.get(making(result), {}).values()])
            weight = -config["steps"], -len(accuracies)
            yield (
                weight,
                [
                    f"{folder.parent.name}, preset {folder.name}",
                    row,
                    column,
                    images_of(result),
                    f"{config['model']}, {config['steps']:,} steps of {config['batch_size']}",
                    ", ".join(map(str, accuracies)),
                    f"{baseline}: {summarize([*without.values()])}" if without else "",
                    f"{control} ({control.n})" if control.n else "",
                    str(summarize([*accuracies.values()])),
                    str(paired_difference(accuracies, without) or ""),
                ],
            )


def not_meta_trained(records: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], dict[int, float]]:
    """Accuracies in % with a φ of no meta-training step, by `making` and seed."""
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for record in records:
        card = record["result"].get("phi_card") or {}
        if card.get("config", {}).get("steps") == 0:
            place = found.setdefault(making(record["result"]), {})
            place[record["seed"]] = 100 * record["result"]["metrics"]["accuracy"]
    return found


def making(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Equal for trainings that differ in their seed and φ alone."""
    settings = {key: value for key, value in result["config"].items() if key in SETTINGS}
    config = MetaTestConfig(**settings | {"phi": None})
    return fingerprint("meta_test", config), *result["target"]["fingerprints"]


def id_suffix(phi: MetaPerturb) -> str:
    """What the id of this φ ends with, in the records of trainings that were given it."""
    return f"{phi_digest(phi):.8}"


def by_place(folder: Path, records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """Row and column → seed → record."""
    places: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        row, column, seed = record["row"], record["column"], record["seed"]
        if places.setdefault((row, column), {}).setdefault(seed, record) is not record:
            raise UserError(f"{folder}: there are two records of {row}, {column}, seed {seed}; remove one")
    return places


def diverged_with(phi: MetaPerturb, results: Path) -> Iterator[str]:
    """Table, place and last words of each training that used this φ, was to be tested on test images, and diverged."""
    suffix = id_suffix(phi)
    for path in sorted(results.glob(f"*/*/{DIVERGED}/*--*.json")):
        found, folder = read_diverged(path), path.parent.parent
        if folder.name == "smoke" or (folder / path.name).exists() or found["config"].get("eval_split") != "test":
            continue
        if found["needs"].get("phi", "").endswith(suffix):
            place = f"{found['row']}, {found['column']}, seed {found['seed']}"
            yield f"{folder.parent.name}, preset {folder.name}: {place}: {found['diverged']}"


def describe(name: str, card: Mapping[str, Any], tested: Sequence[Sequence[str]], diverged: Sequence[str] = ()) -> str:
    """The card as Markdown."""
    config, source, metrics, versions, machine = (
        card[key] for key in ("config", "source", "metrics", "versions", "hardware")
    )
    facts = {
        "source": f"{source['name']}: {source['images']:,} images of {source['classes']} classes at "
        f"{config['image_size']}×{config['image_size']} pixels (fingerprint `{source['fingerprint'][:12]}`)",
        "class split": f"{config['split']}, {config['tasks']} tasks, seed {card.get('split_seed', config['seed'])}",
        "meta-training": f"{config['model']}, {config['steps']} steps, batches of {config['batch_size']}, "
        f"Adam {config['lr']:g}, weight decay {config['weight_decay']:g}, {config.get('precision', 'float32')}, "
        f"annealing {config['anneal']:g}",
        "at its end": f"loss {metrics['train_loss']:.3f} on D_tr, {metrics['test_loss']:.3f} on D_te",
        "made by": f"commit `{card['commit']}`, torch {versions['torch']}, {machine['device']} "
        f"({machine['cpu']}), {card['seconds']:.0f} s",
    }
    if selection := card.get("selection"):
        ranked = sorted(selection["accuracy"].items(), key=lambda item: -item[1].get("mean", -1.0))
        found = [
            f"{run} {evidence['mean']:.2f} % ({evidence['seeds']})" if "mean" in evidence else f"{run} diverged"
            for run, evidence in ranked
        ]
        facts["selection"] = (
            f"{selection['chosen']}, the best of {len(found)} meta-trainings by accuracy (seeds) on "
            f"{selection['evaluated']}: {', '.join(found)}"
        )
    lines = [f"# φ `{name}`", "", f'`metaperturb.load_phi("{name}")`. Made by `./run.sh ship`.', ""]
    lines += [f"- **{what}**: {text}" for what, text in facts.items()]
    lines += ["", "## Tested on", ""]
    head = ["table", "row", "column", "images", "training", "seeds", "without φ %", "φ not meta-trained % (seeds)"]
    head += ["with φ %", "difference to without [95 %]"]
    lines.append(markdown_table(head, tested) if tested else "Nothing yet.")
    if diverged:
        known = "[what is known of such](../../../results/networks.md)"
        lines += [
            "",
            f"Trainings that diverged, and so have no line above ({known}):",
            "",
            *(f"- {d}" for d in diverged),
        ]
    return "\n".join(lines) + "\n"
