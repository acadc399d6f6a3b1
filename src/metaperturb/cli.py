"""How the programs start, fail and stop: one line instead of a traceback, and a meaningful exit code."""

import sys
import traceback
from collections.abc import Callable

from metaperturb.errors import UserError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # the shell's convention for Ctrl-C


def run_program(main: Callable[[], None], *, show_traceback: bool) -> int:
    """Run `main` and return the exit code; a `UserError` becomes one line on stderr."""
    try:
        main()
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        text = str(error).strip().split("\n")[0]
        print(f"error: {type(error).__name__}: {text} (--traceback shows where)", file=sys.stderr)
        return EXIT_ERROR
    return 0
