"""Packages that only analyses need: the extra `analyses`."""

import importlib
import os
from types import ModuleType

from metaperturb.errors import UserError
from metaperturb.storage import reason


def extra(module: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        UserError: it cannot be imported; the message says how to install it.
    """
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox imports GitPython, which else wants the git program
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{package} cannot be imported ({reason(error)}): install it by .venv/bin/pip install {package}, or with "
            'the package, in the clone: pip install -e ".[analyses]"'
        ) from error
