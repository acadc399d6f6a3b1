"""How the programs start, fail and stop: one line instead of a traceback, and a meaningful exit code."""

import argparse
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable

from metaperturb.errors import UserError

EXIT_ERROR = UserError.exit_code
EXIT_SIGNAL = 128  # plus the signal's number: the shell's convention
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
RESUME = "the same command resumes from the last checkpoint"
PARENT = "METAPERTURB_PARENT"  # process id of a program that started this one and may not be outlived


def run_program(main: Callable[[], None], *, show_traceback: bool, resumes: bool = True) -> int:
    """Run `main` and return the exit code; a `UserError` becomes one line on stderr.

    Args:
        main: what the program does.
        show_traceback: where an error arose, too.
        resumes: whether the same command goes on where this one was stopped; it is said then.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see metaperturb/__init__.py
    signal.signal(signal.SIGTERM, _raise_stopped)
    if PARENT in os.environ:
        threading.Thread(target=_follow, args=(int(os.environ.pop(PARENT)),), daemon=True).start()
    keep_freed_memory()
    try:
        main()
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Stopped) as stop:
        number, what = (signal.SIGTERM, "stopped") if isinstance(stop, Stopped) else (signal.SIGINT, "interrupted")
        print(f"{what}; {RESUME}" if resumes else what, file=sys.stderr)
        return EXIT_SIGNAL + number
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        print(f"error: {describe_unexpected(error)}", file=sys.stderr)
        return EXIT_ERROR
    return 0


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees: the next feature map on the CPU needs it again.

    glibc returns blocks above 32 MB to the system at once, and every new one is zeroed page by page before it is
    written. In a ResNet20 at 84 pixels that was two fifths of a training step (batch of 128, float32) and two thirds
    of an evaluation (batches of 500, bfloat16). Other C libraries have no such switch: there nothing happens.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """Of a program whose docstring is its help, with what an unexpected error points to."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    return parser


class Stopped(BaseException):
    """SIGTERM, raised where the program is, so that what it started is ended too."""


def describe_unexpected(error: Exception) -> str:
    """An error that nobody foresaw, in one line."""
    lines = str(error).strip().splitlines() or ["no details"]
    return f"{type(error).__name__}: {lines[0]} (--traceback shows where)"


def _raise_stopped(*_: object) -> None:
    raise Stopped


def _follow(parent: int) -> None:
    """No orphans: end when the parent is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(EXIT_ERROR)


def pairs(option: str, texts: Iterable[str], expected: str) -> dict[str, str]:
    """The `NAME=VALUE` texts that an option was given.

    Raises:
        UserError: one is no such pair; it says what was `expected`.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (name and value):
            raise UserError(f"{option} {text}: expected {expected}")
        found[name] = value
    return found
