"""Packed weights of EFRDNFast: never stale, made once, not copied; what it shares with EFRDN."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import efrdn_fast
from efrdn_fast import EFRDN, EFRDNFast, checkpoint, dispatch, fast, packing
from tests.fast_networks import as_reference, check, trained


def _optimizer_step(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) * 0.01
    optimizer.step()


def _edit_parameter(net):
    with torch.no_grad():
        net.acdm[1].acrb[2].conv3x1.weight.mul_(1.5)


def _edit_statistics(net):
    net.acdm[0].fflb[1].gcrb1.bn2.running_mean.add_(0.3)


def _load(net):
    state = {k: v * 1.1 for k, v in net.state_dict().items()}
    net.load_state_dict(state)


def _load_assigned(net):
    net.load_state_dict({k: v * 1.1 for k, v in net.state_dict().items()}, assign=True)


def _new_parameter(net):
    net.trans[0].mlp.fc1.weight = nn.Parameter(net.trans[0].mlp.fc1.weight.detach() * 2)


def _new_module(net):
    net.head = nn.Conv2d(3, 16, 3, padding=1)


def _new_data_twice(net):
    """The second memory may lie where the first lay."""
    for factor in (2.0, 1.5):
        net.head.weight.data = net.head.weight.data * factor


def _data_and_eval(net):
    net.head.weight.data.mul_(2)
    net.eval()


@pytest.mark.parametrize(
    "change",
    [
        _optimizer_step,
        _edit_parameter,
        _edit_statistics,
        _load,
        _load_assigned,
        _new_parameter,
        _new_module,
        _new_data_twice,
        _data_and_eval,
    ],
)
def test_packed_weights_are_never_stale(change):
    net, x = trained(EFRDNFast), torch.rand(1, 3, 6, 7)
    with torch.no_grad():
        before = net(x)
    change(net)
    check(net, x)
    with torch.no_grad():
        assert not torch.equal(net(x), before)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_a_fused_optimizer_step_is_seen(kind):
    """It does not count its changes itself; the twin of a trained network sees them too."""
    plain, x = trained(), torch.rand(1, 3, 6, 7)
    twin = efrdn_fast.accelerate(plain)
    optimizer = kind(plain.parameters(), lr=0.05, fused=True)
    for _ in range(2):
        check(twin, x, plain)
        with torch.no_grad():
            before = twin(x)
        plain(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(twin(x), before)


def test_steps_of_other_networks_keep_the_packing():
    net, other = trained(EFRDNFast), nn.Linear(2, 2)
    with torch.no_grad():
        net(torch.rand(1, 3, 6, 7))
    packed = net._packed
    other(torch.rand(1, 2)).sum().backward()
    torch.optim.Adam(other.parameters(), fused=True).step()
    with torch.no_grad():
        net(torch.rand(1, 3, 6, 7))
    assert net._packed[1] == packed[1]


def test_plan_says_what_runs(monkeypatch):
    """At 16 channels the C++ takes no merge, whatever the plan began with."""
    net, ran, look = trained(EFRDNFast), {}, dispatch.implementation
    monkeypatch.setattr(
        dispatch, "implementation", lambda op, b: ran.setdefault(op, set()).add(b) or look(op, b)
    )
    with torch.no_grad():
        net(torch.rand(1, 3, 6, 7))
    assert ran["merge3x3"] == {net.plan["merge3x3"]} == {"reference"}
    assert {op: {backend} for op, backend in net.plan.items() if op in ran} == {
        op: names for op, names in ran.items() if op in net.plan
    }
    assert f"'merge3x3': {net.plan['merge3x3']!r}" in repr(net)


def test_made_under_another_default_device():
    net, x = trained(EFRDNFast), torch.rand(1, 3, 6, 7)
    with torch.device("meta"), torch.no_grad():
        packed = net(x)
    torch.testing.assert_close(packed, as_reference(net)(x), rtol=1e-4, atol=1e-5)


def test_packed_once_for_many_calls(monkeypatch):
    monkeypatch.delenv("EFRDN_FAST_BACKEND", raising=False)
    made = []
    build = fast._Packed
    monkeypatch.setattr(fast, "_Packed", lambda *args: made.append(1) or build(*args))
    net = trained(EFRDNFast)
    with torch.no_grad():
        for shape in ((1, 3, 6, 7), (1, 3, 6, 7), (2, 3, 9, 5)):
            net(torch.rand(shape))
        assert len(made) == 1
        # another choice of backends is another packing; the first one is kept
        with dispatch.use_backend("reference"):
            net(torch.rand(1, 3, 6, 7))
        assert net.plan == dict.fromkeys(packing.OPS, "reference")
        net(torch.rand(1, 3, 6, 7))
    assert len(made) == 2


def test_change_of_dtype():
    net, x = trained(EFRDNFast), torch.rand(1, 3, 6, 7)
    check(net, x)
    check(net.double(), x.double())
    check(net.float(), x)


def test_weights_made_in_inference_mode():
    """They count no changes, so they are packed for every call."""
    with torch.inference_mode():
        net, x = trained(EFRDNFast), torch.rand(1, 3, 6, 7)
        before = net(x)
        net.head.weight.mul_(2)
        assert not torch.equal(net(x), before)
        torch.testing.assert_close(net(x), as_reference(net)(x), rtol=1e-4, atol=1e-5)


def test_copies_do_not_carry_packed_weights():
    net, x = trained(EFRDNFast, dtype="fp32"), torch.rand(1, 3, 6, 7)
    size = len(pickle.dumps(net))
    with torch.no_grad():
        expected = net(x)
    assert len(pickle.dumps(net)) == size
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(file, weights_only=False),
    )
    for each in copies:
        assert each.plan is None
        assert (each.backend, each.dtype) == ("auto", "fp32")
        with torch.no_grad():
            assert torch.equal(each(x), expected)
            each.head.weight.mul_(2)
            assert not torch.equal(each(x), expected)
    with torch.no_grad():
        assert torch.equal(net(x), expected)


def test_state_dict_is_the_reference_s():
    net = trained(EFRDNFast)
    with torch.no_grad():
        net(torch.rand(1, 3, 6, 7))
    assert list(net.state_dict()) == list(trained().state_dict())
    assert [n for n, _ in net.named_modules()] == [n for n, _ in trained().named_modules()]


def test_from_pretrained(tmp_path):
    source = trained()
    path = checkpoint.save(source, tmp_path / "net.safetensors")
    net = EFRDNFast.from_pretrained(path, backend="reference")
    assert isinstance(net, EFRDNFast)
    assert not net.training
    check(net, torch.rand(1, 3, 6, 7), source)
    assert set(net.plan.values()) == {"reference"}


def test_accelerate_shares_parameters():
    net = trained()
    other = efrdn_fast.accelerate(net)
    assert isinstance(other, EFRDNFast)
    assert all(a is b for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(net.buffers(), other.buffers(), strict=True))
    x = torch.rand(1, 3, 6, 7)
    check(other, x, net)
    with torch.no_grad():
        net.head.weight.mul_(2)
    check(other, x, net)
    assert type(net) is EFRDN
    other.register_forward_hook(lambda *_: None)
    assert not net._forward_hooks
