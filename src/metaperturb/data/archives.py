"""Images where they lie: one way of reading zip files, tar files and folders, and downloads with a checksum.

Nothing is ever extracted to disk. Member names are normalized (`./a//b` → `a/b`); hidden files,
`__MACOSX` and `Thumbs.db` are invisible, and so are names that are absolute or climb with `..`.
"""

import contextlib
import hashlib
import http.client
import lzma
import os
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from metaperturb.data.disk import Progress, disk_errors, file_lock
from metaperturb.errors import UserError

# The largest published image of the supported sets is a few MB; a member beyond this is a mistake or a zip bomb.
MAX_MEMBER_BYTES = 256 * 2**20
# Deep enough for any supported layout, and it ends a walk through a symbolic link that points to its own
# parent.
_MAX_DEPTH = 8
_COMPRESSED_TAR = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
# What the decompressors and parsers of the standard library raise on damaged input.
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,  # encrypted zip member
    NotImplementedError,  # compression method that zipfile lacks
    ValueError,
)


def _normalize(name: str) -> str | None:
    """A member name as a clean relative path, `""` for the root, or `None` if it is absolute or climbs."""
    if name.startswith("/") or name[1:2] == ":":
        return None
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if ".." in parts else "/".join(parts)


def _is_noise(name: str) -> bool:
    parts = name.split("/")
    return any(p.startswith(".") or p == "__MACOSX" for p in parts) or parts[-1] in (
        "Thumbs.db",
        "desktop.ini",
    )


class Archive(ABC):
    """The files of a zip, a tar or a folder; use as a context manager.

    Attributes:
        path: where it is.
        files: sorted names of the files, `"train/cat/1.png"`.
        folders: names of the folders that the archive lists, empty ones too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, Any] | None = None
        self._folders: set[str] = set()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 (a folder has none)
        """Close the underlying file, if any."""

    @abstractmethod
    def key(self) -> str:
        """Hex digest that changes when the content does, found without reading the content."""

    @abstractmethod
    def _list(self) -> Iterator[tuple[str, Any, bool]]:
        """Yield (name as stored, member, whether it is a folder)."""

    @abstractmethod
    def _size(self, member: Any) -> int:
        """Bytes of the content."""

    @abstractmethod
    def _offset(self, member: Any) -> Any:
        """Sort key under which reading goes through the archive once, forwards."""

    @abstractmethod
    def _read(self, member: Any) -> bytes:
        """The content."""

    def _scan(self) -> dict[str, Any]:
        if self._members is None:
            members: dict[str, Any] = {}
            unsafe = 0
            try:
                for stored, member, is_folder in self._list():
                    name = _normalize(stored)
                    if name is None:
                        unsafe += 1
                    elif name and not _is_noise(name):
                        if is_folder:
                            self._folders.add(name)
                        else:
                            members[name] = member
            except _DAMAGE as error:
                raise UserError(f"{self.path}: damaged ({error}); is the download complete?") from error
            if unsafe:
                print(f"{self.path}: {unsafe} members with absolute or '..' names ignored", file=sys.stderr)
            self._members = {name: members[name] for name in sorted(members)}
        return self._members

    @property
    def files(self) -> list[str]:
        return list(self._scan())

    @property
    def folders(self) -> set[str]:
        self._scan()
        return self._folders

    def read_each(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | Exception]]:
        """Yield (name, content) for each of `names`, in the order in which they are stored.

        A member that cannot be read yields its exception instead of bytes; the others still come.
        """
        members = self._scan()
        for name in sorted(names, key=lambda n: self._offset(members[n])):
            try:
                if self._size(members[name]) > MAX_MEMBER_BYTES:
                    raise ValueError(f"larger than {MAX_MEMBER_BYTES >> 20} MiB")
                content: bytes | Exception = self._read(members[name])
            except _DAMAGE as error:
                content = error
            yield name, content

    def read(self, names: Iterable[str]) -> dict[str, bytes]:
        """The content of the named files, all of which must be there and readable.

        Raises:
            UserError: naming the first that is missing or damaged.
        """
        names = list(names)
        for name in names:
            if name not in self._scan():
                raise UserError(f"{self.path}: {name} is missing; is this the official archive, and complete?")
        contents: dict[str, bytes] = {}
        for name, content in self.read_each(names):
            if isinstance(content, Exception):
                raise UserError(f"{self.path}: {name}: cannot be read ({content})") from content
            contents[name] = content
        return contents

    def crc32(self, name: str) -> int:
        """CRC-32 of a file's content."""
        return zlib.crc32(self.read([name])[name])


class _Zip(Archive):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except PermissionError as error:
            raise UserError(f"{path}: no permission to read it") from error
        except _DAMAGE as error:
            raise UserError(f"{path}: not a zip file (is the download complete?)") from error

    def close(self) -> None:
        self._zip.close()

    def key(self) -> str:
        rows = sorted(f"{i.filename}:{i.CRC:08x}:{i.file_size}" for i in self._zip.infolist())
        return _digest(rows)

    def _list(self) -> Iterator[tuple[str, Any, bool]]:
        for info in self._zip.infolist():
            # Some Windows tools store backslashes, against the zip specification.
            yield info.filename.replace("\\", "/"), info, info.is_dir() or info.filename.endswith("\\")

    def _size(self, member: zipfile.ZipInfo) -> int:
        return member.file_size

    def _offset(self, member: zipfile.ZipInfo) -> int:
        return member.header_offset

    def _read(self, member: zipfile.ZipInfo) -> bytes:
        return self._zip.read(member)  # verifies the CRC

    def crc32(self, name: str) -> int:
        return self._scan()[name].CRC


class _Tar(Archive):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with path.open("rb") as file:
                self._compressed = file.read(6).startswith(_COMPRESSED_TAR)
            self._tar = tarfile.open(path)  # noqa: SIM115 (close() closes it)
        except PermissionError as error:
            raise UserError(f"{path}: no permission to read it") from error
        except _DAMAGE as error:
            raise UserError(f"{path}: neither a zip nor a tar file (is the download complete?)") from error

    def close(self) -> None:
        self._tar.close()

    def key(self) -> str:
        """From the size, the first and the last MiB: listing a compressed tar means to decompress it all.

        A compressed file ends in the checksum of its content; of an uncompressed one, the headers are taken
        too.
        """
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            first = file.read(2**20)
            file.seek(max(0, size - 2**20))
            last = file.read()
        rows = [str(size), hashlib.sha256(first).hexdigest(), hashlib.sha256(last).hexdigest()]
        if not self._compressed:
            rows += [f"{n}:{m.size}:{m.mtime}" for n, m in self._scan().items()]
        return _digest(rows)

    def _list(self) -> Iterator[tuple[str, Any, bool]]:
        for member in self._tar:
            if member.isreg() or member.isdir():
                yield member.name, member, member.isdir()

    def _size(self, member: tarfile.TarInfo) -> int:
        return member.size

    def _offset(self, member: tarfile.TarInfo) -> int:
        return member.offset_data

    def _read(self, member: tarfile.TarInfo) -> bytes:
        file = self._tar.extractfile(member)
        assert file is not None  # only regular files are listed
        content = file.read()
        if len(content) != member.size:
            raise EOFError("unexpected end of the archive")
        return content


class _Folder(Archive):
    def key(self) -> str:
        stats = ((name, path.stat()) for name, path in self._scan().items())
        return _digest([f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in stats])

    def _list(self) -> Iterator[tuple[str, Any, bool]]:
        def refuse(error: OSError) -> None:
            raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error

        for folder, subfolders, files in os.walk(self.path, onerror=refuse, followlinks=True):
            here = Path(folder).relative_to(self.path)
            # Hidden folders (.git, caches) may be large: do not even walk them.
            subfolders[:] = [s for s in subfolders if not _is_noise(s) and len(here.parts) < _MAX_DEPTH]
            for name in subfolders:
                yield (here / name).as_posix(), None, True
            for name in files:
                path = Path(folder, name)
                if _is_noise(name):
                    continue
                if path.is_symlink() and not path.exists():
                    raise UserError(f"{path}: symbolic link to nothing; mend or remove it")
                if path.is_file():
                    yield (here / name).as_posix(), path, False

    def _size(self, member: Path) -> int:
        return member.stat().st_size

    def _offset(self, member: Path) -> str:
        return str(member)

    def _read(self, member: Path) -> bytes:
        return member.read_bytes()


def _digest(rows: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()


def open_archive(path: str | Path) -> "Archive":
    """Open a zip, a tar (plain, .gz, .bz2, .xz) or a folder for reading; the content decides, not the name.

    Raises:
        UserError: there is nothing at `path`, or it is none of these (a truncated download, a web page).

    Example:
        >>> with open_archive("data/tiny-imagenet-200.zip") as archive:  # doctest: +SKIP
        ...     archive.files[0]
        'tiny-imagenet-200/test/images/test_0.JPEG'
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        with path.open("rb") as file:
            looks_like_zip = file.read(2) == b"PK"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if looks_like_zip or path.suffix.lower() == ".zip":
        return _Zip(path)
    return _Tar(path)


def subfolder_root(archive: Archive, markers: Iterable[str]) -> str | None:
    """Where the layout starts: `""`, or `"top/"` if it is enclosed in one folder; `None` if it is
    nowhere.

    Args:
        archive: what to look into.
        markers: names, one of which the root must hold, such as `("train", "test")`.
    """
    markers = set(markers)
    tops = set()
    for name in [*archive.files, *archive.folders]:
        parts = name.split("/")
        if parts[0] in markers:
            return ""
        if len(parts) > 1 and parts[1] in markers:
            tops.add(parts[0])
    if len(tops) > 1:
        raise UserError(f"{archive.path}: several data sets inside ({', '.join(sorted(tops))}); name one of them")
    return f"{tops.pop()}/" if tops else None


def download(url: str, path: Path, md5: str | None) -> None:
    """Fetch `url` to `path` unless it is there; several processes may call this at once.

    The file is written beside `path` and takes its name only after the checksum was found right, so
    `path` is always whole.

    Args:
        url: what to fetch.
        path: where to.
        md5: expected MD5 in hex; `None`: only the length that the server announces is checked.

    Raises:
        UserError: no network, the server refuses, wrong length or checksum, disk full.
    """
    if path.exists():
        return
    with file_lock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        part = path.with_name(f"{path.name}.part")
        try:
            found = _fetch(url, part, path)
            if md5 is not None and found != md5:
                raise UserError(
                    f"{url}: wrong MD5 {found}, expected {md5}; the download was damaged or the file has changed: "
                    f"try again, or place the right file at {path}"
                )
            with disk_errors(path, "save the download"):
                part.rename(path)
        finally:
            with contextlib.suppress(OSError):  # of a failed download; after a good one it is gone
                part.unlink()


def _fetch(url: str, part: Path, final: Path) -> str:
    """Write `url` to `part`; returns the MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    request = urllib.request.Request(url, headers={"User-Agent": "metaperturb"})

    def network(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(error, urllib.error.HTTPError):
                reason = f"HTTP {error.code} {error.reason}"
                error.close()
            raise UserError(f"{url}: download failed ({reason}); fetch it by other means to {final}") from error

    with network(lambda: urllib.request.urlopen(request, timeout=60)) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        received = 0
        with Progress(f"download {url}", total, "B", scale=True) as progress:
            with disk_errors(part, "save the download"):
                file = part.open("wb")
            with file:
                while chunk := network(lambda: response.read(2**20)):
                    with disk_errors(part, "save the download"):
                        file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    progress.add(len(chunk))
                with disk_errors(part, "save the download"):
                    file.flush()
            if total is not None and received != total:
                raise UserError(
                    f"{url}: the connection ended after {received} of {total} bytes; try again, or fetch it by other "
                    f"means to {final}"
                )
    return digest.hexdigest()
