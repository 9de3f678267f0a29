"""What EFRDNFast refuses, in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from efrdn_fast import EFRDNFast, accelerate, fast
from efrdn_fast.device import is_out_of_memory
from efrdn_fast.errors import BackendUnavailable
from tests.fast_networks import trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "fpga"}, "backend must be one of auto, cuda.*reference; got 'fpga'"),
        ({"dtype": "int8"}, "dtype must be one of auto, fp32, tf32, bf16, fp16; got 'int8'"),
        ({"scale": 5}, "scale must be one of 2, 3, 4; got 5"),
    ],
)
def test_rejects_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        EFRDNFast(**options)
    if "scale" not in options:
        with pytest.raises(ValueError, match=message):
            accelerate(trained(), **options)


def test_rejects_what_is_no_network():
    with pytest.raises(TypeError, match="expected an EFRDN, got Linear"):
        accelerate(nn.Linear(1, 1))


def test_named_backend_that_cannot_run_says_why():
    net = trained(EFRDNFast, backend="cuda")
    with torch.no_grad(), pytest.raises(BackendUnavailable, match="backend 'cuda'"):
        net(torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.uint8), TypeError, "must be a tensor.*got ndarray.*upscale"),
        (torch.rand(3, 8, 8), ValueError, r"\[N, 3, H, W\].*\[3, 8, 8\]"),
        (torch.rand(1, 3, 2, 8), ValueError, r"at least 3.*\[2, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int32), TypeError, "floating.*int32"),
        (torch.zeros(1, 3, 2, 8, dtype=torch.uint8), ValueError, r"at least 3.*\[2, 8\]"),
        (torch.rand(1, 3, 8, 8).double(), TypeError, "input is torch.float64.*torch.float32"),
    ],
)
def test_rejects_input(x, error, message):
    with torch.no_grad(), pytest.raises(error, match=message):
        trained(EFRDNFast)(x)


def test_rejects_another_device():
    net = trained(EFRDNFast).to("meta")
    with torch.no_grad(), pytest.raises(ValueError, match="input is on cpu, the weights on meta"):
        net(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("error", [MemoryError("host"), RuntimeError("can't allocate memory: 9 B")])
@pytest.mark.parametrize("training", [False, True])
def test_out_of_memory_names_size_and_remedy(error, training, monkeypatch):
    net, x = trained(EFRDNFast).train(training), torch.rand(1, 3, 5, 4)

    def fail(*_):
        raise error

    monkeypatch.setattr(fast, "train_forward", fail)
    monkeypatch.setattr(fast._Packed, "__call__", fail)
    words = r"\[1, 3, 5, 4\].*tile=.*segment_tokens="
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match=words) as caught:
        net(x)
    assert is_out_of_memory(caught.value)
    assert caught.value.__context__ is None  # it would keep the maps of the call
    error = RuntimeError("another")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^another$"):
        net(x)


def test_checkpoint_of_another_network(tmp_path):
    state = trained(scale=3).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for reconstruct_deep\.conv2\.weight"):
        EFRDNFast(2, channels=16, distilled=5).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        EFRDNFast(3).load_state_dict(state)
