"""Video files through the network: decoded, upscaled and encoded in this process (extra `video`).

Every frame keeps its time stamp, so constant and variable frame rates come out as they went in.
Audio and subtitles are copied packet by packet. Encoded frames are kept in parts beside the result
until it is whole: an interrupted run leaves a file that plays and is gone on with by the next one.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from .upscaler import Upscaler
from .video_format import Form, av_module, encoder, form_of, frame_of, pixels_of
from .video_parts import Parts

__all__ = ["EXTENSIONS", "WRITABLE", "Plan", "VideoOptions", "plan_video", "upscale_video"]

WRITABLE = (".mp4", ".mkv", ".mov", ".webm", ".m4v")
"""Videos that are written."""
EXTENSIONS = (*WRITABLE, ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg")
"""Videos that are read."""
COPIED = ("audio", "subtitle")

FrameProgress = Callable[[int, int, float], None]  # frames done, frames in all (0: unknown), per s


@dataclass(frozen=True)
class VideoOptions:
    """How videos are encoded."""

    codec: str | None = None
    """Encoder of FFmpeg. Default: libx264; for WebM libvpx-vp9, with 10 bits libsvtav1."""
    crf: int = 16
    """Quality of the encoder, less is better; without meaning for ffv1, which is lossless."""


DEFAULTS = VideoOptions()


@dataclass(frozen=True)
class Plan:
    """What will become of a video."""

    source: Path
    target: Path
    form: Form
    frames: int
    """Frames as the file tells or as its duration implies; 0 if neither."""
    implied: bool
    """Whether they follow from the duration, to which sound may add."""
    copied: tuple[str, ...]
    """Streams that are copied, in words."""
    left_out: tuple[str, ...]
    """Streams that are not."""
    done: int
    """Frames that an earlier run has stored."""

    def lines(self) -> list[str]:
        """For a reader."""
        form = self.form
        about = "about " if self.implied else ""
        frames = f"{about}{self.frames or 'an unknown number of'} frames"
        resumed = f", {self.done} of them done already" if self.done else ""
        return [
            f"{self.source} -> {self.target}",
            f"  {frames}{resumed}, {form.width}x{form.height} -> {form.out_width}x"
            f"{form.out_height}, {form.describe()}",
            f"  copied: {', '.join(self.copied) or 'nothing'}",
            *([f"  left out: {', '.join(self.left_out)}"] if self.left_out else []),
        ]


def plan_video(
    source: Path, target: Path, upscaler: Upscaler, options: VideoOptions = DEFAULTS
) -> Plan:
    """Look into `source` and find out whether `target` can hold the result; writes nothing.

    Raises:
        ValueError: No video, or of a kind that would lose something; every message is one line.
        ImportError: PyAV is not installed.
    """
    av = av_module()
    with _opened(source) as container:
        stream = _video_stream(container, source)
        form = form_of(stream, target, upscaler.scale, options.codec, options.crf)
        copied, left_out = [], []
        for other in container.streams:
            if other is not stream:
                words = f"{other.type} {other.codec_context.name if other.codec_context else ''}"
                (copied if other.type in COPIED else left_out).append(words.strip())
        _try_header(av, container, stream, target, form)
        length = stream.duration and stream.duration * stream.time_base
        if not length and container.duration:  # Matroska tells that of the file only
            length = Fraction(container.duration, av.time_base)
        rate = stream.average_rate
        implied = round(length * rate) if length and rate and not stream.frames else 0
        frames = stream.frames or implied
        done = Parts(target, form, _fingerprint(source, upscaler)).frames
    return Plan(source, target, form, frames, bool(implied), tuple(copied), tuple(left_out), done)


def upscale_video(
    source: Path,
    target: Path,
    upscaler: Upscaler,
    options: VideoOptions = DEFAULTS,
    progress: FrameProgress | None = None,
) -> Plan:
    """Upscale the first video stream of `source` into `target`, which appears when it is whole.

    An interrupt leaves `<name>.partial<ext>` with what is done; the same call goes on from there.

    Raises:
        ValueError: As `plan_video`; no frame can be decoded.
        OSError: `target` cannot be written.
        ImportError: PyAV is not installed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    plan = plan_video(source, target, upscaler, options)
    parts = Parts(target, plan.form, _fingerprint(source, upscaler))
    parts.begin()
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    start, first = time.perf_counter(), parts.frames
    try:
        for done, (stamp, length, pixels) in enumerate(_frames(source, plan.form), 1):
            if done <= first:
                continue
            parts.add(frame_of(upscaler.array(pixels), stamp, plan.form), length)
            if progress:
                rate = (done - first) / (time.perf_counter() - start)
                progress(done, max(plan.frames, done), rate)
        parts.close()
    except BaseException as error:
        parts.close()
        if parts.frames:
            _write(source, partial, plan, parts, whole=False)
            if isinstance(error, KeyboardInterrupt):
                warnings.warn(
                    f"{partial} holds the first {parts.frames} frames; the same command goes on"
                )
        raise
    if not parts.frames:
        raise ValueError(f"{source}: no frame could be decoded")
    _write(source, target, plan, parts, whole=True)
    parts.remove()
    partial.unlink(missing_ok=True)
    return plan


def _frames(source: Path, form: Form) -> Iterator[tuple[int, int, np.ndarray]]:
    """(time stamp, duration, pixels `[H, W, 3]`) of every frame, in order of display.

    Stamps are in ticks of the stream; missing ones follow from the rate, and none stands still.
    """
    av = av_module()
    damaged, last = 0, None
    with _opened(source) as container:
        stream = _video_stream(container, source)
        stream.thread_type = "AUTO"
        tick = max(1, round(1 / (stream.average_rate or 25) / stream.time_base))
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                damaged += 1
                continue
            for frame in frames:
                stamp = frame.pts if frame.pts is not None else (0 if last is None else last + tick)
                last = stamp if last is None else max(stamp, last + 1)
                yield last, frame.duration or tick, pixels_of(frame, form)
    if damaged:
        warnings.warn(f"{source}: {damaged} damaged packets were left out")


def _write(source: Path, path: Path, plan: Plan, parts: Parts, whole: bool) -> None:
    """Put the stored frames and the copied streams together, and the file in its place."""
    av = av_module()
    scratch = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with _opened(source) as container:
            stream = _video_stream(container, source)
            with av.open(str(scratch), "w") as output:
                video, others = _layout(container, stream, output, path, plan.form)
                videos = ((p.pts * p.time_base, p, video) for p in parts.packets())
                copies = _copies(container, others, None if whole else parts.end)
                for _, packet, out in heapq.merge(videos, copies, key=lambda item: item[0]):
                    packet.stream = out
                    output.mux(packet)
        os.replace(scratch, path)
    except av.error.FFmpegError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def _copies(container, others: dict, end: float | None) -> Iterator[tuple]:
    """(seconds, packet, output stream) of the copied streams, to `end` seconds."""
    if not others:
        return
    for packet in container.demux(*others):
        if packet.dts is None:
            continue
        seconds = packet.dts * packet.time_base
        if end is not None and seconds > end:
            return
        yield seconds, packet, others[packet.stream]


def _layout(container, stream, output, path: Path, form: Form) -> tuple:
    """Streams, chapters and tags of the output: (video stream, {input stream: output stream})."""
    video = output.add_stream(form.codec, rate=stream.average_rate)
    encoder(form, path, video.codec_context)
    video.time_base = form.time_base
    video.metadata.update(_tags(stream.metadata))
    if form.rotation:
        video.set_display_rotation(form.rotation)
    others = {}
    for other in container.streams:
        if other is not stream and other.type in COPIED:
            others[other] = output.add_stream_from_template(other)
            others[other].metadata.update(_tags(other.metadata))
            others[other].disposition = other.disposition
    output.metadata.update(container.metadata)
    chapters = container.chapters()
    if chapters:
        output.set_chapters(chapters)
    output.start_encoding()
    return video, others


def _tags(metadata: dict) -> dict:
    """Tags that stay true: not those in which a muxer told of the old stream's size."""
    gone = ("BPS", "DURATION", "NUMBER_OF_", "_STATISTICS_", "ENCODER", "encoder")
    return {key: value for key, value in metadata.items() if not key.startswith(gone)}


def _try_header(av, container, stream, target: Path, form: Form) -> None:
    """Raise ValueError now rather than after hours if the container cannot hold the streams."""
    name = target.suffix[1:].lower()
    name = {"mkv": "matroska", "m4v": "mp4"}.get(name, name)
    try:
        with av.open(os.devnull, "w", format=name) as output:
            _layout(container, stream, output, target, form)
    except (av.error.FFmpegError, ValueError) as error:
        kinds = ", ".join(f"{s.type} {s.codec_context.name}" for s in _copied(container, stream))
        raise ValueError(
            f"{target}: {target.suffix} cannot hold {form.codec} with {kinds or 'no other stream'} "
            f"({error}); write .mkv"
        ) from error


def _copied(container, stream) -> Iterable:
    return [s for s in container.streams if s is not stream and s.type in COPIED]


def _opened(source: Path):
    av = av_module()
    try:
        return av.open(str(source))
    except av.error.FFmpegError as error:
        raise ValueError(f"{source}: not a video that can be read ({error.strerror})") from error


def _video_stream(container, source: Path):
    if not container.streams.video:
        raise ValueError(f"{source}: holds no video stream")
    return container.streams.video[0]


def _fingerprint(source: Path, upscaler: Upscaler) -> dict:
    """What must be the same, beside the form, for stored frames to be of use."""
    about, digest = source.stat(), hashlib.sha256()
    for value in upscaler.net.state_dict().values():
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = getattr(upscaler.net, "config", None)
    how = (upscaler.tile, upscaler.overlap, upscaler.exact, upscaler.dtype, config)
    return {
        "source": [str(source.resolve()), about.st_size, about.st_mtime_ns],
        "weights": digest.hexdigest(),
        "how": repr(how),
    }
