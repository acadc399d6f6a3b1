"""Where images lie: a folder, or a zip or tar that is unpacked into a temporary folder; one walk finds their files.

Hidden and system files are left out, links are followed, and what the walk leaves out is counted in `Place.left_out`.
"""

import errno
import hashlib
import lzma
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from metaperturb.errors import UserError
from metaperturb.storage import reason

# The largest published image of the supported sets is a few MB; a file beyond this is a mistake or a zip bomb.
MAX_FILE_BYTES = 256 * 2**20
# What file managers and network storage put beside images; whatever begins with a dot is left out, too.
SYSTEM_NAMES = {
    *("__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),
    *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "lost+found"),
}
# What the decompressors and parsers of the standard library raise on damaged input: encrypted members, too.
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(RuntimeError, NotImplementedError, ValueError),
)


def is_passing(error: BaseException) -> bool:
    """Whether reading failed for a reason of the system (permission, input/output): no property of the data."""
    return isinstance(error, OSError) and error.errno is not None


def read_file(file: Path | Exception) -> bytes:
    """The content of one of `Place.files`.

    Raises:
        OSError: it cannot be read, or is a link that leads nowhere.
        ValueError: it is too large for an image, or damaged within its zip.
    """
    if isinstance(file, Exception):
        raise file
    with file.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        return stream.read()


class Place:
    """A folder, a zip or a tar (plain, .gz, .bz2, .xz); the content decides which, not the name.

    Args:
        path: where it is.
        stack: ends the life of the temporary folder that an archive is unpacked into when its files are asked for.

    Attributes:
        path: where it is.
        key: of an archive, a hex digest of its bytes; `None` of a folder.
        left_out: why → names that the walk left out.

    Raises:
        UserError: there is nothing at `path`, or neither a folder nor a regular file.
    """

    def __init__(self, path: str | Path, stack: ExitStack) -> None:
        self.path, self.stack, self.key = Path(path).expanduser(), stack, None
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self._bad: dict[str, ValueError] = {}  # members of an archive that cannot be unpacked
        try:
            mode = self.path.stat().st_mode
            if stat.S_ISREG(mode):
                with self.path.open("rb") as file:
                    self.key = hashlib.file_digest(file, "sha256").hexdigest()
            elif not stat.S_ISDIR(mode):
                raise UserError(f"{self.path}: neither a folder nor a zip or tar file")
        except FileNotFoundError as error:
            raise UserError(f"{self.path}: no such file or folder") from error
        except (OSError, ValueError) as error:  # no permission, too long a name
            raise UserError(f"{self.path}: cannot be read ({reason(error)})") from error

    @cached_property
    def folder(self) -> Path:
        """The folder, or what an archive is unpacked into."""
        if self.key is None:
            return self.path
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="metaperturb-")))
        try:
            self._unpack(folder)
        except _DAMAGE as error:
            if is_passing(error):
                advice = f"; TMPDIR names another place than {folder.parent}" if error.errno == errno.ENOSPC else ""
                raise UserError(f"{self.path}: cannot be unpacked ({reason(error)}){advice}") from error
            raise UserError(
                f"{self.path}: not a zip or tar file that can be read ({reason(error)}); is the download complete?"
            ) from error
        return folder

    def _unpack(self, folder: Path) -> None:
        """Files first, then links, so that nothing is written through a link."""
        links = []
        for stored, kind, size, content in _members(self.path):
            parts = [part for part in stored.split("/") if part not in ("", ".")]
            target = folder.joinpath(*parts)
            if stored.startswith("/") or stored[1:2] == ":" or ".." in parts:
                self.left_out["named outside the archive"].append(stored)
            elif size > MAX_FILE_BYTES:
                self._bad["/".join(parts)] = ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
            elif kind == "folder":
                target.mkdir(parents=True, exist_ok=True)
            elif kind == "file":
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with content() as file:
                        target.write_bytes(file.read())
                except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # damaged or encrypted: this one alone
                    self._bad["/".join(parts)] = ValueError(reason(error))
            elif kind == "other":
                self.left_out["neither file nor folder"].append(stored)
            else:
                links.append((target, content() if kind == "link" else folder / content()))
        for target, leads_to in links:
            if not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(folder)):
                self.left_out["named outside the archive"].append(str(target.relative_to(folder)))
            elif not os.path.lexists(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(leads_to)

    @cached_property
    def _walked(self) -> tuple[dict[str, Path | Exception], set[str]]:
        files: dict[str, Path | Exception] = {}
        folders: set[str] = set()
        top = Path(os.path.realpath(self.folder))
        stack = [("", (top,))]  # where the walk is, and the real folders on the way there
        while stack:
            here, way = stack.pop()
            try:
                with os.scandir(way[-1]) as scan:
                    no = {"follow_symlinks": False}
                    entries = [(e.name, e.is_symlink(), e.is_dir(**no), e.is_file(**no)) for e in scan]
            except OSError as error:
                raise UserError(f"{way[-1]}: cannot be listed ({reason(error)})") from error
            for name, is_link, is_folder, is_file in entries:
                shown, real = f"{here}{name}", way[-1] / name
                if name.startswith(".") or name in SYSTEM_NAMES:
                    self.left_out["hidden or of the system"].append(shown)
                    continue
                if is_link:
                    real = Path(os.path.realpath(real))
                    try:
                        if self.key is not None and not real.is_relative_to(top):
                            raise FileNotFoundError  # an archive's links stay within it
                        mode = real.stat().st_mode
                        is_folder, is_file = stat.S_ISDIR(mode), stat.S_ISREG(mode)
                    except OSError as error:
                        nowhere = FileNotFoundError(errno.ENOENT, "a link that leads nowhere")
                        files[shown] = error if isinstance(error, PermissionError) else nowhere
                        continue
                if is_folder and any(step.is_relative_to(real) for step in way):
                    self.left_out["link to a folder above it"].append(shown)
                elif is_folder:
                    folders.add(shown)
                    stack.append((f"{shown}/", (*way, real)))
                elif is_file:
                    files[shown] = real
                else:
                    self.left_out["neither file nor folder"].append(shown)
        files |= self._bad
        return {name: files[name] for name in sorted(files)}, folders

    @property
    def files(self) -> dict[str, Path | Exception]:
        """Relative names, sorted (`"train/cat/1.png"`) → the files, or why one cannot be read."""
        return self._walked[0]

    @property
    def folders(self) -> set[str]:
        """Relative names of the folders, empty ones too."""
        return self._walked[1]

    def read(self, name: str) -> bytes:
        """The content of a file that must be there.

        Raises:
            UserError: it is missing or cannot be read.
        """
        if name not in self.files:
            raise UserError(f"{self.path}: {name} is missing; is the data set official and complete?")
        try:
            return read_file(self.files[name])
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: {name}: cannot be read ({reason(error)})") from error

    def root(self, markers: Iterable[str]) -> str | None:
        """Where a layout starts: `""`, or `"top/"` if folders enclose it; `None` if it is nowhere.

        Args:
            markers: names, one of which the root must hold, such as `("train", "test")`.
        """
        markers, roots = set(markers), set()
        for name in [*self.files, *self.folders]:
            parts = name.split("/")
            if depth := next((i for i, part in enumerate(parts, 1) if part in markers), None):
                roots.add((depth, "".join(f"{part}/" for part in parts[: depth - 1])))
        highest = sorted(root for depth, root in roots if depth == min(roots)[0])
        if len(highest) > 1:
            names = ", ".join(root.rstrip("/") for root in highest)
            raise UserError(f"{self.path}: several data sets inside ({names}); name one of them")
        return highest[0] if highest else None


def _members(path: Path) -> Iterator[tuple[str, str, int, Callable]]:
    """(name as stored, kind, bytes, what gives a file's content or where a link leads) of a zip or tar."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.replace("\\", "/")  # some Windows tools store these, against the specification
                link = stat.S_ISLNK(info.external_attr >> 16)
                kind = "link" if link else "folder" if name.endswith("/") else "file"

                def content(info: zipfile.ZipInfo = info, link: bool = link) -> BinaryIO | str:
                    return os.fsdecode(archive.read(info)) if link else archive.open(info)

                yield name, kind, info.file_size, content
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if member.issym() or member.islnk():
                kind = "link" if member.issym() else "hard link"  # which leads to a name from the top
                yield member.name, kind, 0, lambda member=member: member.linkname
            else:
                kind = "folder" if member.isdir() else "file" if member.isreg() else "other"
                yield member.name, kind, member.size, lambda member=member: archive.extractfile(member)
