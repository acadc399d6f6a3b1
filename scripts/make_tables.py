"""The paper's tables, and what is chosen by them: everything that trains a grid of networks.

    ./run.sh table1 …              make_tables.py table configs/table1.yaml …     trainings of a grid, and its table
    ./run.sh tune …                make_tables.py tune …                          hyperparameters on held-out images
    ./run.sh select …              make_tables.py select …                        the best of several φ
    ./run.sh ship <name> [φ]       make_tables.py ship <name> [φ]                 a φ into the package
    ./run.sh src --slurm …         make_tables.py src …                           a meta-training on a cluster

Each has its own --help.
"""

import sys
from collections.abc import Sequence
from functools import partial

import cluster
from tables import choices, trainings

from metaperturb.cli import run_program

COMMANDS = {
    "table": (partial(trainings.grid_parser, trainings.__doc__), trainings.make_table),
    "tune": (partial(trainings.grid_parser, choices.TUNE, "tune.yaml"), choices.tune),
    "select": (choices.select_parser, choices.select),
    "ship": (choices.ship_parser, choices.ship),
    "src": (cluster.src_parser, cluster.meta_train),
}


def main(argv: Sequence[str] | None = None) -> int:
    command, *words = (sys.argv[1:] if argv is None else [*argv]) or [""]
    if command not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    parser, work = COMMANDS[command]
    arguments = parser().parse_intermixed_args(words)  # options may stand before, between and behind files
    return run_program(lambda: work(arguments), show_traceback=arguments.traceback, resumes=command != "ship")


if __name__ == "__main__":
    sys.exit(main())
