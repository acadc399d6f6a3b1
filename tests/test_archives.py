"""One walk through folders, zips and tars; downloads with a checksum."""

import http.server
import os
import re
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest
from image_files import Link, disk_full, md5, picture, refusal, refused, write_folder, write_tar, write_zip

from metaperturb.data import files as module
from metaperturb.data import official
from metaperturb.data.files import Place

FILES = {"top/a/2.png": picture(2), "top/a/10.png": picture(10), "top/b/1.txt": b"hello" * 1000}


@pytest.fixture
def place():
    """`Place`, whose archives stay unpacked until the test ends."""
    with ExitStack() as stack:
        yield lambda path: Place(path, stack)


def contents(place: Place) -> dict[str, bytes]:
    return {name: place.read(name) for name in place.files}


def test_all_forms_hold_the_same_files(tmp_path, place):
    noise = ["__MACOSX/top/a/._2.png", "top/.DS_Store", "top/a/Thumbs.db", ".git/config", "top/a/@eaDir/2.png/S.jpg"]
    wanted = {**FILES, "top/a/1/2/3/4/5/6/7/8/9/x.png": b"deep", "top/a/\n.png": b"odd"}
    forms = [(write_zip, "x.zip"), (write_tar, "x.tar"), (write_tar, "x.tar.gz"), (write_folder, "x")]
    forms.append((write_zip, "y.tar"))  # the content decides, not the name
    for write, name in forms:
        found = place(write(tmp_path / name, {**wanted, **dict.fromkeys(noise, b"?")}))
        assert list(found.files) == sorted(wanted) and contents(found) == wanted
        assert refusal(found.read, "none").startswith(f"{found.path}: none is missing")
        assert found.folders >= {"top", "top/a", "top/b"} and found.root(("a",)) == "top/"
    for files in ({"train\\cat\\1.png": b"1"}, {"./train//cat/./1.png": b"1"}, {"/train/cat/1.png": b"1"}):
        assert list(place(write_zip(tmp_path / "z.zip", files)).files) == ["train/cat/1.png"]
    assert list(place(write_tar(tmp_path / "z.tar", files)).files) == ["train/cat/1.png"]  # of `tar -P`


def test_an_archive_is_unpacked_once_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with ExitStack() as stack:
        found = Place(write_zip(tmp_path / "x.zip", FILES), stack)
        assert not list((tmp_path / "tmp").iterdir())  # before somebody asks for a file
        assert contents(found) == FILES and len(list((tmp_path / "tmp").iterdir())) == 1
    assert not list((tmp_path / "tmp").iterdir())


def test_links(tmp_path, place):
    """Files and folders that are linked count; a link to a folder above is no second copy of all."""
    links = {
        "top/c": Link("a"),
        "top/b/3.png": Link("../a/2.png"),
        "top/b/4.png": Link("top/a/2.png", hard=True),
        "top/a/up": Link(".."),
        "top/b/self": Link("../.."),
        "top/broken.png": Link("nowhere"),
        "top/circle.png": Link("circle.png"),
    }
    again = dict.fromkeys(("top/b/3.png", "top/b/4.png", "top/c/2.png"), FILES["top/a/2.png"])
    wanted = {**FILES, **again, "top/c/10.png": FILES["top/a/10.png"]}
    for write in (write_folder, write_tar):
        found = place(write(tmp_path / write.__name__, {**FILES, **links}))
        assert set(found.files) == {*wanted, "top/broken.png", "top/circle.png"}
        assert {name: found.read(name) for name in wanted} == wanted
        for name in ("top/broken.png", "top/circle.png"):
            assert f"{name}: cannot be read (" in refusal(found.read, name)


EVIL = [{"top/out": Link("/etc/hostname")}, {"top/out": Link("../../../../../etc/hostname")}]
EVIL += [{"../evil.png": b"1"}, {"top/../../evil.png": b"1"}, {"way": Link("."), "way/../../evil.png": b"1"}]


@pytest.mark.parametrize("files", EVIL)
def test_nothing_of_an_archive_is_outside_of_it(tmp_path, place, files):
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    says = r"not a zip or tar file that can be read \(.* is a link to|outside the destination"
    refused(says, lambda: place(write_tar(inside / "x.tar", {**FILES, **files})).files)
    if all(isinstance(content, bytes) for content in files.values()):  # a zip's links are files
        assert place(write_zip(inside / "x.zip", files)).files
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} <= {"x.tar", "x.zip"}


def test_what_is_no_archive_or_no_whole_one(tmp_path, place):
    files = {f"top/a/{i}.png": picture(i, (64, 64)) for i in range(20)}

    def damaged(name: str, damage) -> str:
        path = (write_zip if name == "x.zip" else write_tar)(tmp_path / name, files)
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        return refusal(lambda: place(path).files)

    def flipped(whole: bytes) -> bytes:
        return whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]

    with tarfile.open(write_tar(tmp_path / "whole.tar", files)) as archive:
        starts = [member.offset for member in archive]
    cut = [(name, lambda whole: whole[: len(whole) // 2 + 7]) for name in ("x.zip", "x.tar.gz")]
    cut += [("x.tar", lambda whole, end=end: whole[:end]) for end in (starts[9], starts[9] + 100, starts[9] + 700)]
    cut += [("x.tar", lambda whole: whole[: starts[9]] + b"?" * 512 + whole[starts[9] + 512 :])]
    cut += [("x.zip", flipped), ("x.tar.gz", flipped), ("x.tar", lambda _: b"<html>Please log in</html>")]
    for name, damage in [*cut, ("x.zip", lambda _: b"")]:
        message = damaged(name, damage)
        assert message.startswith(f"{tmp_path / name}: not a zip or tar file that can be read (")
        assert message.endswith("is the download complete?")
    assert "none: no such file or folder" in refusal(place, tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: neither a folder nor a zip or tar file" in refusal(place, tmp_path / "pipe")


def test_no_room_to_unpack(tmp_path, place):
    path = write_tar(tmp_path / "x.tar", FILES)
    with disk_full(2000):
        message = refusal(lambda: place(path).files)
    assert "cannot be unpacked into" in message and message.endswith("(File too large); TMPDIR names another place")


# --- downloads


CONTENT = b"data set " * 100_000


@pytest.fixture
def download(tmp_path, monkeypatch):
    """Fetches root/set.zip from a folder of a server, with a checksum; and what the server was asked for."""
    path, asked = tmp_path / "root" / "set.zip", []
    served = write_folder(tmp_path / "server", {"good/set.zip": CONTENT, "truncated/set.zip": CONTENT[:5000]})

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    def fetch(folder="good", content=CONTENT):
        address = "http://127.0.0.1:9" if folder == "closed" else f"http://127.0.0.1:{server.server_port}/{folder}"
        monkeypatch.setitem(official.FILES, path.name, {f"{address}/set.zip": md5(content)})
        return official._fetched(path, True)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield fetch, asked
        server.shutdown()
    assert sorted(p.name for p in path.parent.iterdir()) in ([".set.zip.lock"], [".set.zip.lock", "set.zip"])


def test_download(download):
    fetch, asked = download
    with ThreadPoolExecutor(3) as pool:
        paths = [*pool.map(lambda _: fetch(), range(3))]
    assert paths[0].read_bytes() == CONTENT
    assert len(asked) <= 2  # torchvision first asks where the address leads


@pytest.mark.parametrize("page", ["other", "truncated", "absent", "closed"])
def test_failed_download_leaves_nothing(tmp_path, download, page):
    arguments = ("good", b"") if page == "other" else (page,)
    message = refusal(download[0], *arguments)
    says = rf"root/set.zip: download from http\S+/set.zip failed; fetch set.zip by other means to {tmp_path}"
    assert re.search(says, message)
    assert (page == "absent") == ("HTTP Error 404" in message) and not (tmp_path / "root/set.zip").exists()
