"""Encoded frames on the disk until a video is whole: parts that a later run goes on from."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from .checkpoint import atomic_write
from .video_format import Form, av_module, encoder

__all__ = ["PART_FRAMES", "Parts"]

PART_FRAMES = 48
"""Frames of a part: what a killed run loses at most. Each begins with a key frame."""
HEAD = struct.Struct("<qqBI")  # time stamp, duration, key frame, bytes


class Parts:
    """Parts of the video `target`, in a hidden folder beside it.

    Args:
        target: Path of the video that is being made.
        form: How its frames are encoded.
        fingerprint: What else the parts depend on; those of another one are not taken up.
    """

    def __init__(self, target: Path, form: Form, fingerprint: dict):
        self.target, self.form = target, form
        self.folder = target.with_name(f".{target.name}.parts")
        self.fingerprint = {**fingerprint, "form": repr(form)}
        self._context = None
        self._packets: list = []
        self._lengths: dict[int, int] = {}
        self.frames = 0
        """Frames in whole parts."""
        self.end = 0.0
        """Seconds at which the last of them ends."""
        if self._about().get("fingerprint") == self.fingerprint:
            for packet in self.packets():
                self._count(packet)

    def begin(self) -> None:
        """Make the folder; parts that do not fit what is encoded now are thrown away."""
        extradata = (encoder(self.form, self.target).extradata or b"").hex()
        about = {"fingerprint": self.fingerprint, "extradata": extradata}
        if self._about() != about:
            self.remove()
            self.frames, self.end = 0, 0.0
            atomic_write(self.folder / "about.json", json.dumps(about).encode())

    def add(self, frame, length: int) -> None:
        """Encode a frame that is shown for `length` ticks."""
        if self._context is None:
            self._context = encoder(self.form, self.target)
        self._lengths[frame.pts] = length
        self._packets += self._context.encode(frame)
        if len(self._lengths) >= PART_FRAMES:
            self.close()

    def close(self) -> None:
        """Finish the part at hand and store it."""
        if self._context is None:
            return
        packets = self._packets + self._context.encode(None)
        lengths, self._lengths, self._packets, self._context = self._lengths, {}, [], None
        data = b"".join(
            HEAD.pack(p.pts, lengths[p.pts], p.is_keyframe, p.size) + bytes(p) for p in packets
        )
        atomic_write(self.folder / f"{self.frames:09d}.bin", data)
        for packet in self._of(data):
            self._count(packet)

    def packets(self) -> Iterator:
        """Packets of all whole parts, in order."""
        for path in sorted(self.folder.glob("*.bin")):
            yield from self._of(path.read_bytes())

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _of(self, data: bytes) -> Iterator:
        av, position = av_module(), 0
        while position < len(data):
            stamp, length, key, size = HEAD.unpack_from(data, position)
            position += HEAD.size
            packet = av.Packet(data[position : position + size])
            packet.pts = packet.dts = stamp  # no frame is coded out of order
            packet.duration, packet.time_base = length, self.form.time_base
            packet.is_keyframe = bool(key)
            position += size
            yield packet

    def _count(self, packet) -> None:
        self.frames += 1
        self.end = float((packet.pts + packet.duration) * packet.time_base)

    def _about(self) -> dict:
        try:
            about = json.loads((self.folder / "about.json").read_text())
        except (OSError, ValueError):
            return {}
        return about if isinstance(about, dict) else {}
