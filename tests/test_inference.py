"""Tiles, precision and memory: what `inference` and `device` promise, mostly on tiny networks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from efrdn_fast import EFRDN, device, inference
from efrdn_fast.device import float32_ends, free_memory, is_out_of_memory, precision, resolve_device
from efrdn_fast.inference import bands, run, tiled
from efrdn_fast.reference import emha_sdpa

CPU = torch.device("cpu")


class Nearest(nn.Module):
    """Repeats pixels; records its tiles, and may fail as memory or half precision do."""

    def __init__(self, scale=2, most_pixels=None, error=None, overflow=()):
        super().__init__()
        self.scale, self.overflow, self.seen = scale, overflow, []
        self.most_pixels, self.error = most_pixels, error

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        if self.most_pixels and x.shape[2] * x.shape[3] > self.most_pixels:
            raise self.error
        y = x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        half = (
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        )
        return y / 0 if half in self.overflow else y


def repeated(x, scale=2):
    return x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def collect(net, x, **options):
    """What `run` emits, put together, and its outcome."""
    rows = []

    def emit(top, band):
        if top == 0:
            rows.clear()  # a new try
        assert top == sum(row.shape[2] for row in rows)
        rows.append(band.clone())

    outcome = run(net, x, emit, **{"device": CPU, **options})
    return torch.cat(rows, 2), outcome


@pytest.mark.parametrize(
    "height, width, tile, overlap",
    [
        (3, 3, 3, 0),
        (3, 40, 3, 1),
        (17, 40, 16, 4),
        (40, 17, 16, 8),
        (33, 65, 11, 3),
        (31, 29, 30, 15),
        (64, 64, 16, 0),
        (20, 20, 100, None),
        (50, 70, 24, None),
    ],
)
@pytest.mark.parametrize("scale", [2, 3])
def test_tiles_of_a_local_network_equal_the_whole(height, width, tile, overlap, scale):
    x = torch.rand(2, 3, height, width)
    net = Nearest(scale)
    torch.testing.assert_close(tiled(net, x, tile, overlap), repeated(x, scale), atol=1e-6, rtol=0)
    shapes = {shape[2:] for shape in net.seen}
    assert shapes == {(min(tile, height), min(tile, width))}  # equal tiles, none below 3 px
    if overlap == 0:
        assert len(net.seen) == -(-height // tile) * -(-width // tile)


def test_whole_image_is_the_network_itself():
    net = EFRDN(2, channels=16, distilled=4).eval()
    x = torch.rand(1, 3, 12, 10)
    with torch.inference_mode():
        expected = net(x)
    assert torch.equal(tiled(net, x, 0), expected)
    assert torch.equal(tiled(net, x, 12), expected)


@pytest.mark.parametrize("dtype, peak", [(torch.uint8, 255), (torch.uint16, 65535)])
def test_integers_and_gray_become_three_channels_in_the_unit_range(dtype, peak):
    x = torch.randint(0, peak + 1, (1, 1, 9, 11)).to(dtype)
    y = tiled(Nearest(), x, 5, 1)
    torch.testing.assert_close(y, repeated(x.float() / peak).expand(-1, 3, -1, -1))


def test_seams_are_blended_linearly():
    class Mean(nn.Module):
        def forward(self, x):
            return repeated(x.mean((2, 3), keepdim=True).expand_as(x))

    x = torch.zeros(1, 3, 8, 24)
    x[..., 12:] = 1  # two tiles of 16, at 0 and 8: they share pixels 8 to 16
    row = tiled(Mean(), x, 16, 8)[0, 0, 0]
    left, right = x[..., :16].mean(), x[..., 8:].mean()
    position = (torch.arange(16) + 0.5) / 16
    torch.testing.assert_close(row[:16], left.expand(16))
    torch.testing.assert_close(row[16:32], left + (right - left) * position)
    torch.testing.assert_close(row[32:], right.expand(16))


def test_bands_come_in_order_and_hold_one_row_of_tiles():
    x = torch.rand(1, 3, 50, 20)
    top = 0
    for first, band in bands(Nearest(2), x, 16, 4, CPU):
        assert first == top and band.shape[2] <= 32
        torch.testing.assert_close(band, repeated(x)[:, :, first : first + band.shape[2]])
        top += band.shape[2]
    assert top == 100


def test_tiles_of_the_network_stay_close_to_the_whole():
    net = EFRDN(2, channels=16, distilled=4).eval()
    x = torch.rand(1, 3, 40, 40)
    whole, cut = tiled(net, x, 0), tiled(net, x, 28, 8)
    assert (whole - cut).square().mean() < 0.02 * whole.var()
    assert not torch.equal(whole, cut)  # attention and pooled statistics are global


def test_progress_counts_tiles():
    calls = []
    tiled(Nearest(), torch.rand(1, 3, 20, 30), 12, 2, progress=lambda *call: calls.append(call))
    assert calls == [(i + 1, 6) for i in range(6)]
    calls.clear()
    tiled(Nearest(), torch.rand(1, 3, 20, 30), 0, progress=lambda *call: calls.append(call))
    assert calls == [(1, 1)]


@pytest.mark.parametrize(
    "tile, overlap, message", [(2, 0, "at least 3"), (8, 5, r"0\.\.4"), (8, -1, "got -1")]
)
def test_bad_tiles_are_named(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        tiled(Nearest(), torch.rand(1, 3, 9, 9), tile, overlap)


def test_network_without_an_integer_scale_is_named():
    with pytest.raises(ValueError, match="no integer scale"):
        tiled(nn.AvgPool2d(2), torch.rand(1, 3, 9, 9), 0)


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("not enough memory: you tried to allocate"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_tiles(error):
    net = Nearest(most_pixels=35 * 35, error=error)
    x = torch.rand(1, 3, 130, 100)
    with pytest.warns(UserWarning, match="do not fit .* in tiles of 32 px") as caught:
        y, outcome = collect(net, x)
    assert len(caught) == 1
    torch.testing.assert_close(y, repeated(x), atol=1e-6, rtol=0)
    assert outcome.tile == 32
    assert [shape[2:] for shape in net.seen[:2]] == [(130, 100), (65, 65)]


def test_out_of_memory_in_the_middle_begins_anew(monkeypatch):
    class Late(Nearest):
        def forward(self, x):
            if len(self.seen) == 5 and x.shape[2] == 150:
                raise MemoryError
            return super().forward(x)

    monkeypatch.setattr(inference, "free_memory", lambda _: 160**2 * inference.BYTES_PER_PIXEL)
    x = torch.rand(1, 3, 300, 180)
    with pytest.warns(UserWarning, match="tiles of 75"):
        y, _ = collect(Late(), x)
    torch.testing.assert_close(y, repeated(x), atol=1e-6, rtol=0)


def test_memory_is_asked_before_the_first_try(monkeypatch):
    monkeypatch.setattr(inference, "free_memory", lambda _: 50 * 50 * inference.BYTES_PER_PIXEL)
    net = Nearest()
    with pytest.warns(UserWarning, match="tiles of 40 px"):
        _, outcome = collect(net, torch.rand(1, 3, 160, 90))
    assert outcome.tile == 40 and max(shape[2] for shape in net.seen) == 40
    # A narrow network needs less; overlap that is too much for small tiles is cut.
    net.config = SimpleNamespace(channels=16, segment_tokens=576)
    with pytest.warns(UserWarning, match="tiles of 40 px"):
        collect(net, torch.rand(1, 3, 160, 90), overlap=30)


@pytest.mark.parametrize("tile", [0, 24])
def test_a_chosen_tile_that_does_not_fit_is_an_error(tile):
    net = Nearest(most_pixels=100, error=MemoryError())
    what = "tiles of 24 px" if tile else "60x50 px in one piece"
    with pytest.raises(MemoryError, match=f"{what} do not fit on cpu; use smaller tiles"):
        collect(net, torch.rand(1, 3, 50, 60), tile=tile)


def test_other_errors_are_not_mistaken_for_memory():
    net = Nearest(most_pixels=1, error=RuntimeError("Expected 4-D input"))
    with pytest.raises(RuntimeError, match="4-D"):
        collect(net, torch.rand(1, 3, 50, 60))
    assert len(net.seen) == 1
    assert not is_out_of_memory(RuntimeError("out of range"))


@pytest.mark.parametrize(
    "dtype, overflow, final",
    [
        ("fp16", (torch.float16,), "bf16"),
        ("fp16", (torch.float16, torch.bfloat16), "fp32"),
        ("bf16", (torch.bfloat16,), "fp32"),
    ],
)
def test_half_precision_that_overflows_is_repeated(dtype, overflow, final):
    x = torch.rand(1, 3, 20, 20)
    with pytest.warns(UserWarning, match=f"{dtype} overflowed .* in {final}") as caught:
        y, outcome = collect(Nearest(overflow=overflow), x, dtype=dtype, tile=12)
    assert len(caught) == 1
    assert outcome.dtype == final
    torch.testing.assert_close(y, repeated(x))


@pytest.mark.parametrize("dtype", ["auto", "fp32", "tf32", "fp16", "bf16"])
def test_every_dtype_runs_on_the_cpu(dtype):
    net = float32_ends(EFRDN(2, channels=16, distilled=4).eval().set_attention(emha_sdpa))
    x = torch.rand(1, 3, 16, 16)
    exact, _ = collect(net, x, dtype="fp32")
    y, outcome = collect(net, x, dtype=dtype)
    assert outcome.dtype == {"auto": "fp32"}.get(dtype, dtype)
    assert y.dtype == torch.float32
    error = (y - exact).abs().max()
    if dtype in ("fp16", "bf16"):
        assert 0 < error < 0.02
    else:
        assert error == 0


def test_output_that_is_never_finite_blames_the_weights():
    with pytest.raises(ValueError, match="not finite in fp32: are the weights damaged"):
        collect(Nearest(overflow=(torch.float32,)), torch.rand(1, 3, 8, 8))
    with pytest.raises(FloatingPointError):
        tiled(Nearest(overflow=(torch.float32,)), torch.rand(1, 3, 8, 8), 0)


def test_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="dtype must be one of auto, fp32"):
        collect(Nearest(), torch.rand(1, 3, 8, 8), dtype="int8")


def test_precision_sets_tf32_and_puts_it_back():
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    for dtype, value in (("tf32", "tf32"), ("fp32", "ieee")):
        with pytest.raises(KeyError), precision(torch.device("cuda"), dtype):
            assert (matmul.fp32_precision, conv.fp32_precision) == (value, value)
            raise KeyError
        assert (matmul.fp32_precision, conv.fp32_precision) == before


def test_head_and_tails_stay_in_float32_under_autocast():
    net = float32_ends(EFRDN(2, channels=16, distilled=4).eval())
    seen = {}
    for name in ("head", "reconstruct_deep.conv2", "acdm.0.conv4"):
        part = net.get_submodule(name)
        part.register_forward_hook(lambda _, x, y, name=name: seen.__setitem__(name, y.dtype))
    with torch.inference_mode():
        plain = net(torch.rand(1, 3, 8, 8))
        assert set(seen.values()) == {torch.float32}
        with precision(CPU, "bf16"):
            assert net(torch.rand(1, 3, 8, 8)).dtype == plain.dtype == torch.float32
    assert seen == {
        "head": torch.float32,
        "reconstruct_deep.conv2": torch.float32,
        "acdm.0.conv4": torch.bfloat16,
    }


def test_large_whole_images_are_warned_about(monkeypatch):
    monkeypatch.setitem(inference.SLOW_PIXELS, "cpu", 400)
    net = Nearest()
    net.config = SimpleNamespace(segment_tokens=None, channels=32)
    with pytest.warns(UserWarning, match="30x20 px in one piece take long on cpu.*--tile 256"):
        collect(net, torch.rand(1, 3, 20, 30))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tokens, tile", [(None, 16), (576, None)])
def test_no_warning_where_time_grows_linearly(monkeypatch, tokens, tile):
    monkeypatch.setitem(inference.SLOW_PIXELS, "cpu", 400)
    net = Nearest()
    net.config = SimpleNamespace(segment_tokens=tokens, channels=32)
    collect(net, torch.rand(1, 3, 20, 30), tile=tile)


def test_free_memory_obeys_the_container(monkeypatch, tmp_path):
    total = free_memory(CPU)
    assert total is None or total > 1 << 20
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\nfile 500000\ninactive_file 500000\n")
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    limited = free_memory(CPU)
    assert limited in (None, 3_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = free_memory(CPU)
    assert unlimited is None or unlimited > 3_000_000


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "meta"])
def test_devices_that_cannot_be_used_are_named(name):
    with pytest.raises(ValueError, match=name.split(":")[0]) as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value)


def test_default_device():
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == CPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp16", "bf16"])
def test_cuda_agrees_with_the_cpu(dtype):
    net = float32_ends(EFRDN(4, channels=16, distilled=4).eval().set_attention(emha_sdpa))
    x = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    exact, _ = collect(net, x)
    cuda = torch.device("cuda")
    y, outcome = collect(net.to(cuda), x, device=cuda, dtype=dtype, tile=24)
    whole, _ = collect(net, x, device=cuda, dtype=dtype, tile=0)
    assert outcome.dtype == dtype and y.device == CPU
    assert (whole - exact).abs().max() < {"fp32": 1e-5, "tf32": 5e-3}.get(dtype, 5e-2)
