"""Checkpoints: what is written is read again; what is foreign, unsafe or damaged is refused."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from efrdn_fast import EFRDN, checkpoint

TRAINING = {"steps": 12, "images": ["a", "b"], "psnr": 30.5}


def small(**options) -> EFRDN:
    return EFRDN(**{"scale": 2, "channels": 16, "distilled": 5, **options})


@pytest.fixture
def net() -> EFRDN:
    """Every tensor, running statistics included, is different from a fresh network's."""
    net = small(segments=3, fold="sum").eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.uniform_(0.1, 0.2)
    return net


@pytest.fixture
def saved(net, tmp_path):
    return checkpoint.save(net, tmp_path / "net.safetensors", TRAINING)


def equal(a: EFRDN, b: EFRDN) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(k == m and torch.equal(v, w) for (k, v), (m, w) in pairs)


def test_round_trip(net, saved):
    loaded = EFRDN.from_pretrained(saved)
    assert loaded.config == net.config
    assert not loaded.training
    assert equal(loaded, net)
    assert EFRDN.from_pretrained(str(saved), segment_tokens=7).config.segment_tokens == 7


def test_metadata(net, saved):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == net.state_dict().keys()
    assert metadata["format"] == "efrdn_fast"
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["config"]) == net.config.to_dict()
    assert json.loads(metadata["training"]) == TRAINING
    assert checkpoint.load(saved).training == TRAINING


def test_saved_in_float32_from_any_dtype(net, tmp_path):
    path = checkpoint.save(net.double(), tmp_path / "double.safetensors")
    state = checkpoint.load(path).state_dict
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"params": s},
        lambda s: {"params": {"head.weight": torch.zeros(1)}, "params_ema": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"state_dict": {"params_ema": s}},
        lambda s: prefixed(s, "module."),
        lambda s: prefixed(s, "_orig_mod."),
        lambda s: {"model": prefixed(s, "_orig_mod.module.")},
        lambda s: {**prefixed(s, "module."), "n_averaged": torch.tensor(4)},
    ],
    ids=[
        "plain",
        "params",
        "params_ema",
        "state_dict",
        "nested",
        "module",
        "_orig_mod",
        "both_in_model",
        "averaged_model",
    ],
)
def test_pth_wrappers(wrap, tmp_path):
    full = small(segments=4)
    torch.save(wrap(full.state_dict()), tmp_path / "net.pth")
    loaded = EFRDN.from_pretrained(tmp_path / "net.pth")
    assert equal(loaded, full)
    assert loaded.config == full.config  # scale, channels and distilled from the shapes


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_scale_of_a_file_without_metadata(scale, tmp_path):
    torch.save(small(scale=scale).state_dict(), tmp_path / "net.pth")
    assert EFRDN.from_pretrained(tmp_path / "net.pth").scale == scale


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))]
)
def test_unsafe_pickle_is_refused(save, tmp_path):
    path, target = tmp_path / "net.pth", tmp_path / "owned"
    save({"params": small().state_dict(), "extra": Payload(target)}, path)
    with pytest.raises(ValueError, match=r"net\.pth: refused.*weights_only=True"):
        checkpoint.load(path)
    assert not target.exists()


def test_other_scale_names_the_shapes(saved, net):
    state = checkpoint.load(saved).state_dict
    with pytest.raises(ValueError, match=r"shapes: reconstruct_deep\.conv2\.bias") as caught:
        checkpoint.load_into(small(scale=4), state, "net.safetensors")
    message = str(caught.value)
    assert "net.safetensors does not fit EFRDN" in message
    assert "reconstruct_shallow.conv.weight is [12, 16, 3, 3], expected [48, 16, 3, 3]" in message


def test_other_width_names_five_shapes_and_counts_the_rest(saved):
    state = checkpoint.load(saved).state_dict
    with pytest.raises(ValueError, match=r"shapes: acdm\.0\.\S+ is .*, and \d+ more"):
        checkpoint.load_into(small(channels=32), state)


def test_missing_and_unexpected_keys_are_named(net):
    state = dict(net.state_dict())
    state["extra.weight"] = state.pop("head.bias")
    with pytest.raises(ValueError, match=r"missing: head\.bias; unexpected: extra\.weight"):
        checkpoint.load_into(small(), state)


def test_load_into_leaves_the_network_alone_when_it_refuses(net):
    other = small(scale=4)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit"):
        checkpoint.load_into(other, net.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_wrong_keyword_scale(saved):
    with pytest.raises(ValueError, match=r"does not fit EFRDN: shapes"):
        EFRDN.from_pretrained(saved, scale=4)


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_truncated_safetensors(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"net\.safetensors: not a readable safetensors file"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"junk\n", "KeyError 174812789"), (b"M", "unpack requires"), (b"\x80\x02K\x01b", "")],
)
def test_pth_that_is_no_pickle(tmp_path, content, reason):
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"net\.pth: refused.*damaged.*{reason}"):
        checkpoint.load(path)


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_truncated_pth(net, tmp_path, keep):
    path = tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"net\.pth: refused.*damaged"):
        checkpoint.load(path)


def test_foreign_network(tmp_path):
    torch.save(torch.nn.Conv2d(3, 3, 3).state_dict(), tmp_path / "conv.pth")
    with pytest.raises(ValueError, match=r"no EFRDN checkpoint: key 'head.weight' is missing"):
        checkpoint.load(tmp_path / "conv.pth")


@pytest.mark.parametrize("content", [{}, [1, 2], {"params": {}}])
def test_no_weights(content, tmp_path):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"no weights found|no EFRDN checkpoint"):
        checkpoint.load(tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "2"}, "checkpoint format 2, this version reads 1"),
        ({"config": "{"}, "damaged metadata"),
        ({"config": '{"scale": 9}'}, "scale must be one of 2, 3, 4; got 9"),
        ({"config": '{"depth": 9}'}, "damaged metadata.*depth"),
    ],
)
def test_bad_metadata(net, tmp_path, metadata, message):
    path = tmp_path / "net.safetensors"
    save_file(net.state_dict(), path, metadata)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth' does not exist"):
        checkpoint.load(tmp_path / "nothing.pth")


def test_name_without_shipped_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    with pytest.raises(FileNotFoundError, match=r"no weights are shipped for x3 \(shipped: none\)"):
        checkpoint.resolve("x3")


def test_interrupted_write_keeps_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(small(), saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]
