"""`upscale()`: pictures of any usual kind in, the same kind out, `scale` times as large.

Gray goes through the network as three equal channels and comes back as their mean. Transparency is
upscaled apart, by the network too, and kept within the range of its 3x3 neighbourhood, so that
opaque stays opaque and clear stays clear; the colour below clear pixels is filled in from their
visible neighbours first, so that no hidden colour bleeds into an edge.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import checkpoint, dispatch, images
from .device import PRECISIONS, float32_ends, resolve_device
from .encode import to_pil
from .errors import UsageError
from .fast import accelerate
from .inference import Outcome, Progress, check_tiles, run
from .model import EFRDN
from .packing import OPS
from .reference import emha_sdpa

__all__ = ["Upscaler", "fast_form", "prepare", "upscale"]

PEAKS = {torch.uint8: 255, torch.uint16: 65535}
KEPT_INFO = ("icc_profile", "exif", "xmp", "dpi", "comment")


def upscale(
    image: Image.Image | np.ndarray | Tensor,
    scale: int = 4,
    *,
    model: str | os.PathLike | nn.Module | None = None,
    tile: int | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Image.Image | np.ndarray | Tensor:
    """Upscale one image; the result is of the same kind.

    Args:
        image: Pillow image; uint8, uint16 or float32 array `[H, W]` or `[H, W, C]`; or tensor
            `[C, H, W]` or `[N, C, H, W]`, uint8, uint16 or floating; floats in [0, 1]. C = 1 gray,
            2 gray + alpha, 3 RGB, 4 RGB + alpha. Pillow images with palette come back as RGB(A),
            1-bit ones as gray; their EXIF, ICC, XMP and resolution stay in `info`, and they are not
            turned.
        scale: 2, 3 or 4.
        model: "x2", "x3", "x4" or a checkpoint file; or a network `[N, 3, H, W] -> [N, 3, sH, sW]`,
            used where it is. Default: the shipped weights for `scale`, loaded once per process.
        tile: Edge of the tiles in pixels, 0 for the whole image at once. Default: the whole image
            if memory allows, else tiles that fit.
        device: Where the network runs. Default: CUDA where there is one, else the CPU.
        dtype: "auto" (fp32), "fp32", "tf32", "fp16" or "bf16". Output that is not finite in half
            precision is computed again in the next wider one.
        progress: Called with (tiles done, tiles in all).

    Raises:
        TypeError: An image of another kind.
        ValueError: An image of a wrong shape, smaller than 3 px, or with NaN; a scale that is not
            the model's.
        FileNotFoundError: No such checkpoint, or no weights are shipped for `scale`.

    Example:
        >>> upscale(Image.open("photo.jpg")).save("photo_x4.png")
    """
    worker = Upscaler(scale, model, tile=tile, device=device, dtype=dtype)
    if isinstance(image, Image.Image):
        return worker.image(image, progress)
    if isinstance(image, np.ndarray):
        return worker.array(image, progress)
    if isinstance(image, Tensor):
        return worker.tensor(image, progress)
    raise TypeError(
        f"upscale: expected a Pillow image, array or tensor, got {type(image).__name__}; "
        "a file is opened by PIL.Image.open(path)"
    )


class Upscaler:
    """A network and how to run it, for many images; arguments as for `upscale`.

    Args:
        scale: 2, 3 or 4. Default: that of `model`, else 4.
        overlap: Pixels that neighbouring tiles share. Default: `inference.OVERLAP`.
        exact: Bands of `tile` rows with the numbers of the whole image, by the plain network, see
            `efrdn_fast.exact`.
        segment_tokens: Attention by segments of so many tokens, for a stored `model`.
        backend: Of the ops of the network, see `EFRDNFast`; "reference" is the plain network.

    Raises:
        BackendUnavailable: `backend` cannot run here.
        UsageError: No such device here, or arguments that do not go together.
    """

    outcome: Outcome | None = None
    """How the last image was computed."""

    def __init__(
        self,
        scale: int | None = None,
        model: str | os.PathLike | nn.Module | None = None,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        exact: bool = False,
        segment_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: str = "auto",
        backend: str = "auto",
    ):
        if dtype not in PRECISIONS:
            raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}; got {dtype!r}")
        if tile and not exact:
            check_tiles(tile, overlap or 0)
        if exact:
            if dispatch.requested(backend) not in ("auto", "reference"):
                raise UsageError(f"exact bands run the plain network, not backend {backend!r}")
            backend = "reference"
        if isinstance(model, nn.Module):
            if segment_tokens is not None:
                raise ValueError("segment_tokens is for stored models: EFRDN(segment_tokens=...)")
            own = next((p.device for p in model.parameters()), torch.device("cpu"))
            self.device = own if device is None else torch.device(device)
            if self.device.type != own.type:
                raise ValueError(f"the model is on {own}, device={device!r} was asked for: move it")
            self.net = fast_form(model, self.device, backend)
        else:
            self.device = resolve_device(device)
            path = checkpoint.resolve(f"x{scale or 4}" if model is None else model)
            asked = segment_tokens, dispatch.requested(backend)
            self.net = _load(path, path.stat().st_mtime_ns, self.device, *asked)
        own_scale = getattr(self.net, "scale", None)
        self.scale = scale or own_scale or 4
        if own_scale not in (None, self.scale):
            raise UsageError(
                f"model {model if not isinstance(model, nn.Module) else type(model).__name__} "
                f"upscales by {own_scale}, not by {self.scale}"
            )
        self.tile, self.overlap, self.exact, self.dtype = tile, overlap, exact, dtype

    def image(self, image: Image.Image, progress: Progress | None = None) -> Image.Image:
        """Pillow image -> Pillow image."""
        result = to_pil(self.array(images.from_pil(image), progress))
        result.info = {key: image.info[key] for key in KEPT_INFO if key in image.info}
        if image.mode == "CMYK":
            result.info.pop("icc_profile", None)  # the pixels are sRGB now
        return result

    def array(self, pixels: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """uint8, uint16 or float32 `[H, W]` or `[H, W, C]` -> the same."""
        native = pixels.dtype.newbyteorder("=")
        if native not in (np.uint8, np.uint16, np.float32):
            raise TypeError(
                f"upscale: arrays must be uint8, uint16 or float32, got {pixels.dtype}; "
                "other floating images go in as tensors [C, H, W] in [0, 1]"
            )
        if pixels.ndim not in (2, 3):
            raise ValueError(
                f"upscale: arrays must be [H, W] or [H, W, C], got {list(pixels.shape)}"
            )
        memory = np.ascontiguousarray(pixels, native)
        planes = torch.from_numpy(memory if memory.flags.writeable else memory.copy())
        planes = planes[..., None] if pixels.ndim == 2 else planes
        result = self.tensor(planes.permute(2, 0, 1), progress).permute(1, 2, 0).numpy()
        return result[..., 0] if pixels.ndim == 2 else result

    def tensor(self, x: Tensor, progress: Progress | None = None) -> Tensor:
        """`[C, H, W]` or `[N, C, H, W]`, floating, uint8 or uint16 -> the same, within [0, 1]."""
        _check_tensor(x)
        batch = (x if x.dim() == 4 else x[None]).detach().cpu()
        with _evaluating(self.net):
            result = self._batch(batch, progress)
        return (result if x.dim() == 4 else result[0]).to(x.device)

    def _batch(self, x: Tensor, progress: Progress | None) -> Tensor:
        count, channels, height, width = x.shape
        colours = channels - 1 + channels % 2  # 1 or 3
        colour, alpha = x[:, :colours], x[:, colours:]
        shape = (count, height * self.scale, width * self.scale, channels)
        out = torch.empty(shape, dtype=x.dtype).permute(0, 3, 1, 2)  # pixels interleaved
        varied = colours < channels and bool((alpha != alpha[:1, :, :1, :1]).any())
        if varied:
            colour = fill_clear(_unit(colour), _unit(alpha))
        elif colours < channels:
            out[:, colours:] = alpha[0, 0, 0, 0]
        self._run(colour, out[:, :colours], _of_passes(progress, 0, 1 + varied))
        if varied:
            self._run(alpha, out[:, colours:], _of_passes(progress, 1, 2), _local_range(alpha))
        return out

    def _run(
        self,
        x: Tensor,
        out: Tensor,
        progress: Progress | None,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """The network's output for `x` into `out`, rounded if it is an integer; within `bounds`."""
        peak = PEAKS.get(out.dtype, 1)

        def emit(top: int, band: Tensor) -> None:
            rows = slice(top, top + band.shape[2])
            if band.shape[3] != out.shape[3]:
                factor = band.shape[3] // x.shape[3]
                raise ValueError(f"the network upscales by {factor}, not by {self.scale}")
            if out.shape[1] == 1:
                band = band.mean(dim=1, keepdim=True)
            if bounds:
                near = torch.arange(rows.start, rows.stop) // self.scale
                least, most = (b[:, :, near].repeat_interleave(self.scale, dim=3) for b in bounds)
                band = band.clamp(least, most)
            band = band.clamp(0, 1)
            out[:, :, rows] = (band * peak).round().to(out.dtype) if peak > 1 else band

        self.outcome = run(
            self.net,
            x,
            emit,
            tile=self.tile,
            overlap=self.overlap,
            exact=self.exact,
            device=self.device,
            dtype=self.dtype,
            progress=progress,
        )


def prepare(net: EFRDN, device: torch.device) -> EFRDN:
    """`net` on `device`, ready to be run by an `Upscaler`: attention without a score matrix."""
    return float32_ends(net.set_attention(emha_sdpa)).to(device)


def fast_form(net: nn.Module, device: torch.device, backend: str = "auto") -> nn.Module:
    """`net` as EFRDNFast, on the same weights, unless it is no plain EFRDN or has hooks.

    Raises:
        ValueError: No backend has this name.
        BackendUnavailable: `backend` cannot run on `device`.
    """
    dispatch.plan(OPS, backend, torch.empty(0, device=device))
    if type(net) is not EFRDN or dispatch.requested(backend) == "reference":
        return net
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    return net if hooked else accelerate(net, backend=backend)


def fill_clear(colour: Tensor, alpha: Tensor) -> Tensor:
    """Colour `[N, C, H, W]` with the pixels where `alpha` is 0 filled from visible neighbours.

    Pyramid of alpha-weighted means of 2x2 pixels; what is clear takes the colour one level up.
    """
    if alpha.shape[2] * alpha.shape[3] == 1 or alpha.all():
        return colour
    height, width = alpha.shape[2:]
    pad = (0, width % 2, 0, height % 2)
    weight = F.avg_pool2d(F.pad(alpha, pad), 2)
    mean = F.avg_pool2d(F.pad(colour * alpha, pad), 2) / weight.clamp_min(1e-12)
    above = fill_clear(mean, weight).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return torch.where(alpha > 0, colour, above[:, :, :height, :width])


def _local_range(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value in the 3x3 pixels around each, in [0, 1]."""
    unit = _unit(alpha)
    return -F.max_pool2d(-unit, 3, stride=1, padding=1), F.max_pool2d(unit, 3, stride=1, padding=1)


def _unit(x: Tensor) -> Tensor:
    """Floating copy of `x` in [0, 1]."""
    return (
        x.float() / PEAKS[x.dtype]
        if x.dtype in PEAKS
        else x.to(torch.promote_types(x.dtype, torch.float32))
    )


def _check_tensor(x: Tensor) -> None:
    shape = list(x.shape)
    if x.dim() not in (3, 4) or not 1 <= x.shape[-3] <= 4:
        raise ValueError(
            f"upscale: expected [C, H, W] or [N, C, H, W] with 1 to 4 channels, got {shape}"
        )
    if x.shape[-1] < 3 or x.shape[-2] < 3:
        raise ValueError(
            f"upscale: an image must be at least 3x3 px, got {x.shape[-1]}x{x.shape[-2]} (W x H)"
        )
    if x.dim() == 4 and not x.shape[0]:
        raise ValueError(f"upscale: an empty batch, {shape}")
    if x.is_floating_point():
        if not x.isfinite().all():
            raise ValueError("upscale: the image holds NaN or infinite values")
        least, most = x.min().item(), x.max().item()
        if least < -1 or most > 2:
            raise ValueError(
                f"upscale: floating images must be in [0, 1], got {least:.4g} to {most:.4g}"
            )
    elif x.dtype not in PEAKS:
        raise TypeError(f"upscale: tensors must be floating, uint8 or uint16, got {x.dtype}")


@functools.lru_cache(maxsize=4)
def _load(
    path: Path, _modified: int, device: torch.device, segment_tokens: int | None, backend: str
) -> EFRDN:
    """Network of a checkpoint on `device`; read again when the file has changed."""
    given = {} if segment_tokens is None else {"segment_tokens": segment_tokens}
    return fast_form(prepare(EFRDN.from_pretrained(path, **given), device), device, backend)


class _evaluating:
    """Evaluation mode inside the block; the mode of each sub-module is restored after it."""

    def __init__(self, net: nn.Module):
        self.training = [module for module in net.modules() if module.training]

    def __enter__(self) -> None:
        for module in self.training:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self.training:
            module.training = True


def _of_passes(progress: Progress | None, done: int, passes: int) -> Callable | None:
    """Progress of pass `done` of `passes` equal ones."""
    if progress is None:
        return None
    return lambda tiles, count: progress(done * count + tiles, passes * count)
