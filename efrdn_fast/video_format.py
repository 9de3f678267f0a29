"""Pixel formats, colours and encoders of video: what a stream is and how its result is encoded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

__all__ = ["Form", "av_module", "encoder", "form_of", "frame_of", "pixels_of"]

UNSPECIFIED, BT709, BT601, BT2020 = 2, 1, 5, 9
LIMITED, FULL = 1, 2
# Matrix as the standard numbers it -> as the converter does.
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
CODECS = {".webm": {8: "libvpx-vp9", 10: "libsvtav1"}}
SETTINGS = {
    "libx264": {"preset": "medium"},
    "libx265": {"preset": "medium", "x265-params": "log-level=error:bframes=0"},
    "libvpx-vp9": {"b:v": "0", "row-mt": "1", "lag-in-frames": "0"},
    "libsvtav1": {"preset": "6", "svtav1-params": "pred-struct=1"},
}


@dataclass(frozen=True)
class Form:
    """Size, depth, colours and encoder of an upscaled video."""

    width: int
    height: int
    scale: int
    bits: int
    """Per channel, 8 or 10."""
    pixel_format: str
    """Of the result; chroma is subsampled as in the input."""
    matrix: int
    """As the standard numbers it; never unspecified, for players guess it from the size."""
    full_range: bool
    primaries: int
    transfer: int
    rotation: int
    """Degrees counter-clockwise, kept as a tag."""
    time_base: Fraction
    rate: Fraction | None
    aspect: Fraction | None
    codec: str
    crf: int

    @property
    def out_width(self) -> int:
        return self.width * self.scale

    @property
    def out_height(self) -> int:
        return self.height * self.scale

    def describe(self) -> str:
        """Rate, depth, colours and encoder in words."""
        matrix = {BT709: "BT.709", 5: "BT.601", 6: "BT.601", 9: "BT.2020"}.get(self.matrix, "other")
        quality = "lossless" if self.codec == "ffv1" else f"crf {self.crf}"
        return (
            f"{float(self.rate):.6g} frames/s on average, {self.bits} bits, {matrix} "
            f"{'full' if self.full_range else 'limited'} range, {self.codec} {quality}"
            if self.rate
            else f"{self.bits} bits, {matrix}, {self.codec} {quality}"
        )


def av_module():
    """PyAV, with its log lines off.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "videos need PyAV 18 or newer (Python 3.11 or newer): pip install efrdn_fast[video]"
        ) from error
    av.logging.set_level(None)
    return av


def form_of(stream, target: Path, scale: int, codec: str | None, crf: int) -> Form:
    """Form of the result for a video `stream`.

    Raises:
        ValueError: A kind of video that would lose something, or an encoder that cannot hold it.
    """
    context, layout = stream.codec_context, stream.codec_context.format
    width, height = context.width, context.height
    if layout is None or not width or not height:
        raise ValueError(f"{stream.container.name}: its video cannot be decoded here")
    if min(width, height) < 3:
        raise ValueError(f"{stream.container.name}: must be at least 3x3 px, is {width}x{height}")
    bits = max(component.bits for component in layout.components)
    if bits not in (8, 10):
        raise ValueError(f"{stream.container.name}: has {bits} bits a channel; 8 and 10 are kept")
    if len(layout.components) in (2, 4) and "a" in layout.name:
        raise ValueError(f"{stream.container.name}: has transparency ({layout.name}), not kept")
    first = next(stream.container.decode(stream), None)
    stream.container.seek(0)
    if first is None:
        raise ValueError(f"{stream.container.name}: no frame could be decoded")
    if first.interlaced_frame:
        warnings.warn(f"{stream.container.name}: is interlaced; its lines are not woven apart")
    codec = codec or CODECS.get(target.suffix.lower(), {}).get(bits, "libx264")
    pixel_format = _pixel_format(layout, bits)
    _check_codec(codec, pixel_format, (width * scale, height * scale))
    matrix = context.colorspace
    if matrix not in MATRICES:  # unspecified, or RGB that becomes YCbCr
        matrix = BT709 if layout.is_rgb or height >= 720 else BT601
    return Form(
        width=width,
        height=height,
        scale=scale,
        bits=bits,
        pixel_format=pixel_format,
        matrix=int(matrix),
        full_range=context.color_range == FULL or layout.name.startswith("yuvj"),
        primaries=int(context.color_primaries),
        transfer=int(context.color_trc),
        rotation=int(first.rotation),
        time_base=stream.time_base,
        rate=stream.average_rate,
        aspect=stream.sample_aspect_ratio or None,
        codec=codec,
        crf=crf,
    )


def encoder(form: Form, target: Path, context=None):
    """An open encoder for `form`; `context` is one that a container made, to be set up alike.

    Frames are coded in order of display, so that parts join and every prefix plays.
    """
    av = av_module()
    context = context or av.CodecContext.create(form.codec, "w")
    context.width, context.height = form.out_width, form.out_height
    context.pix_fmt, context.time_base = form.pixel_format, form.time_base
    if form.rate:
        context.framerate = form.rate
    if form.aspect:
        context.sample_aspect_ratio = form.aspect
    context.colorspace, context.color_range = form.matrix, FULL if form.full_range else LIMITED
    context.color_primaries, context.color_trc = form.primaries, form.transfer
    context.max_b_frames = 0
    quality = {} if form.codec == "ffv1" else {"crf": str(form.crf)}
    context.options = {**SETTINGS.get(form.codec, {}), **quality}
    if target.suffix.lower() in (".mp4", ".mov", ".m4v", ".mkv", ".webm"):
        context.flags |= av.codec.context.Flags.global_header
    context.open()
    return context


def pixels_of(frame, form: Form) -> np.ndarray:
    """RGB `[H, W, 3]` of a decoded frame: uint8, or uint16 for 10 bits."""
    converted = frame.reformat(
        format="rgb24" if form.bits == 8 else "rgb48le",
        interpolation=_interpolation(),
        src_color_range=FULL if form.full_range else LIMITED,
        dst_color_range=FULL,
        **_matrix(form),
    )
    return converted.to_ndarray()


def frame_of(pixels: np.ndarray, stamp: int, form: Form):
    """Frame to encode, shown at tick `stamp`."""
    av = av_module()
    frame = av.VideoFrame.from_ndarray(pixels, "rgb24" if form.bits == 8 else "rgb48le")
    frame = frame.reformat(
        format=form.pixel_format,
        interpolation=_interpolation(),
        src_color_range=FULL,
        dst_color_range=FULL if form.full_range else LIMITED,
        **_matrix(form),
    )
    frame.pts, frame.time_base = stamp, form.time_base
    return frame


def _interpolation():
    """Bicubic chroma at full width, rounded to nearest: a grey or a colour comes back as it was."""
    kinds = av_module().video.reformatter.Interpolation
    exact = kinds.ACCURATE_RND | kinds.FULL_CHR_H_INT | kinds.FULL_CHR_H_INP
    return kinds.BICUBIC | exact


def _matrix(form: Form) -> dict[str, int]:
    matrix = MATRICES[form.matrix]
    return {"src_colorspace": matrix, "dst_colorspace": matrix}


def _pixel_format(layout, bits: int) -> str:
    """YCbCr with the chroma of `layout`; gray becomes 4:2:0, RGB 4:4:4."""
    across, down = layout.chroma_width(16), layout.chroma_height(16)
    if layout.is_rgb:
        across = down = 16
    elif len(layout.components) == 1:
        across = down = 8
    chroma = {(16, 16): "444", (8, 16): "422", (8, 8): "420"}.get((across, down))
    if chroma is None:
        raise ValueError(f"video of pixel format {layout.name}, whose chroma has no usual layout")
    return f"yuv{chroma}p" + ("10le" if bits == 10 else "")


def _check_codec(name: str, pixel_format: str, size: tuple[int, int]) -> None:
    av = av_module()
    try:
        codec = av.codec.Codec(name, "w")
    except (av.error.FFmpegError, ValueError) as error:
        raise ValueError(f"no encoder {name!r} in this FFmpeg") from error
    formats = [f.name for f in codec.video_formats or ()]
    if pixel_format not in formats:
        raise ValueError(
            f"encoder {name} cannot hold {pixel_format} (it takes {', '.join(formats)}); "
            "choose another with --video-codec"
        )
    if "420" in pixel_format and (size[0] % 2 or size[1] % 2):
        raise ValueError(f"{size[0]}x{size[1]} px are odd, which 4:2:0 cannot hold; use -s 2 or 4")
