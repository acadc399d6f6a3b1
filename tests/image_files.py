"""Small real image files and archives for the tests of the data package."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (24, 20), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded image of random low-frequency content; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind)
    return buffer.getvalue()


def expected_pixels(content: bytes, size: int) -> np.ndarray:
    """An independent decode: uint8 [3, size, size]."""
    with Image.open(io.BytesIO(content)) as image:
        rgb = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.moveaxis(np.array(rgb), -1, 0)


def folder_layout(train: int = 3, test: int = 2, classes: tuple[str, ...] = ("cat", "dog")) -> dict[str, bytes]:
    """Files of an image folder, {name: content}."""
    files = {}
    for c, name in enumerate(classes):
        for split, count in (("train", train), ("test", test)):
            for i in range(count):
                files[f"{split}/{name}/{i}.png"] = picture(1000 * c + 100 * (split == "test") + i)
    return files


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    mode = "w:gz" if path.suffix in (".gz", ".tgz") else "w"
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def one_line(error) -> str:
    """The message of a caught UserError, which must be a single line without a traceback's or a repr's noise."""
    message = str(error.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message
