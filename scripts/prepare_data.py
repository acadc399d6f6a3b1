"""Download, check and cache data sets ahead of training.

./run.sh data tiny_imagenet cub          # or all
./run.sh data cub50.zip s-cifar100.zip   # the images of results/README.md, made of these: of CUB and CIFAR-100
python scripts/prepare_data.py --data-root data s_cifar100
"""

import sys
from pathlib import Path

from metaperturb.cli import argument_parser, run_program
from metaperturb.data import DATA_SETS, load
from metaperturb.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
from images import ZIPS, make_zip


def main() -> int:
    parser = argument_parser(__doc__)
    names = [name for name, spec in DATA_SETS.items() if spec.how not in ("drawn", "named")]
    parser.add_argument("names", nargs="+", choices=[*names, "all", *ZIPS])
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    arguments = parser.parse_args()

    def prepare() -> None:
        missing = []
        for name in [name for given in arguments.names for name in (names if given == "all" else [given])]:
            try:
                if name in ZIPS:
                    print(make_zip(name, arguments.data_root))
                else:
                    for part in load(name, data_root=arguments.data_root, splits=[*DATA_SETS[name].images]):
                        of = f"{part.num_classes} classes, {part.image_size}×{part.image_size}"
                        print(f"{part.name}: {len(part):,} images of {of}")
            except UserError as error:  # the others are prepared all the same
                print(f"{name}: {error}", file=sys.stderr)
                missing.append(name)
        if missing:
            raise UserError(f"not prepared: {', '.join(missing)} (why: above)")

    return run_program(prepare, show_traceback=arguments.traceback, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
