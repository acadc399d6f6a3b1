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

from metaperturb.errors import UserError
from metaperturb.storage import reason

# The largest published image of the supported sets is a few MB; a file beyond this is a mistake or a zip bomb.
MAX_FILE_BYTES = 256 * 2**20
# What file managers and network storage put beside images; whatever begins with a dot is left out, too.
SYSTEM_NAMES = {
    *("__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),
    *("@eaDir", "@tmp", "@sharebin", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "lost+found"),
    *("Icon\r", "ZbThumbnail.info"),
}
# What the standard library raises on damaged or encrypted members of a zip, and on damaged archives.
_DAMAGED_MEMBER = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)
_DAMAGE = (*_DAMAGED_MEMBER, tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError)
_IMPOSSIBLE_NAME = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


def is_passing(error: BaseException) -> bool:
    """Whether reading failed for a reason of the system (permission, input/output): no property of the data."""
    return isinstance(error, OSError) and error.errno is not None


def printable(name: str) -> str:
    """A name as messages have it: on one line, and all of it Unicode."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def read_file(file: Path | Exception) -> bytes:
    """The content of one of `Place.files`.

    Raises:
        OSError: it cannot be read, or is a link that leads nowhere.
        ValueError: it is too large for an image, or damaged within its archive.
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
                cannot = f"cannot be unpacked into {folder.parent} ({reason(error)}); TMPDIR names another place"
                raise UserError(f"{self.path}: {cannot}") from error
            cannot = f"not a zip or tar file that can be read ({reason(error).removesuffix(':')})"
            raise UserError(f"{self.path}: {cannot}; is the download complete?") from error
        return folder

    def _unpack(self, folder: Path) -> None:
        """Files first, then links, so that nothing is written through a link."""
        links: list[tarfile.TarInfo] = []
        with self.path.open("rb") as file:
            members = _of_zip if file.read(2) == b"PK" else _of_tar
        for member, unpack in members(self.path, folder):
            shown = "/".join(part for part in member.name.split("/") if part not in ("", "."))
            try:
                if ".." in shown.split("/"):
                    self.left_out["named outside the archive"].append(member.name)
                elif member.size > MAX_FILE_BYTES:
                    self._bad[shown] = ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
                elif member.issym() or member.islnk():
                    links.append(member.replace(name=shown))
                elif member.isfile() or member.isdir():
                    unpack()
                else:
                    self.left_out["neither file nor folder"].append(shown)
            except OSError as error:
                if error.errno not in _IMPOSSIBLE_NAME:
                    raise
                self._bad[shown] = ValueError(reason(error))
            except _DAMAGED_MEMBER as error:
                if members is _of_tar:  # whose stream is damaged as a whole
                    raise
                self._bad[shown] = ValueError(reason(error))
        for link in links:
            place = folder / link.name
            try:
                tarfile.data_filter(link, folder)  # that it stays within the folder
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(link.linkname) if link.issym() else place.hardlink_to(folder / link.linkname)
            except FileExistsError:  # a name stored twice
                pass
            except (OSError, tarfile.FilterError):
                self._bad[link.name] = ValueError("a link that leads nowhere")

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
                    entries = list(scan)
            except OSError as error:
                raise UserError(f"{way[-1]}: cannot be listed ({reason(error)})") from error
            for entry in entries:
                shown, real = f"{here}{entry.name}", Path(entry.path)
                if entry.name.startswith(".") or entry.name in SYSTEM_NAMES:
                    self.left_out["hidden or of the system"].append(shown)
                    continue
                if entry.is_symlink():
                    real = Path(os.path.realpath(real))
                try:
                    if entry.is_symlink() and entry.is_dir() and any(step.is_relative_to(real) for step in way):
                        self.left_out["link to a folder above it"].append(shown)
                    elif entry.is_dir():
                        folders.add(shown)
                        stack.append((f"{shown}/", (*way, real)))
                    elif entry.is_file():
                        files[shown] = real
                    elif entry.is_symlink():
                        files[shown] = FileNotFoundError(errno.ENOENT, "a link that leads nowhere")
                    else:
                        self.left_out["neither file nor folder"].append(shown)
                except OSError as error:  # a link in a circle, or into a folder that must not be entered
                    files[shown] = error
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
        paths = [name.split("/") for name in [*self.files, *self.folders]]
        markers = {*markers}
        roots = {tuple(path[: min(map(path.index, found))]) for path in paths if (found := markers.intersection(path))}
        highest = sorted("".join(f"{part}/" for part in root) for root in roots if len(root) == min(map(len, roots)))
        if len(highest) > 1:
            names = ", ".join(root.rstrip("/") for root in highest)
            raise UserError(f"{self.path}: several data sets inside ({names}); name one of them")
        return highest[0] if highest else None


# What an archive holds: each member as tarfile describes it, and what unpacks it.
_Members = Iterator[tuple[tarfile.TarInfo, Callable[[], object]]]


def _of_zip(path: Path, folder: Path) -> _Members:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            info.filename = info.filename.replace("\\", "/")  # some Windows tools store these
            member = tarfile.TarInfo(info.filename)
            member.size = info.file_size
            if stat.S_ISLNK(info.external_attr >> 16):
                member.type, member.linkname = tarfile.SYMTYPE, os.fsdecode(archive.read(info))
            yield member, lambda info=info: archive.extract(info, folder)


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


def _of_tar(path: Path, folder: Path) -> _Members:
    with tarfile.open(path, tarinfo=_Member) as archive:
        for member in archive:
            yield member, lambda member=member: archive.extract(member, folder, set_attrs=False, filter="data")
        while archive.fileobj.read(2**20):  # where it is compressed, its checksum comes last
            pass
