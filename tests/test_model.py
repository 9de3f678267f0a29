"""The reference network: keys, sizes, dtypes, gradients, attention, errors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from efrdn_fast import EFRDN, reference
from efrdn_fast.config import ABLATIONS, EFRDNConfig

KEYS = Path(__file__).parent / "data" / "state_dict_x4.txt"
SMALLEST = [(3, 3), (3, 17), (5, 4), (16, 15)]


def small(**options) -> EFRDN:
    """The network at half its width: every part is there, in a quarter of the time."""
    return EFRDN(**{"scale": 2, "channels": 16, "distilled": 5, **options})


def test_keys_shapes_and_order():
    lines = KEYS.read_text().splitlines()
    expected = [tuple(line.split("  ", 1)) for line in lines]
    state = EFRDN(scale=4).state_dict()
    assert [(k, tuple(v.shape)) for k, v in state.items()] == [
        (key, ast.literal_eval(shape)) for key, shape in expected
    ]


@pytest.mark.parametrize("scale", [2, 3])
def test_scales_differ_in_the_tails_only(scale):
    x4, other = EFRDN(scale=4).state_dict(), EFRDN(scale=scale).state_dict()
    assert list(x4) == list(other)
    differing = {key.rsplit(".", 1)[0] for key in x4 if x4[key].shape != other[key].shape}
    assert differing == {"reconstruct_deep.conv2", "reconstruct_shallow.conv"}


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("height", "width"), SMALLEST)
def test_any_size(height, width, scale):
    net = small(scale=scale).eval()
    with torch.no_grad():
        sr = net(torch.rand(2, 3, height, width))
    assert sr.shape == (2, 3, scale * height, scale * width)
    assert sr.isfinite().all()


def test_batch_equals_single_images():
    net = small().double().eval()
    x = torch.rand(3, 3, 9, 11, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), torch.cat([net(image[None]) for image in x]))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_at_the_smallest_size(training):
    net = EFRDN(scale=4).train(training)
    x = torch.rand(2, 3, 3, 3, requires_grad=True)
    net(x).abs().mean().backward()
    assert x.grad.isfinite().all()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_gradients_on_a_flat_image():
    """Deviation 0 everywhere: its root must keep a finite slope."""
    net = small()
    net(torch.zeros(2, 3, 8, 8)).abs().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_dtype(dtype):
    net = small().to(dtype).eval()
    x = torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        sr = net(x.to(dtype))
        assert sr.dtype == dtype
        reference_sr = net.float()(x)
    torch.testing.assert_close(sr.float(), reference_sr, rtol=0, atol=0.1)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_run_in_training_and_evaluation(ablation):
    net = small(ablation=ablation)
    x = torch.rand(2, 3, 6, 7)
    net(x).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        assert net.eval()(x).shape == (2, 3, 12, 14)


@pytest.mark.parametrize("module", ["imdb", "rfdb"])
def test_modules_of_table_2(module):
    net = small(module=module)
    assert len(net.acdm) == 4
    x = torch.rand(2, 3, 6, 7)
    net(x).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def identical(a: EFRDN, b: EFRDN) -> EFRDN:
    b.load_state_dict(a.state_dict())
    return b


@pytest.mark.parametrize(
    ("ablation", "cnn_dense", "transformer_dense"),
    [
        ("full", True, True),
        ("no_cnn_dense", False, True),
        ("no_transformer_dense", True, False),
        ("no_dense", False, False),
    ],
)
def test_dense_connections(ablation, cnn_dense, transformer_dense):
    """Eqs. 1-9 written out, with and without the sums of the dense connections."""
    net = small(ablation=ablation).double().eval()
    x = torch.rand(1, 3, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        shallow = net.head(x)
        features = total = shallow
        for i in range(4):
            body = net.acdm[i % 2](features, i // 2)
            features = net.gconv[i](body + total if cnn_dense else body)
            total = total + features
        c_out = total if cnn_dense else features + shallow
        t_out1 = net.tconv[0](net.trans[0](c_out))
        t_add1 = t_out1 + c_out if transformer_dense else t_out1
        t_out2 = net.tconv[1](net.trans[1](t_add1))
        t_add2 = t_out1 + c_out + t_out2 + shallow if transformer_dense else t_out2 + shallow
        expected = net.reconstruct_deep(t_add2) + net.reconstruct_shallow(shallow)
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("segments", [1, 4, 7, 500])
def test_any_number_of_segments(segments):
    """More segments than tokens: every token attends to itself alone."""
    net = small(segments=segments).eval()
    with torch.no_grad():
        assert net(torch.rand(1, 3, 5, 4)).isfinite().all()


def test_segment_tokens_replace_segments():
    x = torch.rand(1, 3, 6, 8, dtype=torch.float64)  # 48 tokens
    by_count = small(segments=4).double().eval()
    by_length = identical(by_count, small(segment_tokens=12).double().eval())
    other = identical(by_count, small(segment_tokens=48).double().eval())
    with torch.no_grad():
        assert torch.equal(by_count(x), by_length(x))
        assert not torch.allclose(by_count(x), other(x))
        assert torch.equal(other(x), identical(by_count, small(segments=1).double().eval())(x))


def by_hand(qkv: torch.Tensor, heads: int, length: int) -> torch.Tensor:
    """Eq. 30, one head of one segment at a time."""
    n, tokens, width = qkv.shape
    dim = width // 3 // heads
    q, k, v = qkv.split(width // 3, dim=2)
    out = torch.empty(n, tokens, heads * dim, dtype=qkv.dtype)
    for start in range(0, tokens, length):
        rows = slice(start, min(start + length, tokens))
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            scores = q[:, rows, part] @ k[:, rows, part].mT / dim**0.5
            out[:, rows, part] = scores.softmax(dim=-1) @ v[:, rows, part]
    return out


@pytest.mark.parametrize(("tokens", "length"), [(20, 5), (23, 6), (7, 100), (9, 1)])
@pytest.mark.parametrize("attention", [reference.emha, reference.emha_sdpa])
def test_attention(attention, tokens, length):
    qkv = torch.randn(2, tokens, 3 * 4 * 6, dtype=torch.float64)
    torch.testing.assert_close(attention(qkv, 4, length), by_hand(qkv, 4, length))


def test_attention_gradients_agree():
    qkv = torch.randn(1, 11, 3 * 2 * 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 11, 10, dtype=torch.float64)
    plain, sdpa = (
        torch.autograd.grad((f(qkv, 2, 4) * weight).sum(), qkv)[0]
        for f in (reference.emha, reference.emha_sdpa)
    )
    torch.testing.assert_close(plain, sdpa)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_score_budget_loops_over_query_rows(monkeypatch, rows):
    qkv = torch.randn(2, 20, 3 * 4 * 6, dtype=torch.float64)
    whole = reference.emha(qkv, 4, 6)
    monkeypatch.setattr(reference, "SCORE_BUDGET", rows * 2 * 4 * 6 * 8)
    seen = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, dim: seen.append(x.shape[2]) or softmax(x, dim)
    )
    looped = reference.emha(qkv, 4, 6)
    assert max(seen) == rows
    torch.testing.assert_close(looped, whole, rtol=0, atol=1e-12)


def test_set_attention_reaches_both_blocks():
    net = small().double().eval()
    x = torch.rand(1, 3, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        calls = []

        def counted(*args):
            calls.append(args[1:])
            return reference.emha_sdpa(*args)

        torch.testing.assert_close(net.set_attention(counted)(x), expected)
    assert calls == [(8, 11), (8, 11)]  # heads, ceil(42 / 4)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[0.5]], TypeError, "must be a tensor.*got list.*upscale"),
        (torch.rand(3, 8, 8), ValueError, r"\[N, 3, H, W\].*\[3, 8, 8\]"),
        (torch.rand(1, 1, 8, 8), ValueError, r"\[N, 3, H, W\].*\[1, 1, 8, 8\]"),
        (torch.rand(1, 3, 2, 8), ValueError, r"at least 3.*\[2, 8\]"),
        (torch.rand(1, 3, 8, 2), ValueError, r"at least 3.*\[8, 2\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "floating.*uint8"),
    ],
)
def test_rejects_input(x, error, message):
    with pytest.raises(error, match=message):
        small()(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 5}, ValueError, "scale must be one of 2, 3, 4; got 5"),
        ({"channels": 24}, ValueError, "multiple of 16, got 24"),
        ({"channels": 32.0}, TypeError, "channels must be an int, got 32.0"),
        ({"distilled": 32}, ValueError, "distilled must be less than channels=32, got 32"),
        ({"segments": 0}, ValueError, "segments must be at least 1, got 0"),
        ({"segment_tokens": -4}, ValueError, "segment_tokens must be at least 1, got -4"),
        ({"fold": "max"}, ValueError, "fold must be one of mean, sum; got 'max'"),
        ({"module": "rcan"}, ValueError, "module must be one of acdm, imdb, rfdb; got 'rcan'"),
        ({"ablation": "no_bn"}, ValueError, "ablation must be one of full, .*; got 'no_bn'"),
        ({"module": "imdb", "ablation": "no_fflb"}, ValueError, "changes ACDM.*'imdb'"),
    ],
)
def test_rejects_arguments(options, error, message):
    for make in (EFRDN, EFRDNConfig):
        with pytest.raises(error, match=message):
            make(**options)


def test_only_scale_is_positional():
    with pytest.raises(TypeError):
        EFRDN(4, 32)


def test_shows_its_arguments():
    assert "scale=2, channels=16, distilled=5, segments=4" in repr(small()).splitlines()[1]
