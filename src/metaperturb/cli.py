"""How the programs start, fail and stop: one line instead of a traceback, and a meaningful exit code."""

import argparse
import contextlib
import ctypes
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from metaperturb.errors import UserError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last: of Slurm, before a job's time is over
RESUME = "the same command goes on with what is saved"
PARENT = "METAPERTURB_PARENT"  # process id of a program that started this one and may not be outlived
NAMES = "METAPERTURB_NAMES"  # what a wrapper calls settings: "target_path=TGT_PATH run_dir=TGT_RUN"


class Stopped(BaseException):
    """A signal, raised where the program is, so that what it started is ended too; `saved` says what is (`RESUME`)."""

    def __init__(self, number: int = signal.SIGTERM, saved: str = "") -> None:
        super().__init__(number, saved)
        self.number, self.saved = number, saved


def run_program(main: Callable[[], None], *, show_traceback: bool, resumes: bool = True) -> int:
    """Run `main` and return the exit code; a `UserError` becomes one line on stderr.

    `resumes`: whether the same command goes on where this one was stopped; it is said then.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see early.py
    for number in STOPPING[1:]:
        signal.signal(number, _raise_stopped)
    if PARENT in os.environ:
        end_with(int(os.environ.pop(PARENT)))
    keep_freed_memory()
    with unbreakable_output():
        try:
            main()
        except (KeyboardInterrupt, Stopped) as stop:
            number, saved = (stop.number, stop.saved) if isinstance(stop, Stopped) else (signal.SIGINT, "")
            what = "interrupted" if number == signal.SIGINT else "stopped"
            then = f"{saved}; the same command goes on from there" if saved else RESUME
            print(f"{what}; {then}" if resumes else what, file=sys.stderr)
            return 128 + number  # the shell's convention
        except Exception as error:
            return report_error(error, show_traceback)
    return 0


def report_error(error: Exception, show_traceback: bool = False) -> int:
    """The one line about an error, on stderr; returns the exit code."""
    if show_traceback:
        traceback.print_exc()
    known = isinstance(error, UserError)
    print(f"error: {in_users_words(str(error)) if known else describe_unexpected(error)}", file=sys.stderr)
    return error.exit_code if known else UserError.exit_code


def in_users_words(message: str) -> str:
    """The message with the names that a wrapper (`NAMES`) has for settings, as `TGT_PATH` for `target_path`.

    Names with a `_`, which are no words of English, are replaced wherever they stand; others before a `:` or `=`.
    """
    if NAMES not in os.environ:
        return message
    for pair in os.environ[NAMES].split():
        name, _, theirs = pair.partition("=")
        message = re.sub(rf"(?<![\w/.-]){name}" + (r"(?![\w/.-])" if "_" in name else r"(?=[:=])"), theirs, message)
    return re.sub(r"^(\w+)=.*?: \1:", r"\1:", message.replace("--set ", ""))


class Stop:
    """Lets a loop end itself: while it is open, the first signal is only noted, for the loop to save.

    A second one ends at once, but not within a second: terminal, scheduler and launcher may each pass on the same.
    `number` is that of the signal, or 0. `tell`: whether to say so; `forward` is called when a signal is noted.
    """

    def __init__(self, tell: bool = True, forward: Callable[[], None] = lambda: None) -> None:
        self.number, self.since, self.tell, self.forward = 0, 0.0, tell, forward

    def __enter__(self) -> "Stop":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number and time.monotonic() - self.since > 1.0:
            raise Stopped(number)
        if self.number:
            return
        self.number, self.since = number, time.monotonic()
        if self.tell:
            with contextlib.suppress(OSError):  # not `print`, which may be what the signal interrupted
                os.write(2, f"{signal.Signals(number).name}: saving after this step; once more ends at once\n".encode())
        self.forward()


class _Unbreakable(io.FileIO):
    """A file whose reader may go away or whose disk may be full: what it does not take is dropped."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """A report that nobody takes (`| head -1`, a full disk) does not end the work that it is about."""
    with contextlib.ExitStack() as stack:
        for redirect, stream in (contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr):
            if stream is None:  # closed from the start
                stack.enter_context(redirect(stack.enter_context(open(os.devnull, "w"))))
            elif isinstance(getattr(stream, "buffer", None), io.BufferedWriter | io.FileIO):  # no notebook's
                raw = _Unbreakable(stream.fileno(), "w", closefd=False)
                file = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True)
                stack.enter_context(redirect(stack.enter_context(file)))
        yield


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for the next feature map on the CPU; only glibc can.

    It returns blocks above 32 MB to the system at once, and every new one is zeroed page by page. In a ResNet20 at 84
    pixels that was two fifths of a training step (batch of 128, float32) and two thirds of an evaluation (bfloat16).
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def argument_parser(doc: str, prog: str | None = None) -> argparse.ArgumentParser:
    """Of a program whose docstring is its help, with what an unexpected error points to."""
    parser = argparse.ArgumentParser(prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    return parser


def describe_unexpected(error: Exception) -> str:
    """An error that nobody foresaw, in one line."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror} (--traceback shows where)"
    lines = str(error).strip().splitlines() or ["no details"]
    return f"{type(error).__name__}: {lines[0]} (--traceback shows where)"


def _raise_stopped(number: int, _: object) -> None:
    raise Stopped(number)


def end_with(parent: int) -> None:
    """No orphans: end this process when its parent is gone, however it went."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(UserError.exit_code)

    threading.Thread(target=follow, daemon=True).start()


def pairs(option: str, texts: Iterable[str], expected: str) -> dict[str, str]:
    """The `NAME=VALUE` texts that an option was given; a `UserError` says what was `expected`."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (name and value):
            raise UserError(f"{option} {text}: expected {expected}")
        found[name] = value
    return found
