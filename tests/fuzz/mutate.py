"""Damaged images: mutant `i` of a run is a function of the seeds, the run's seed and `i`."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence

from seeds import Seed

__all__ = ["EXTENSIONS", "MUTATIONS", "mutant"]

EXTENSIONS = (".png", ".jpg", ".webp", ".tiff", ".bmp", ".gif")
SIZES = (0, 1, 2, 3, 7, 255, 256, 16_383, 65_535, 65_536, 1 << 24, (1 << 31) - 1, (1 << 32) - 1)


def mutant(corpus: Sequence[Seed], seed: int, index: int) -> tuple[str, str, bytes]:
    """(name of the mutation, extension, bytes)."""
    rng = random.Random(seed * 1_000_003 + index)
    name = list(MUTATIONS)[index % len(MUTATIONS)]
    base = rng.choice(corpus)
    data = MUTATIONS[name](base.data, rng, corpus)
    extension = rng.choice(EXTENSIONS) if rng.random() < 0.1 else base.extension
    return name, extension, data


def _truncated(data, rng, corpus):
    return data[: rng.randrange(len(data))]


def _bit_flipped(data, rng, corpus):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _header_flipped(data, rng, corpus):
    """Flips where formats keep sizes, types and offsets."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 4))):
        data[rng.randrange(min(64, len(data)))] = rng.choice(
            (0, 1, 127, 128, 255, rng.randrange(256))
        )
    return bytes(data)


def _wrong_header(data, rng, corpus):
    """The beginning of one format before the body of another."""
    cut = rng.choice((2, 4, 8, 16, 32))
    return rng.choice(corpus).data[:cut] + data[cut:]


def _spliced(data, rng, corpus):
    other = rng.choice(corpus).data
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def _inserted(data, rng, corpus):
    at, length = rng.randrange(len(data)), rng.choice((1, 4, 64, 4096))
    return data[:at] + rng.randbytes(length) + data[at:]


def _blanked(data, rng, corpus):
    at, length = rng.randrange(len(data)), rng.randrange(1, 64)
    return data[:at] + bytes((rng.choice((0, 255)),)) * length + data[at + length :]


def _resized(data, rng, corpus):
    """Width and height of the header changed, checksums mended, so that decoders go on."""
    width, height = (rng.choice((*SIZES, rng.randrange(1, 300))) for _ in range(2))
    if data[:4] == b"\x89PNG":
        header = struct.pack(">II", width, height) + data[24:29]
        return (
            data[:12]
            + b"IHDR"
            + header
            + struct.pack(">I", zlib.crc32(b"IHDR" + header))
            + data[33:]
        )
    if data[:2] == b"BM":
        return data[:18] + struct.pack("<II", width, height) + data[26:]
    if data[:4] == b"GIF8":
        return data[:6] + struct.pack("<HH", width & 65535, height & 65535) + data[10:]
    at = data.find(b"\xff\xc0")
    if data[:2] == b"\xff\xd8" and at > 0:
        return data[: at + 5] + struct.pack(">HH", height & 65535, width & 65535) + data[at + 9 :]
    if data[:4] == b"II*\0":
        for tag, value in ((256, width), (257, height)):
            at = data.find(struct.pack("<H", tag) + b"\x04\0\1\0\0\0")
            data = data if at < 0 else data[: at + 8] + struct.pack("<I", value) + data[at + 12 :]
    return data


def _bomb(data, rng, corpus):
    """PNGs that are small on disk and huge in memory: pixels, a text, a colour profile."""
    kind = rng.choice(("pixels", "iCCP", "zTXt"))
    side = rng.choice((5_000, 20_000, 100_000))
    zeros = zlib.compress(bytes(1 << rng.choice((20, 24, 26))))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zeros)]
    if kind != "pixels":
        text = (b"a\0\0" if kind == "zTXt" else b"profile\0\0") + zeros
        header = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (kind.encode(), text), (b"IDAT", zlib.compress(bytes(20)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (*chunks, (b"IEND", b""))
    )


def _odd_mode(data, rng, corpus):
    """Valid PNGs of any bit depth, colour type, filter and interlace, allowed or not."""
    width, height = rng.choice(((1, 1), (1, 900), (900, 1), (3, 3), (17, 5), (2, 2)))
    bits, colour = rng.choice((1, 2, 4, 8, 16, 32)), rng.choice((0, 2, 3, 4, 6, 5))
    row = -(-width * bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4, 5: 1}[colour] // 8)
    rows = b"".join(bytes((rng.randrange(6),)) + rng.randbytes(row) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, rng.choice((0, 0, 1)))
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if colour == 3 or rng.random() < 0.2:
        chunks.insert(1, (b"PLTE", rng.randbytes(3 * rng.choice((1, 4, 256)))))
    if rng.random() < 0.3:
        chunks.insert(len(chunks) - 2, (b"tRNS", rng.randbytes(rng.choice((1, 2, 6, 256)))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


MUTATIONS = {
    "truncated": _truncated,
    "bits flipped": _bit_flipped,
    "header flipped": _header_flipped,
    "wrong header": _wrong_header,
    "spliced": _spliced,
    "inserted": _inserted,
    "blanked": _blanked,
    "resized": _resized,
    "bomb": _bomb,
    "odd mode": _odd_mode,
}
