"""φ files: ours and the authors', what is refused and how, and writing that is complete or absent."""

import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import disk_full, refusal

from metaperturb import MetaPerturb, PerturbSite, UserError, attach, load_phi, models, save_phi
from metaperturb.storage import save_tensors
from metaperturb.weights import phi_digest

AUTHORS = {
    "phi_1.w_identity": ("self1", (1, 1, 3, 3)),
    "phi_1.w_all": ("all1", (1, 1, 3, 3)),
    "phi_2.w_identity": ("self2", (1, 1, 3, 3)),
    "phi_2.w_all": ("all2", (1, 1, 3, 3)),
    "kernel": ("scale_kernels", (4, 1, 3, 3)),
    "fc.weight": ("scale_affine", (1, 10)),
}


def make_phi(seed=0):
    torch.manual_seed(seed)
    phi = MetaPerturb()
    phi.flat.data.normal_()
    return phi


def authors_state(phi):
    """φ under the authors' names and shapes."""
    return {theirs: getattr(phi, ours).detach().reshape(shape) for theirs, (ours, shape) in AUTHORS.items()}


def assert_loads(path, phi=None):
    """What is loaded has the values of `phi`, computes the same and is constant (Algorithm 2)."""
    phi, loaded = phi or make_phi(), load_phi(path)
    assert isinstance(loaded, MetaPerturb) and torch.equal(phi.flat, loaded.flat) and not loaded.flat.requires_grad
    h, noise = torch.randn(2, 3, 4, 6, 6)
    assert torch.equal(*(PerturbSite(one, 4, 16, 32)(h, noise=noise) for one in (phi, loaded)))


def refused(path):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        message = refusal(load_phi, path)
    assert not warned and str(path) in message  # that one line is all the user sees
    return message


# --- round trips


def test_save_and_load(tmp_path, monkeypatch):
    phi, path = make_phi(), tmp_path / "deep" / "folder" / "φ file.pt"
    card = {"data": "embedded", "steps": 750, "seeds": [0, 1], "accuracy": {"s-cifar100": 0.34}, "note": None}
    save_phi(phi, str(path), card=card)  # makes the folder
    assert phi.flat.requires_grad and torch.equal(phi.flat, make_phi().flat)
    assert_loads(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = load_phi("~/deep/folder/φ file.pt")
    assert loaded.card == card
    save_phi(loaded, "~/deep/folder/again.pt")
    monkeypatch.undo()
    again = path.with_name("again.pt")
    assert_loads(again)
    assert load_phi(again).card == {} and not load_phi(again).scale_free
    assert path.stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(path.parent)) == ["again.pt", "φ file.pt"]


def test_loading_draws_nothing_and_inference_mode_leaves_no_trace():
    """A network made after it has the same initial weights as without φ."""
    before = torch.get_rng_state()
    with torch.inference_mode():
        phi = load_phi("tiny_imagenet_resnet20")
    assert torch.equal(torch.get_rng_state(), before)
    h = torch.randn(2, 3, 4, 4, requires_grad=True)
    PerturbSite(phi, 3)(h).sum().backward()
    assert h.grad.any()


def test_save_phi_writes_what_load_phi_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken, model = make_phi(), attach(models.create("resnet8", 5, 16), make_phi(), 16, verbose=False)
    broken.flat.data[0] = float("nan")
    refusal(save_phi, broken, "phi.pt")
    refusal(save_phi, make_phi().to("meta"), "phi.pt")
    for card in ([1], "from here", {"seeds": {0}}, {"phi": make_phi()}):
        refusal(save_phi, make_phi(), "phi.pt", card)
    for other in (model, model.metaperturb, make_phi().state_dict()):
        assert "expected a MetaPerturb" in refusal(save_phi, other, "phi.pt")
    assert not Path("phi.pt").exists()
    save_phi(make_phi().double(), "phi.pt")
    assert load_phi("phi.pt").flat.dtype == torch.float32
    assert_loads("phi.pt")


def test_a_scale_free_phi_stays_one(tmp_path):
    """It is another φ than that of the same numbers, also for code that knows version 1 alone."""
    plain, free = make_phi(), MetaPerturb(scale_free=True)
    free.flat.data.copy_(plain.flat.data)
    with pytest.raises(RuntimeError, match="scale_free"):
        free.load_state_dict(plain.state_dict())
    save_phi(free, tmp_path / "free.pt")
    loaded = load_phi(tmp_path / "free.pt")
    assert loaded.scale_free and torch.equal(loaded.flat, plain.flat) and "scale-free" in repr(loaded)
    assert torch.load(tmp_path / "free.pt", weights_only=True)["version"] == 2
    assert phi_digest(loaded) == phi_digest(free) != phi_digest(plain)
    torch.save(free.state_dict(), tmp_path / "bare.pt")
    assert phi_digest(load_phi(tmp_path / "bare.pt")) == phi_digest(free)
    assert not load_phi("tiny_imagenet_resnet20").scale_free


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("shaped", [True, False])
def test_the_authors_format(tmp_path, zip_format, shaped):
    state = authors_state(make_phi(3))
    state = state if shaped else {name: value.squeeze() for name, value in state.items()}
    torch.save(state, tmp_path / "phi_perturb_750.pth", _use_new_zipfile_serialization=zip_format)
    assert_loads(tmp_path / "phi_perturb_750.pth", make_phi(3))


def test_our_file_holds_six_named_tensors_as_it_always_has(tmp_path):
    """Pinned: the φ of earlier versions has to load, and to be the same."""
    phi = make_phi()
    save_phi(phi, tmp_path / "phi.pt", {"steps": 750})
    content = torch.load(tmp_path / "phi.pt", weights_only=True)
    assert content["version"] == 1 and content["card"] == {"steps": 750}
    shapes = {ours: tuple(size for size in shape if size > 1) for ours, shape in AUTHORS.values()}
    assert {name: tuple(value.shape) for name, value in content["state"].items()} == shapes
    assert all(torch.equal(value, getattr(phi, name)) for name, value in content["state"].items())
    digest = "780ebaa8736df5e802b03a3c1e32f895e202573b23dee8882d140a1eba668185"
    assert phi_digest(load_phi("tiny_imagenet_resnet20")) == digest
    for state in (phi.state_dict(), content["state"]):  # bare
        torch.save(state, tmp_path / "phi.pt")
        assert_loads(tmp_path / "phi.pt")


# --- what is refused


def changed(name, value):
    return {**authors_state(make_phi()), name: value}


NAN_KERNEL = torch.zeros(4, 1, 3, 3)
NAN_KERNEL[2, 0, 1, 1] = float("nan")
OURS = {"format": "metaperturb-phi", "version": 1}
BAD_STATES = {
    "wrong size": (changed("kernel", torch.zeros(5, 1, 3, 3)), ["scale_kernels", "[5, 1, 3, 3]"]),
    "transposed": (changed("kernel", torch.zeros(3, 3, 1, 4)), ["scale_kernels"]),
    "no tensor": (changed("phi_1.w_all", [1.0] * 9), ["all1", "list"]),
    "missing": ({"kernel": torch.zeros(4, 1, 3, 3)}, ["lacks all1"]),
    "unknown": (changed("fc.bias", torch.zeros(1)), ["fc.bias"]),
    "NaN": (changed("kernel", NAN_KERNEL), ["scale_kernels", "finite"]),
    "too large for float32": (changed("fc.weight", torch.full((1, 10), 1e300, dtype=torch.float64)), ["finite"]),
    "ours with no card": ({**OURS, "state": {}, "card": None}, ["card", "NoneType"]),
    "of a later version": ({**OURS, "version": 3}, ["of version 3; this code reads versions up to 2"]),
    "a module": (make_phi(), []),
    "a tensor": (torch.zeros(82), ["no φ"]),
    "ours without state": (OURS, ["no φ"]),
    "numbers as names": ({1: torch.zeros(1), (2, 3): torch.zeros(1)}, ["lacks"]),
    "a name of two lines": (changed("first\nsecond", torch.zeros(1)), ["unknown"]),
    "sparse": (changed("phi_1.w_all", torch.eye(3).to_sparse()), ["all1"]),
    "complex": (changed("phi_1.w_all", torch.eye(3) * 1j), ["all1"]),
    "a tensor without values": (changed("phi_1.w_all", torch.empty(3, 3, device="meta")), ["all1"]),
    "empty": (b"", []),
    "text": (b"not a model\nat all\n", []),
    "an empty zip": (b"PK\x05\x06" + bytes(18), []),
    "a number pickled": (pickle.dumps(3), []),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_files_that_hold_something_else(tmp_path, name):
    content, words = BAD_STATES[name]
    if isinstance(content, bytes):
        (tmp_path / "phi.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "phi.pt")
    message = refused(tmp_path / "phi.pt")
    assert all(word in message for word in words), message


class RunsCode:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (exec, (f"open({self.path!r}, 'w').close()",))


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_in_the_file_is_not_run(tmp_path, zip_format):
    path, ran = tmp_path / "phi.pt", tmp_path / "ran"
    content = {**authors_state(make_phi()), "extra": RunsCode(ran)}
    path.write_bytes(pickle.dumps(content))
    refused(path)
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    refused(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)  # our own file: to show that it would have run
    assert ran.exists()


@pytest.mark.parametrize("zip_format", [True, False])
def test_cut_off_or_damaged_anywhere(tmp_path, zip_format):
    """Cut off: refused. Flipped bytes: likewise, or, where the format does not notice, a φ of finite numbers."""
    path = tmp_path / "phi.pt"
    torch.save(authors_state(make_phi()), path, _use_new_zipfile_serialization=zip_format)
    content = path.read_bytes()
    for length in [*range(0, len(content) - 1, max(1, len(content) // 60)), len(content) - 1]:
        path.write_bytes(content[:length])
        refused(path)
    generator = np.random.default_rng(0)
    for position, flipped in generator.integers((len(content), 255), size=(120, 2)):
        damaged = bytearray(content)
        damaged[position] ^= flipped + 1
        path.write_bytes(damaged)
        try:
            assert torch.isfinite(load_phi(path).flat).all()
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error), position


@pytest.mark.parametrize("path", ["nothing.pt", "no/folder/phi.pt", "file/phi.pt", ""])
def test_paths_without_a_file(tmp_path, path):
    (tmp_path / "file").write_text("x")
    refused(tmp_path / path)
    refusal(load_phi, path or "no-shipped-phi-of-this-name")


# --- writing


def test_writing_where_no_file_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # /dev/null, too, must not become a file
    for path in ("file/phi.pt", "folder", "pipe", "x" * 300 + ".pt"):
        assert str(tmp_path / path) in refusal(save_phi, make_phi(1), tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"] and (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "file").read_text() == "x" and os.listdir(tmp_path / "folder") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_without_permission(tmp_path):
    save_phi(make_phi(), tmp_path / "phi.pt")
    (tmp_path / "phi.pt").chmod(0)
    assert "ermission" in refused(tmp_path / "phi.pt")
    tmp_path.chmod(0o555)
    assert str(tmp_path) in refusal(save_phi, make_phi(1), tmp_path / "phi.pt")
    tmp_path.chmod(0o755)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "phi.pt"
    save_phi(make_phi(), path)
    big = {"weights": torch.zeros(300_000)}  # fails inside torch.save; φ fails when its buffer is flushed
    with disk_full(1000):
        for save, content in ((save_phi, make_phi(1)), (save_tensors, big)):
            assert str(path) in refusal(save, content, path)
    assert os.listdir(tmp_path) == ["phi.pt"]
    assert_loads(path)
