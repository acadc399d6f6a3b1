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

import cluster
from tables import choices, trainings

COMMANDS = {
    "table": trainings.main,
    "tune": choices.main_tune,
    "select": choices.main_select,
    "ship": choices.main_ship,
    "src": cluster.main,
}


def main(argv: Sequence[str] | None = None) -> int:
    command, *arguments = (sys.argv[1:] if argv is None else [*argv]) or [""]
    if command not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    return COMMANDS[command](arguments)


if __name__ == "__main__":
    sys.exit(main())
