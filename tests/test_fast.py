"""EFRDNFast against EFRDN: results, gradients, freshness of packed weights, copies, errors."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import efrdn_fast
from efrdn_fast import EFRDN, EFRDNFast, accelerate, dispatch, fast, reference
from efrdn_fast.config import ABLATIONS
from efrdn_fast.device import is_out_of_memory
from efrdn_fast.errors import BackendUnavailable
from efrdn_fast.testing import TOLERANCES, assert_within

SIZES = [(1, 3, 3), (3, 3, 17), (1, 15, 15), (1, 33, 47)]


def trained(cls: type[EFRDN] = EFRDN, **options) -> EFRDN:
    """A small network in evaluation mode whose running statistics differ between the uses."""
    net = cls(**{"scale": 2, "channels": 16, "distilled": 5, **options})
    return disturb(net).eval()


def disturb(net: EFRDN) -> EFRDN:
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.copy_(torch.rand_like(buffer) * 0.8 + (0.4 if "var" in name else -0.4))
        for name, parameter in net.named_parameters():
            if ".bn" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return net


def check(net: EFRDNFast, x: torch.Tensor, source: EFRDN | None = None) -> None:
    """The packed forward of `net` is as near to float64 as the plain one, within twice."""
    plain = as_reference(source or net)
    with torch.no_grad():
        out = net(x)
        exact = copy.deepcopy(plain).double()(x.double())
        assert out.dtype == x.dtype
        assert_within(out, exact, plain(x), TOLERANCES[x.dtype])
    assert net.plan is not None, "the packed forward did not run"


def as_reference(net: EFRDN) -> EFRDN:
    plain = EFRDN(**net.config.to_dict()).to(net.head.weight)
    plain.load_state_dict(net.state_dict())
    return plain.eval()


@pytest.fixture(params=["auto", "reference"])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_reference(size, backend):
    batch, height, width = size
    net = trained(EFRDNFast, backend=backend)
    check(net, torch.rand(batch, 3, height, width))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_equals_reference_at_full_width(scale):
    net = disturb(EFRDN(scale=scale)).eval()
    for shape in ((1, 3, 16, 15), (3, 3, 5, 4)):
        check(accelerate(net), torch.rand(shape), net)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations(ablation):
    check(trained(EFRDNFast, ablation=ablation), torch.rand(2, 3, 7, 9))


@pytest.mark.parametrize("module", ["imdb", "rfdb"])
def test_modules_of_table_2(module):
    check(trained(EFRDNFast, module=module), torch.rand(2, 3, 7, 9))


@pytest.mark.parametrize(
    "options", [{"fold": "sum"}, {"segments": 7}, {"segment_tokens": 12}, {"channels": 48}], ids=str
)
def test_options(options):
    check(trained(EFRDNFast, **options), torch.rand(1, 3, 6, 9))


@pytest.mark.parametrize("layout", ["nhwc", "cropped"])
def test_layouts_of_the_input(layout):
    x = torch.rand(2, 3, 9, 12)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    x = nhwc if layout == "nhwc" else x[:, :, 1:8, 2:11]
    net = trained(EFRDNFast)
    before = x.clone()
    check(net, x)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert net(x).is_contiguous()


def test_float64_is_exact():
    net = trained(EFRDNFast).double()
    x = torch.rand(1, 3, 8, 9, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), as_reference(net)(x), rtol=0, atol=1e-12)
    assert set(net.plan.values()) == {"reference"}


def test_gradients_in_evaluation():
    plain = trained().double()
    net = accelerate(copy.deepcopy(plain))
    x = torch.rand(1, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(plain(x).sum(), [x, *plain.parameters()])
    found = torch.autograd.grad(net(x).sum(), [x, *net.parameters()])
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
    net.requires_grad_(False)
    assert net(x).requires_grad
    assert not net(x.detach()).requires_grad
    assert net.plan is not None  # nothing asks for a gradient: packed


def test_a_part_in_training_mode_stays_so():
    net, x = trained(EFRDNFast), torch.rand(1, 3, 8, 9)
    net.acdm[0].train()
    plain = as_reference(net)
    plain.acdm[0].train()
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)
    assert net.plan is None
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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
        assert net.plan == dict.fromkeys(fast.OPS, "reference")
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
    from efrdn_fast import checkpoint

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


def test_attention_set_by_the_user():
    net, x, calls = trained(EFRDNFast), torch.rand(1, 3, 6, 7), []

    def counted(*args):
        calls.append(args[1:])
        return reference.emha(*args)

    with torch.no_grad():
        before = net(x)
        torch.testing.assert_close(net.set_attention(counted)(x), before, rtol=1e-4, atol=1e-5)
    assert calls == [(8, 11), (8, 11)]


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    return (-10 * (a.double() - b.double()).square().mean().log10()).item()


@pytest.mark.parametrize(("dtype", "least_db"), [("bf16", 45), ("fp16", 60)])
def test_half_precision(dtype, least_db):
    """Noise relative to a peak of 1; input, tails and output stay float32."""
    net, x = trained(EFRDNFast, dtype=dtype), torch.rand(1, 3, 15, 16)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*slower than fp32")
        y = net(x)
        exact = as_reference(net).double()(x.double())
    assert y.dtype == torch.float32
    assert len(y.unique()) > y.numel() // 2  # not rounded to half precision
    assert decibels(y, exact) > least_db


def test_autocast_is_half_precision():
    net, x = trained(EFRDNFast), torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        named = accelerate(net, dtype="bf16")(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, named)


def test_half_precision_of_unpacked_parts():
    net, x = trained(EFRDNFast, module="imdb", dtype="bf16"), torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        assert decibels(net(x), as_reference(net)(x)) > 45


def test_overflow_falls_back_and_warns_once():
    net, x = trained(EFRDNFast, dtype="fp16"), torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        net.head.weight.mul_(1e6)  # beyond float16
    message = "fp16 overflowed; the result was computed in bf16"
    with torch.no_grad(), pytest.warns(UserWarning, match=message):
        y = net(x)
    assert y.isfinite().all()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert torch.equal(net(x), y)


def test_nan_in_gives_nan_out_without_a_warning():
    x = torch.rand(1, 3, 8, 9)
    x[0, 1, 2, 3] = torch.nan
    for dtype in ("auto", "bf16"):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            assert trained(EFRDNFast, dtype=dtype)(x).isnan().any()


def test_warns_of_slow_half_precision_once(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(fast, "_slow", set())
    net, x = trained(EFRDNFast, dtype="bf16"), torch.rand(1, 3, 4, 4)
    with torch.no_grad(), pytest.warns(UserWarning, match="bf16 slower than fp32") as caught:
        net(x)
        net(x)
    assert len(caught) == 1


def test_without_data():
    """Meta tensors give the shape, as EFRDN does."""
    net = trained(EFRDNFast).to("meta")
    with torch.no_grad():
        assert net(torch.rand(1, 3, 6, 7, device="meta")).shape == (1, 3, 12, 14)


def test_shows_its_plan():
    net = trained(EFRDNFast, backend="reference", dtype="fp32")
    line = repr(net).splitlines()[1]
    assert "scale=2, channels=16" in line
    assert "backend='reference', dtype='fp32', plan=at the first call" in line
    with torch.no_grad():
        net(torch.rand(1, 3, 4, 4))
    assert f"plan={dict.fromkeys(fast.OPS, 'reference')}" in repr(net)


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


def test_changed_input_shape():
    net = trained(EFRDNFast)
    for shape in ((1, 3, 6, 7), (2, 3, 9, 5), (1, 3, 3, 3), (1, 3, 6, 7)):
        check(net, torch.rand(shape))
