"""One walk through folders, zips and tars; downloads with a checksum."""

import errno
import io
import os
import tarfile
import threading
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from image_files import md5, one_line, picture, served, write_folder, write_tar, write_zip

from metaperturb.data import files as module
from metaperturb.data.files import Place, read_file
from metaperturb.data.official import _downloaded
from metaperturb.errors import UserError

FILES = {"top/a/2.png": picture(2), "top/a/10.png": picture(10), "top/b/1.txt": b"hello" * 1000}
DEEP = "/".join(["top", "a", *"123456789", "x.png"])


@pytest.fixture
def place():
    """`Place`, whose archives stay unpacked until the test ends."""
    with ExitStack() as stack:
        yield lambda path: Place(path, stack)


def contents(place: Place) -> dict[str, bytes]:
    return {name: place.read(name) for name in place.files}


def every_form(tmp_path, files):
    return [
        write_zip(tmp_path / "x.zip", files),
        write_tar(tmp_path / "x.tar", files),
        write_tar(tmp_path / "x.tar.gz", files),
        write_folder(tmp_path / "x", files),
    ]


def write_linked_tar(path: Path, links: dict[str, tuple[bytes, str]], files=FILES) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, (kind, target) in links.items():  # before the files that they lead to
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_all_forms_hold_the_same_files(tmp_path, place):
    noise = ["__MACOSX/top/a/._2.png", "top/.DS_Store", "top/a/Thumbs.db", ".git/config", "top/a/@eaDir/2.png/S.jpg"]
    wanted = {**FILES, DEEP: b"deep"}
    for path in every_form(tmp_path, {**wanted, **dict.fromkeys(noise, b"?")}):
        found = place(path)
        assert list(found.files) == sorted(wanted) and contents(found) == wanted
        assert found.folders >= {"top", "top/a", "top/b"} and found.root(("a",)) == "top/"
        hidden = found.left_out["hidden or of the system"]
        assert {"top/.DS_Store", "top/a/Thumbs.db", "top/a/@eaDir"} <= set(hidden)


def test_content_decides_not_the_name(tmp_path, place):
    assert contents(place(write_zip(tmp_path / "x.tar", FILES))) == FILES
    assert list(place(write_zip(tmp_path / "y.zip", {"train\\cat\\1.png": b"1"})).files) == ["train/cat/1.png"]


def test_an_archive_is_unpacked_once_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with ExitStack() as stack:
        found = Place(write_zip(tmp_path / "x.zip", FILES), stack)
        assert not list((tmp_path / "tmp").iterdir())  # before somebody asks for a file
        assert contents(found) == FILES and len(list((tmp_path / "tmp").iterdir())) == 1
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_climb_are_counted_and_nothing_is_written(tmp_path, place, write):
    weird = {"../evil.png": b"1", "/abs/evil.png": b"2", "top/../../evil.png": b"3", "C:/evil.png": b"4"}
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    found = place(write(inside / "x", {**FILES, **weird, "./top//c/./1.png": b"5"}))
    assert contents(found) == {**FILES, "top/c/1.png": b"5"}
    assert sorted(found.left_out["named outside the archive"]) == sorted(weird)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [inside / "x"]


def test_links(tmp_path, place):
    """Files and folders that are linked count; a link to a folder above is no second copy of all."""
    folder = write_folder(tmp_path / "x", FILES)
    (folder / "top/c").symlink_to("a")
    (folder / "top/b/3.png").symlink_to("../a/2.png")
    (folder / "top/b/4.png").hardlink_to(folder / "top/a/2.png")
    (folder / "top/a/up").symlink_to("..")
    (folder / "top/b/self").symlink_to(folder)
    (folder / "top/broken.png").symlink_to(tmp_path / "nowhere")
    links = {
        "top/c": (tarfile.SYMTYPE, "a"),
        "top/b/3.png": (tarfile.SYMTYPE, "../a/2.png"),
        "top/b/4.png": (tarfile.LNKTYPE, "top/a/2.png"),
        "top/a/up": (tarfile.SYMTYPE, ".."),
        "top/b/self": (tarfile.SYMTYPE, "../.."),
        "top/broken.png": (tarfile.SYMTYPE, "nowhere"),
    }
    again = dict.fromkeys(("top/b/3.png", "top/b/4.png", "top/c/2.png"), FILES["top/a/2.png"])
    wanted = {**FILES, **again, "top/c/10.png": FILES["top/a/10.png"]}
    for path in (folder, write_linked_tar(tmp_path / "x.tar", links)):
        found = place(path)
        assert set(found.files) == {*wanted, "top/broken.png"}
        assert {name: found.read(name) for name in wanted} == wanted
        assert sorted(found.left_out["link to a folder above it"]) == ["top/a/up", "top/b/self", "top/c/up"]
        with pytest.raises(UserError, match=r"top/broken\.png: cannot be read \(.*link that leads nowhere") as error:
            found.read("top/broken.png")
        one_line(error)


@pytest.mark.parametrize("target", ["/etc/hostname", "../../../../../../../etc/hostname"])
def test_links_of_an_archive_stay_within_it(tmp_path, place, target):
    found = place(write_linked_tar(tmp_path / "x.tar", {"top/out": (tarfile.SYMTYPE, target)}))
    with pytest.raises(OSError, match="leads nowhere"):
        read_file(found.files["top/out"])
    way = {"top/way": (tarfile.SYMTYPE, str(tmp_path)), "top/way/evil": (tarfile.SYMTYPE, "../a/2.png")}
    place(write_linked_tar(tmp_path / "y.tar", way, {**FILES, "top/way/x.png": b"x"})).files  # noqa: B018
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar", "y.tar"]


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_truncated_archive(tmp_path, place, name):
    files = {f"top/a/{i}.png": picture(i, (64, 64)) for i in range(20)}
    path = (write_zip if name == "x.zip" else write_tar)(tmp_path / name, files)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 7])
    with pytest.raises(UserError, match="is the download complete") as error:
        place(path).files  # noqa: B018
    assert str(path) in one_line(error)


def test_no_archive(tmp_path, place):
    path = tmp_path / "x.zip"
    with pytest.raises(UserError, match=r"x\.zip: no such file") as error:
        place(path)
    one_line(error)
    path.write_bytes(b"<html>Please log in</html>")
    with pytest.raises(UserError, match="not a zip or tar file that can be read") as error:
        place(path).files  # noqa: B018
    one_line(error)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: neither a folder nor a zip or tar file") as error:
        place(tmp_path / "pipe")
    one_line(error)


def test_damaged_or_oversized_member_spoils_only_itself(tmp_path, place, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 2**20)
    path = write_zip(tmp_path / "x.zip", {**FILES, "top/bomb": b"\0" * 2**21})
    info = zipfile.ZipFile(path).getinfo("top/b/1.txt")
    raw = bytearray(path.read_bytes())
    raw[info.header_offset + 45] ^= 0xFF
    path.write_bytes(raw)
    found = place(path)
    assert list(found.files) == sorted([*FILES, "top/bomb"])
    assert found.read("top/a/2.png") == FILES["top/a/2.png"]
    for name, says in (
        ("top/b/1.txt", "cannot be read"),
        ("top/bomb", "larger than 1 MiB"),
        ("none", "none is missing"),
    ):
        with pytest.raises(UserError, match=rf"x\.zip: {says if name == 'none' else name}") as error:
            found.read(name)
        assert says in one_line(error)
    large = write_folder(tmp_path / "x", {"bomb": b"\0" * 2**21})
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        read_file(place(large).files["bomb"])


def test_no_room_to_unpack(tmp_path, place, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_tar(tmp_path / "x.tar", FILES)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot be unpacked \(No space left.*TMPDIR names another place") as error:
        place(path).files  # noqa: B018
    one_line(error)


# --- downloads


CONTENT = b"data set " * 100_000


@pytest.fixture
def server(tmp_path):
    folder = write_folder(tmp_path / "server", {"good": CONTENT, "truncated": CONTENT[:5000]})
    with served(folder) as found:
        yield found


def test_download(tmp_path, server):
    url, asked = server
    path = tmp_path / "new" / "set.zip"
    threads = [threading.Thread(target=_downloaded, args=(path, f"{url}/good", md5(CONTENT), True)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == CONTENT
    assert len(asked) <= 2  # torchvision first asks where the address leads
    assert sorted(p.name for p in path.parent.iterdir()) == [".set.zip.lock", "set.zip"]


@pytest.mark.parametrize("page", ["other", "truncated", "absent", "closed"])
def test_failed_download_leaves_nothing(tmp_path, server, page):
    url = server[0] if page != "closed" else "http://127.0.0.1:9"  # nothing listens there
    url = f"{url}/{'good' if page == 'other' else page}"
    path = tmp_path / "root" / "set.zip"
    with pytest.raises(UserError, match=r"failed; fetch set\.zip by other means") as error:
        _downloaded(path, url, md5(b"" if page == "other" else CONTENT), True)
    message = one_line(error)
    assert url in message and str(path) in message
    assert page != "absent" or "404" in message
    assert [p.name for p in path.parent.iterdir()] == [".set.zip.lock"]


def test_disk_full_while_downloading(tmp_path, server, monkeypatch):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match="the disk is full") as error:
        _downloaded(tmp_path / "root" / "set.zip", f"{server[0]}/good", md5(CONTENT), True)
    one_line(error)
    assert [p.name for p in (tmp_path / "root").iterdir()] == [".set.zip.lock"]
