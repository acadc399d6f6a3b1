"""What everything that writes under the data root shares: a lock between processes, progress, and disk errors."""

import contextlib
import errno
import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from metaperturb.errors import UserError
from metaperturb.storage import NO_LOCKS

_NO_PERMISSION = "no permission to write there; set a data root that can be written"
_DISK_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or set another data root",
    errno.EDQUOT: "the disk quota is used up; free some space or set another data root",
    errno.EFBIG: "the file is larger than this system allows; set another data root",
    errno.EROFS: "the disk is read-only; set a data root that can be written",
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EEXIST: "a file is where a folder should be; set another place",
    errno.ENOTDIR: "a file is where a folder should be; set another place",
}
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)  # of another user, or read-only


@contextlib.contextmanager
def disk_errors(path: Path, doing: str, but: tuple[int, ...] = ()) -> Iterator[None]:
    """Turn an `OSError` of writing under `path` into one line, e.g. a full or read-only disk.

    Args:
        path: named in the line.
        doing: what was tried, "save the download".
        but: errors that the caller deals with.

    Raises:
        UserError: instead of the `OSError`, with the place and what can be done.
    """
    try:
        yield
    except OSError as error:
        if error.errno in but:
            raise
        advice = _DISK_ADVICE.get(error.errno, error.strerror or str(error))
        raise UserError(f"{path}: cannot {doing}: {advice}") from error


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `path` (created if absent) against other processes; waits for it.

    The kernel drops the lock when its holder dies, so a killed process never leaves one behind. The empty lock file
    stays: removing it would let two processes hold locks on two files of the same name.

    Yields:
        whether it is held: not where the file system has no locks, which is said aloud, nor where the file cannot be
        opened, as what is to be written beside it will tell.
    """
    with contextlib.ExitStack() as stack:
        locked = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("ab"))
        except OSError:
            pass
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                locked = True
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise UserError(f"{path}: cannot lock this file: {error.strerror}") from error
                print(f"{path.parent}: no locks here: processes started at once may do the same work", file=sys.stderr)
        yield locked


@contextlib.contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """A tqdm bar on a terminal; elsewhere (log files, CI) a plain line at the start, every 30 s and at the end.

    Yields:
        what is to be called for each one that is done.
    """

    def say(text: str) -> None:
        print(f"{what}: {text}", file=sys.stderr, flush=True)

    def add() -> None:
        nonlocal done, told
        done += 1
        if bar is not None:
            bar.update()
        elif time.monotonic() - told > 30:
            told = time.monotonic()
            say(f"{done:,} {unit} of {total:,}")

    done, start = 0, time.monotonic()
    told, bar = start, tqdm(total=total, desc=what, unit=unit, leave=False) if sys.stderr.isatty() else None
    if bar is None:
        say(f"{total:,} {unit}")
    with contextlib.nullcontext() if bar is None else bar:
        yield add
    say(f"{done:,} {unit} in {time.monotonic() - start:.1f} s")
