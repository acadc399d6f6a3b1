"""Reading zip, tar and folders alike; downloads with a checksum."""

import errno
import hashlib
import http.server
import threading
import zipfile

import pytest
from image_files import one_line, picture, write_folder, write_tar, write_zip

from metaperturb.data import archives
from metaperturb.data.archives import download, open_archive, subfolder_root
from metaperturb.errors import UserError

FILES = {"top/a/2.png": picture(2), "top/a/10.png": picture(10), "top/b/1.txt": b"hello" * 1000}


def _every_form(tmp_path, files):
    return [
        write_zip(tmp_path / "x.zip", files),
        write_tar(tmp_path / "x.tar", files),
        write_tar(tmp_path / "x.tar.gz", files),
        write_folder(tmp_path / "x", files),
    ]


def test_all_forms_hold_the_same_files(tmp_path):
    for path in _every_form(tmp_path, FILES):
        with open_archive(path) as archive:
            assert archive.files == sorted(FILES)
            assert dict(archive.read_each(FILES)) == FILES
            assert archive.read(["top/b/1.txt"]) == {"top/b/1.txt": FILES["top/b/1.txt"]}
            assert archive.crc32("top/a/2.png") == zipfile.ZipFile(tmp_path / "x.zip").getinfo("top/a/2.png").CRC
            assert subfolder_root(archive, ("a",)) == "top/"


def test_content_decides_not_the_name(tmp_path):
    path = write_zip(tmp_path / "x.tar", FILES)
    with open_archive(path) as archive:
        assert archive.files == sorted(FILES)


def test_key_follows_the_content_and_not_the_place(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for write, name in ((write_zip, "x.zip"), (write_tar, "x.tar"), (write_tar, "x.tgz")):
        one = open_archive(write(tmp_path / name, FILES))
        changed = {**FILES, "top/b/1.txt": b"HELLO" * 1000}
        other = open_archive(write(tmp_path / f"other-{name}", changed))
        copy = tmp_path / "elsewhere" / name
        copy.write_bytes((tmp_path / name).read_bytes())
        with one, other, open_archive(copy) as copied:
            assert one.key() == copied.key() != other.key()


def test_folder_key_changes_with_a_file(tmp_path):
    folder = write_folder(tmp_path / "x", FILES)
    before = open_archive(folder).key()
    assert open_archive(folder).key() == before
    (folder / "top/a/3.png").write_bytes(b"new")
    assert open_archive(folder).key() != before


def test_noise_is_invisible(tmp_path):
    noise = ["__MACOSX/top/a/._2.png", "top/.DS_Store", "top/a/Thumbs.db", ".git/config", "top/a/._2.png"]
    for path in _every_form(tmp_path, {**FILES, **dict.fromkeys(noise, b"?")}):
        with open_archive(path) as archive:
            assert archive.files == sorted(FILES)


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_climb_are_ignored_and_nothing_is_written(tmp_path, write, capsys):
    weird = {"../evil.png": b"1", "/abs/evil.png": b"2", "top/../../evil.png": b"3", "C:/evil.png": b"4"}
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    path = write(inside / ("x.zip" if write is write_zip else "x.tar"), {**FILES, **weird, "./top//c/./1.png": b"5"})
    with open_archive(path) as archive:
        assert archive.files == sorted([*FILES, "top/c/1.png"])
        assert dict(archive.read_each(["top/c/1.png"])) == {"top/c/1.png": b"5"}
    assert "4 members" in capsys.readouterr().err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_backslashes_of_windows_zips(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"train\\cat\\1.png": b"1"})
    with open_archive(path) as archive:
        assert archive.files == ["train/cat/1.png"]


def test_links_in_folders(tmp_path):
    folder = write_folder(tmp_path / "x", FILES)
    (folder / "top" / "c").symlink_to(folder / "top" / "a")
    with open_archive(folder) as archive:
        assert "top/c/2.png" in archive.files
    (folder / "top" / "loop").symlink_to(folder)
    with open_archive(folder) as archive:
        assert "top/a/2.png" in archive.files  # and it ends
    (folder / "top" / "broken.png").symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(UserError, match=r"broken\.png: symbolic link to nothing") as error,
        open_archive(folder) as archive,
    ):
        archive.files  # noqa: B018
    one_line(error)


def test_missing_archive(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.zip: no such file") as error:
        open_archive(tmp_path / "nothing.zip")
    one_line(error)


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_truncated_archive(tmp_path, name):
    files = {f"top/a/{i}.png": picture(i, (64, 64)) for i in range(20)}
    path = (write_zip if name == "x.zip" else write_tar)(tmp_path / name, files)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 7])
    with pytest.raises(UserError, match="is the download complete") as error, open_archive(path) as archive:
        archive.files  # noqa: B018
    assert str(path) in one_line(error)


@pytest.mark.parametrize(("name", "what"), [("x.zip", "not a zip file"), ("x.tgz", "neither a zip nor a tar file")])
def test_web_page_instead_of_an_archive(tmp_path, name, what):
    path = tmp_path / name
    path.write_bytes(b"<html>Please log in</html>")
    with pytest.raises(UserError, match=what) as error:
        open_archive(path)
    one_line(error)


def test_damaged_member_spoils_only_itself(tmp_path):
    path = write_zip(tmp_path / "x.zip", FILES)
    info = zipfile.ZipFile(path).getinfo("top/b/1.txt")
    raw = bytearray(path.read_bytes())
    raw[info.header_offset + 45] ^= 0xFF
    path.write_bytes(raw)
    with open_archive(path) as archive:
        found = dict(archive.read_each(FILES))
        assert isinstance(found.pop("top/b/1.txt"), Exception)
        assert found == {name: FILES[name] for name in found}
        with pytest.raises(UserError, match=r"x\.zip: top/b/1\.txt: cannot be read") as error:
            archive.read(["top/b/1.txt"])
        one_line(error)
        with pytest.raises(UserError, match=r"labels\.txt is missing"):
            archive.read(["labels.txt"])


def test_oversized_member_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 2**20)
    path = write_zip(tmp_path / "bomb.zip", {"a": b"\0" * 2**21})
    with open_archive(path) as archive:
        assert isinstance(dict(archive.read_each(["a"]))["a"], ValueError)


# --- downloads


class _Handler(http.server.BaseHTTPRequestHandler):
    content = b"data set " * 100_000
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        if self.path == "/absent":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: 5000 if self.path == "/truncated" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (_Handler,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}", handler
        finally:
            httpd.shutdown()
            thread.join()


MD5 = hashlib.md5(_Handler.content).hexdigest()


def test_download(tmp_path, server):
    url, handler = server
    path = tmp_path / "new" / "set.zip"
    threads = [threading.Thread(target=download, args=(f"{url}/good", path, MD5)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == handler.content
    assert handler.requests == 1
    assert sorted(p.name for p in path.parent.iterdir()) == [".set.zip.lock", "set.zip"]


@pytest.mark.parametrize(
    ("page", "md5", "says"),
    [
        ("good", "0" * 32, f"wrong MD5 {MD5}, expected {'0' * 32}"),
        ("truncated", MD5, "the connection ended after 5000 of 900000 bytes"),
        ("truncated", None, "the connection ended after 5000 of 900000 bytes"),
        ("absent", MD5, "HTTP 404"),
    ],
)
def test_failed_download_leaves_nothing(tmp_path, server, page, md5, says):
    url, _ = server
    path = tmp_path / "set.zip"
    with pytest.raises(UserError) as error:
        download(f"{url}/{page}", path, md5)
    message = one_line(error)
    assert f"{url}/{page}" in message and says in message and str(path) in message
    assert [p.name for p in tmp_path.iterdir()] == [".set.zip.lock"]


def test_no_network(tmp_path, server):
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/set.zip"
    with pytest.raises(UserError, match="download failed") as error:
        download(url, tmp_path / "set.zip", MD5)
    message = one_line(error)
    assert url in message and str(tmp_path / "set.zip") in message


def test_disk_full_while_downloading(tmp_path, server, monkeypatch):
    url, _ = server

    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archives.Path, "rename", full)
    with pytest.raises(UserError, match="the disk is full") as error:
        download(f"{url}/good", tmp_path / "set.zip", MD5)
    one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == [".set.zip.lock"]
