"""Files that are either complete or absent, and reading that executes nothing."""

import contextlib
import fcntl
import io
import json
import os
import pickle
import secrets
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
import yaml

from metaperturb.errors import Damaged, UserError

TEMPORARY = ".unfinished"


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk and rename it over `path`.

    Raises:
        UserError: disk full, read-only folder, a device or folder of this name and the like, with the path.
    """
    # Not by the process's number: containers that share a folder have the same ones.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no file that could be replaced; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({reason(error)})") from error
    finally:
        with contextlib.suppress(OSError):  # of a failure; after success it is gone
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while writing in `folder` or below."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def hold(path: Path, wait: bool = False) -> IO | None:
    """A lock that is held until it is closed, or this process is gone; None: another process holds it.

    With `wait` it is waited for, and never None. Where the file system has no locks, that is said, and nothing keeps
    others away.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115 (held as long as what it is about)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({reason(error)})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        return None
    except OSError:
        print(f"{path.parent}: no locks here: nothing keeps two processes from doing the same work", file=sys.stderr)
    return lock


def save_tensors(content: Any, path: Path) -> None:
    """`torch.save`, atomically."""
    buffer = io.BytesIO()  # torch hides the cause when the disk is full; writing the bytes ourselves tells it
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def save_json(content: Any, path: Path) -> None:
    """Indented JSON in UTF-8, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Names of files need not be Unicode: their other bytes are written as JSON has them, \udcff.
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def save_yaml(content: Any, path: Path) -> None:
    """YAML in UTF-8, atomically."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def load_tensors(path: Path) -> Any:
    """`torch.load` on the CPU with `weights_only=True`: tensors and plain values, never code.

    Raises:
        Damaged: by its checksums (PyTorch writes one of each part, but does not compare it), or holding anything but
            tensors and plain values.
        UserError: unreadable.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                if damaged := parts.testzip():
                    raise zipfile.BadZipFile(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on odd files; the caller judges the content
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Damaged(
            f"{path}: not loaded, because it is damaged or holds more than tensors and plain values (it could run code)"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    except Exception as error:  # what a damaged file makes torch raise is not of a few kinds
        raise Damaged(f"{path}: is damaged, or no file of PyTorch") from error


def load_json(path: Path) -> Any:
    """What a JSON file holds; `Damaged` where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Damaged(f"{path}: cannot be read as JSON ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """The first line of an error, without the path that the caller names anyway."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, LookupError):  # whose text is no more than what was looked for
        return f"{type(error).__name__}: {error}"
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
