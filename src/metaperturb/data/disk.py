"""What everything that writes under the data root shares: a lock between processes, progress, and disk errors."""

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from metaperturb.errors import UserError

_DISK_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or set another data root",
    errno.EDQUOT: "the disk quota is used up; free some space or set another data root",
    errno.EFBIG: "the file is larger than this system allows; set another data root",
    errno.EROFS: "the disk is read-only; set a data root that can be written",
    errno.EACCES: "no permission to write there; set a data root that can be written",
    errno.EEXIST: "a file is where a folder should be; set another place",
    errno.ENOTDIR: "a file is where a folder should be; set another place",
    errno.EPERM: "no permission to write there; set a data root that can be written",
}


def is_disk_error(error: BaseException) -> bool:
    """Whether an exception says that the disk cannot take more, or nothing at all."""
    return isinstance(error, OSError) and error.errno in _DISK_ADVICE


@contextlib.contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an `OSError` of writing under `path` into one line, e.g. a full or read-only disk.

    Raises:
        UserError: instead of the `OSError`, with the place and what can be done.
    """
    try:
        yield
    except OSError as error:
        advice = _DISK_ADVICE.get(error.errno, error.strerror or str(error))
        raise UserError(f"{path}: cannot {doing}: {advice}") from error


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if absent) against other processes; waits for it.

    The kernel drops the lock when its holder dies, so a killed process never leaves one behind. The empty
    lock file stays: removing it would let two processes hold locks on two files of the same name.

    Raises:
        UserError: the file cannot be created, or the file system offers no locks.
    """
    with disk_errors(path, "lock this file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with disk_errors(path, "lock this file"):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Progress:
    """A tqdm bar on a terminal; elsewhere (log files, CI) a plain line at the start, every 30 s and at the end."""

    def __init__(self, what: str, total: int | None, unit: str, scale: bool = False) -> None:
        self._what, self._total, self._done = what, total, 0
        self._start = self._last = time.monotonic()
        self._unit, self._divisor = (f"M{unit}", 1e6) if scale else (unit, 1)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=scale, leave=False)
        else:
            amount = "" if total is None else f": {self._format(total)}"
            print(f"{what}{amount}", file=sys.stderr, flush=True)

    def _format(self, amount: int) -> str:
        return f"{amount / self._divisor:,.0f} {self._unit}"

    def add(self, amount: int = 1) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif time.monotonic() - self._last > 30:
            self._last = time.monotonic()
            of = "" if self._total is None else f" of {self._format(self._total)}"
            print(f"{self._what}: {self._format(self._done)}{of}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            took = f"{time.monotonic() - self._start:.1f} s"
            print(f"{self._what}: {self._format(self._done)} in {took}", file=sys.stderr, flush=True)
