"""Videos: time stamps, sound, subtitles, depth and colours kept; interrupted runs gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efrdn_fast import cli, video, video_parts
from efrdn_fast.batch import plan
from efrdn_fast.config import EFRDNConfig
from efrdn_fast.upscaler import Upscaler

av = pytest.importorskip("av", reason="the extra `video` needs Python 3.11")

BT709, BT601, BT2020 = 1, 5, 9
LIMITED, FULL = 1, 2
VARIABLE = [0, 1001, 2002, 4004, 4500, 9009, 10010, 10100]
TICK = Fraction(1, 30000)
TEXT = "1\n00:00:00,000 --> 00:00:00,300\nfirst\n\n2\n00:00:00,310 --> 00:00:00,400\nsecond\n"


class Twice(nn.Module):
    """Every pixel as 2x2 equal ones; `seen` frames before it raises `then`."""

    def __init__(self, then=None, after=10**9):
        super().__init__()
        self.then, self.after, self.seen = then, after, 0

    def forward(self, x):
        self.seen += 1
        if self.seen > self.after:
            raise self.then
        return F.interpolate(x, scale_factor=2, mode="nearest")


def colour(index):
    """RGB of frame `index`."""
    return (30 * index % 200 + 20, 220 - 25 * index % 200, 40 + 17 * index % 150)


def clip(
    path, stamps=VARIABLE, pixels="yuv420p", matrix=BT709, span=LIMITED, sound=True, **options
):
    """A video of plain colours, one for each frame, with a tone; `text`: with subtitles."""
    size = options.pop("size", (32, 24))
    text = options.pop("text", False)
    with av.open(str(path), "w") as file:
        if text:
            (path.parent / "t.srt").write_text(TEXT)
            titles = av.open(str(path.parent / "t.srt"))
            copy = file.add_stream_from_template(titles.streams.subtitles[0])
        stream = file.add_stream(options.pop("codec", "libx264"), rate=30)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.time_base = stream.codec_context.time_base = TICK
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, span
        stream.options = options.pop("options", {"crf": "1"})
        if options.pop("rotated", False):
            stream.set_display_rotation(90)
        file.metadata["title"] = "A clip"
        voice = file.add_stream("aac", rate=44100, layout="mono") if sound else None
        for index, stamp in enumerate(stamps):
            rgb = np.full((size[1], size[0], 3), colour(index), np.uint8)
            frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(
                format=pixels,
                src_colorspace=matrix if matrix != 2 else BT601,
                dst_colorspace=matrix if matrix != 2 else BT601,
                src_color_range=FULL,
                dst_color_range=span,
            )
            frame.pts, frame.time_base = stamp, TICK
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        for block in range(20 if sound else 0):
            wave = (np.sin(np.arange(1024) / 10 + block) * 8000).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 44100, block * 1024
            file.mux(voice.encode(frame))
        if sound:
            file.mux(voice.encode(None))
        if text:
            for packet in titles.demux():
                if packet.dts is not None:
                    packet.stream = copy
                    file.mux(packet)
    return path


def frames(path):
    """(seconds, planes) of all frames."""
    with av.open(str(path)) as file:
        return [(f.pts * f.time_base, f) for f in file.decode(video=0)]


def packets(path, kind):
    """(seconds, bytes) of the packets of the first stream of a kind."""
    with av.open(str(path)) as file:
        stream = getattr(file.streams, kind)[0]
        return [(p.pts * p.time_base, bytes(p)) for p in file.demux(stream) if p.pts is not None]


def middle(frame):
    """Y, U, V of the pixel in the middle."""
    dtype = np.uint16 if "10" in frame.format.name else np.uint8
    planes = [np.frombuffer(p, dtype).reshape(p.height, -1) for p in frame.planes]
    widths = [plane.width for plane in frame.planes]  # lines are padded
    return [int(p[len(p) // 2, width // 2]) for p, width in zip(planes, widths, strict=True)]


@pytest.mark.parametrize(
    "name, pixels, matrix, span",
    [
        ("a.mp4", "yuv420p", BT709, LIMITED),
        ("a.mkv", "yuv420p10le", BT2020, LIMITED),
        ("a.mov", "yuv444p", BT601, LIMITED),
        ("a.mkv", "yuv422p", BT709, FULL),
    ],
)
def test_variable_rate_depth_and_colours(tmp_path, name, pixels, matrix, span):
    source = clip(tmp_path / name, VARIABLE, pixels, matrix, span)
    target = tmp_path / f"out{Path(name).suffix}"
    options = video.VideoOptions(crf=0) if "10" not in pixels else video.VideoOptions(crf=1)
    video.upscale_video(source, target, Upscaler(2, Twice()), options)
    before, after = frames(source), frames(target)
    assert [time for time, _ in after] == [time for time, _ in before]
    assert len(after) == len(VARIABLE)
    for (_, old), (_, new) in zip(before, after, strict=True):
        assert (new.width, new.height) == (2 * old.width, 2 * old.height)
        assert new.format.name.replace("j", "") == pixels
        assert (new.colorspace, new.color_range) == (matrix, span)
        assert max(abs(a - b) for a, b in zip(middle(old), middle(new), strict=True)) <= 2
    assert packets(target, "audio") == packets(source, "audio")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({name, target.name})


@pytest.mark.parametrize("name, codec", [("a.ts", "libx264"), ("a.mpg", "mpeg2video")])
def test_transport_streams_become_matroska(tmp_path, name, codec):
    """Their time stamps begin somewhere, and sound stays where it was."""
    source, target = tmp_path / name, tmp_path / "out.mkv"
    with av.open(str(source), "w") as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        voice = file.add_stream("mp2", rate=44100, layout="mono")
        for index in range(5):
            rgb = np.full((24, 32, 3), colour(index), np.uint8)
            frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        for block in range(8):
            wave = (np.sin(np.arange(1152) / 10 + block) * 8000).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 44100, block * 1152
            file.mux(voice.encode(frame))
        file.mux(voice.encode(None))
    assert plan([source], None, scale=2)[0].target == tmp_path / "a_x2.mkv"
    video.upscale_video(source, target, Upscaler(2, Twice()))
    before, after = (frames(path) for path in (source, target))
    assert len(after) == 5
    assert [float(t) for t, _ in after] == pytest.approx([float(t) for t, _ in before], abs=1e-3)
    heard, kept = (packets(path, "audio") for path in (source, target))
    assert [data for _, data in kept] == [data for _, data in heard]
    assert float(kept[0][0]) == pytest.approx(float(heard[0][0]), abs=1e-3)


def test_matroska_tells_its_frames(tmp_path):
    source = clip(tmp_path / "a.mkv", [1001 * i for i in range(12)])
    made = video.plan_video(source, tmp_path / "b.mkv", Upscaler(2, Twice()))
    assert 11 <= made.frames <= 16 and f"about {made.frames} frames" in made.lines()[1]


def test_constant_rate_stays_constant(tmp_path):
    source = clip(tmp_path / "a.mp4", [1000 * i for i in range(60)], sound=False)
    video.upscale_video(source, tmp_path / "b.mp4", Upscaler(2, Twice()))
    with av.open(str(tmp_path / "b.mp4")) as file:
        assert file.streams.video[0].average_rate == 30 and file.streams.video[0].frames == 60
    assert [time for time, _ in frames(tmp_path / "b.mp4")] == [Fraction(i, 30) for i in range(60)]


def test_subtitles_chapters_tags_and_rotation(tmp_path):
    source = clip(tmp_path / "a.mkv", text=True)
    video.upscale_video(source, tmp_path / "b.mkv", Upscaler(2, Twice()))
    assert [data for _, data in packets(tmp_path / "b.mkv", "subtitles")] == [b"first", b"second"]
    assert packets(tmp_path / "b.mkv", "subtitles") == packets(source, "subtitles")
    with av.open(str(tmp_path / "b.mkv")) as file:
        assert file.metadata["title"] == "A clip"
    source = clip(tmp_path / "c.mp4", rotated=True)
    assert frames(source)[0][1].rotation == 90
    video.upscale_video(source, tmp_path / "d.mp4", Upscaler(2, Twice()))
    assert frames(tmp_path / "d.mp4")[0][1].rotation == 90
    assert frames(tmp_path / "d.mp4")[0][1].width == 64  # a tag, not turned twice


def test_a_container_that_cannot_hold_a_stream_is_named_before_the_work(tmp_path):
    source = clip(tmp_path / "a.mkv", text=True)
    net = Twice()
    with pytest.raises(ValueError, match=r"\.mp4 cannot hold .*subtitle (subrip|srt).*write \.mkv"):
        video.upscale_video(source, tmp_path / "b.mp4", Upscaler(2, net))
    assert net.seen == 0 and not (tmp_path / "b.mp4").exists()


def test_unspecified_colours_get_the_matrix_that_players_assume(tmp_path):
    source = clip(tmp_path / "a.mp4", matrix=2, sound=False)
    video.upscale_video(source, tmp_path / "b.mp4", Upscaler(2, Twice()))
    assert frames(source)[0][1].colorspace == 2
    assert frames(tmp_path / "b.mp4")[0][1].colorspace == BT601


def test_interrupt_leaves_a_file_that_plays_and_the_next_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(video_parts, "PART_FRAMES", 3)
    source, target = clip(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    whole = tmp_path / "whole.mp4"
    video.upscale_video(source, whole, Upscaler(2, Twice()))
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="first 5 frames"):
        video.upscale_video(source, target, Upscaler(2, Twice(KeyboardInterrupt(), 5)))
    assert not target.exists()
    partial = frames(tmp_path / "b.partial.mp4")
    assert [t for t, _ in partial] == [t for t, _ in frames(source)][:5]
    sound = packets(tmp_path / "b.partial.mp4", "audio")
    assert 0 < len(sound) < len(packets(source, "audio"))
    net, seen = Twice(), []
    plan = video.upscale_video(source, target, Upscaler(2, net), progress=lambda *a: seen.append(a))
    assert net.seen == 3 and [done for done, *_ in seen] == [6, 7, 8]
    assert all(rate > 0 for *_, rate in seen)
    assert "5 of them done already" in plan.lines()[1]
    assert [t for t, _ in frames(target)] == [t for t, _ in frames(whole)]
    for (_, a), (_, b) in zip(frames(target), frames(whole), strict=True):
        assert max(abs(p - q) for p, q in zip(middle(a), middle(b), strict=True)) <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "whole.mp4"]


@pytest.mark.parametrize("change", ["crf", "weights", "segments", "source"])
def test_parts_of_another_run_are_not_taken_up(tmp_path, change):
    torch.manual_seed(0)
    source, target = clip(tmp_path / "a.mkv", sound=False), tmp_path / "b.mkv"
    with pytest.raises(OSError, match="full"):
        video.upscale_video(source, target, Upscaler(2, Twice(OSError("full"), 5)))
    net, options = Twice(), video.VideoOptions(crf=30 if change == "crf" else 16)
    if change == "weights":
        net.weight = nn.Parameter(torch.ones(1))
    elif change == "segments":
        net.config = EFRDNConfig(scale=2, segment_tokens=64)
    elif change == "source":
        clip(source, VARIABLE[:-1], sound=False)
    video.upscale_video(source, target, Upscaler(2, net), options)
    assert net.seen == len(VARIABLE) - (change == "source")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p.write_bytes(b"nothing"), "not a video that can be read"),
        (lambda p: clip(p, pixels="yuv420p", codec="ffv1", size=(32, 25)), "odd"),
        (lambda p: clip(p, pixels="yuva420p", codec="ffv1", options={}), "transparency"),
        (lambda p: clip(p, pixels="yuv420p16le", codec="ffv1", options={}), "16 bits a channel"),
    ],
    ids=["text", "odd", "alpha", "16-bit"],
)
def test_videos_that_would_lose_something_are_refused(tmp_path, make, message):
    make(tmp_path / "a.mkv")
    with pytest.raises(ValueError, match=message):
        video.upscale_video(tmp_path / "a.mkv", tmp_path / "b.mkv", Upscaler(3, Thrice()))
    assert [p.name for p in tmp_path.iterdir()] == ["a.mkv"]


class Thrice(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=3, mode="nearest")


@pytest.mark.parametrize(
    "codec, message",
    [("nonsense", "no encoder 'nonsense'"), ("libvpx-vp9", "libvpx-vp9 cannot hold yuv420p10le")],
)
def test_encoders_that_cannot_do_it_are_named(tmp_path, codec, message):
    source = clip(tmp_path / "a.mkv", pixels="yuv420p10le", sound=False)
    options = video.VideoOptions(codec)
    with pytest.raises(ValueError, match=message):
        video.upscale_video(source, tmp_path / "b.mkv", Upscaler(2, Twice()), options)


@pytest.mark.parametrize("pixels, codec", [("yuv420p", "libvpx-vp9"), ("yuv420p10le", "libsvtav1")])
def test_webm(tmp_path, pixels, codec):
    source = clip(tmp_path / "a.mkv", pixels=pixels, sound=False, size=(64, 64))
    plan = video.upscale_video(source, tmp_path / "b.webm", Upscaler(2, Twice()))
    assert plan.form.codec == codec
    times = [round(t, 3) for t, _ in frames(tmp_path / "b.webm")]
    assert times == [round(t, 3) for t, _ in frames(source)]


@pytest.mark.parametrize("name", ["A.MKV", "A.M4V", "A.Mov"])
def test_capital_letters(tmp_path, name):
    source = clip(tmp_path / name, VARIABLE[:3])
    (job,) = plan([source], None, scale=2)
    video.upscale_video(source, job.target, Upscaler(2, Twice()))
    assert job.target.name == f"A_x2{source.suffix}"
    assert len(frames(job.target)) == 3 and packets(job.target, "audio")


def test_ffv1_is_lossless(tmp_path):
    options = video.VideoOptions("ffv1")
    source = clip(tmp_path / "c.mkv", sound=False)
    video.upscale_video(source, tmp_path / "d.mkv", Upscaler(2, Twice()), options)
    for (_, old), (_, new) in zip(frames(source), frames(tmp_path / "d.mkv"), strict=True):
        assert max(abs(a - b) for a, b in zip(middle(old), middle(new), strict=True)) <= 1


def test_damaged_packets_are_left_out_with_a_warning(tmp_path):
    source = clip(tmp_path / "a.mkv", [1000 * i for i in range(20)], sound=False)
    data = bytearray(source.read_bytes())
    spots = [data.find(p) for _, p in packets(source, "video")]
    for spot in spots[5:8]:
        data[spot : spot + 12] = bytes(12)
    source.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged packets were left out"):
        video.upscale_video(source, tmp_path / "b.mkv", Upscaler(2, Twice()))
    assert 0 < len(frames(tmp_path / "b.mkv")) < 20


def test_the_command(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip(tmp_path / "a.mp4", VARIABLE[:3])
    words = ["upscale", "-n", str(weights), "-i", "a.mp4"]
    assert cli.main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "a.mp4 -> a_x2.mp4" in out and "3 frames, 32x24 -> 64x48" in out
    assert "copied: audio aac" in out and "BT.709 limited range, libx264 crf 16" in out
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert cli.main(words) == 0
    assert "a.mp4 -> a_x2.mp4 (64x48)" in capsys.readouterr().out
    assert len(frames("a_x2.mp4")) == 3
    assert cli.main(words) == 0
    assert "1 skipped" in capsys.readouterr().out
    assert cli.main([*words, "-o", "b.png"]) == 1
    assert "one is a video, the other an image" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=str)
def test_without_pyav_the_extra_is_named(tmp_path, weights, capsys, monkeypatch, words):
    source = clip(tmp_path / "a.mp4", VARIABLE[:3])
    monkeypatch.setitem(sys.modules, "av", None)
    other = tmp_path / "b.png"
    assert cli.main(["upscale", "-n", str(weights), str(source), str(other), *words]) == 1
    out, err = capsys.readouterr()
    assert "pip install efrdn_fast[video]" in err and "b.png" in out + err  # the others go on


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_termination_leaves_a_file_that_plays(tmp_path, weights):
    source = clip(tmp_path / "a.mp4", [1000 * i for i in range(900)], size=(16, 16))
    command = [sys.executable, "-m", "efrdn_fast", "upscale", "-n", str(weights), str(source)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A job in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    parts = tmp_path / ".a_x2.mp4.parts"
    start = time.monotonic()
    while not list(parts.glob("*.bin")) and time.monotonic() - start < 90:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "the same command goes on" in errors
    assert 48 <= len(frames(tmp_path / "a_x2.partial.mp4")) < 900
