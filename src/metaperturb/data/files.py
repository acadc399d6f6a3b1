"""Where images lie: a folder, or a zip or tar that is unpacked into a temporary folder; one walk finds their files.

Hidden and system files are left out, and links are followed.
"""

import hashlib
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from metaperturb.errors import UserError
from metaperturb.storage import reason

# What file managers and network storage put beside images; whatever begins with a dot is left out, too.
SYSTEM_NAMES = {
    *("__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),
    *("@eaDir", "@tmp", "@sharebin", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "lost+found"),
    *("Icon\r", "ZbThumbnail.info"),
}


def printable(name: str) -> str:
    """A name as messages have it: on one line, and all of it Unicode."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


class Place:
    """A folder, a zip or a tar (plain, .gz, .bz2, .xz); the content decides which, not the name.

    Its `key` is a hex digest of an archive's bytes, and None of a folder. `stack` ends the life of the temporary folder
    that an archive is unpacked into when its files are asked for.
    """

    def __init__(self, path: str | Path, stack: ExitStack) -> None:
        self.path, self.stack, self.key = Path(path).expanduser(), stack, None
        try:
            if self.path.is_file():
                with self.path.open("rb") as file:
                    self.key = hashlib.file_digest(file, "sha256").hexdigest()
            elif not self.path.is_dir():
                there = self.path.exists()
                what = "neither a folder nor a zip or tar file" if there else "no such file or folder"
                raise UserError(f"{self.path}: {what}")
        except (OSError, ValueError) as error:  # no permission, too long a name
            raise UserError(f"{self.path}: cannot be read ({reason(error)})") from error

    @cached_property
    def folder(self) -> Path:
        """The folder, or what an archive is unpacked into."""
        if self.key is None:
            return self.path
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="metaperturb-")))
        try:
            _unpack(self.path, folder)
        except Exception as error:  # of zipfile, tarfile and what they decompress with: there is no end of them
            if isinstance(error, OSError) and error.errno is not None:
                cannot = f"cannot be unpacked into {folder.parent} ({reason(error)}); TMPDIR names another place"
                raise UserError(f"{self.path}: {cannot}") from error
            cannot = f"not a zip or tar file that can be read ({reason(error).removesuffix(':')})"
            raise UserError(f"{self.path}: {cannot}; is the download complete?") from error
        return folder

    @cached_property
    def _walked(self) -> tuple[dict[str, Path], set[str]]:
        def fail(error: OSError) -> None:
            raise UserError(f"{error.filename}: cannot be listed ({reason(error)})") from error

        files, folders, top = {}, set(), os.path.realpath(self.folder)
        for here, inner, names in os.walk(top, onerror=fail, followlinks=True):
            base = here.removeprefix(top).lstrip("/")
            inner[:] = [name for name in inner if _is_shown(name) and not _leads_up(Path(here, name))]
            folders |= {os.path.join(base, name) for name in inner}
            for name, path in ((name, os.path.join(here, name)) for name in names if _is_shown(name)):
                if os.path.isfile(path) or not os.path.exists(path):  # no pipe, which would be waited for
                    files[os.path.join(base, name)] = Path(path)
        return dict(sorted(files.items())), folders

    files = property(lambda self: self._walked[0], doc="Relative names, sorted (`train/cat/1.png`) → the files.")
    folders = property(lambda self: self._walked[1], doc="Relative names of the folders, empty ones too.")

    def read(self, name: str) -> bytes:
        """The content of a file that must be there."""
        if name not in self.files:
            raise UserError(f"{self.path}: {name} is missing; is the data set official and complete?")
        try:
            return self.files[name].read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: {name}: cannot be read ({reason(error)})") from error

    def root(self, markers: Iterable[str]) -> str | None:
        """Where a layout starts, which holds one of `markers`: `""`, or `"top/"` if folders enclose it, or nowhere."""
        paths = [name.split("/") for name in [*self.files, *self.folders]]
        markers = {*markers}
        roots = {tuple(path[: min(map(path.index, found))]) for path in paths if (found := markers.intersection(path))}
        highest = sorted("".join(f"{part}/" for part in root) for root in roots if len(root) == min(map(len, roots)))
        if len(highest) > 1:
            names = ", ".join(root.rstrip("/") for root in highest)
            raise UserError(f"{self.path}: several data sets inside ({names}); name one of them")
        return highest[0] if highest else None


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name not in SYSTEM_NAMES


def _leads_up(path: Path) -> bool:
    """Whether it is a link to a folder on the way to it, whose files would come again and again."""
    if not path.is_symlink():
        return False
    target = os.path.realpath(path)
    return any(Path(os.path.realpath(step)).is_relative_to(target) for step in path.parents)


def _unpack(path: Path, folder: Path) -> None:
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                info.filename = info.filename.replace("\\", "/")  # some Windows tools store these
                archive.extract(info, folder)
    else:
        with tarfile.open(path, tarinfo=_Member) as archive:
            archive.extractall(folder, filter="data")
            while archive.fileobj.read(2**20):  # where it is compressed, its checksum comes last
                pass


class _Member(tarfile.TarInfo):
    """tarfile takes a tar that breaks off between two members, or has a damaged header, for one that ends there."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError("breaks off" if archive.offset else str(error)) from error
