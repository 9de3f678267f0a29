"""Peak memory of `efrdn upscale --exact` on an image that fits in no memory as a whole.

    python bench/large_image.py --edge 2500 --json large.json

A picture of smooth colours and noise is made, upscaled by a process of its own, and that process's
peak resident memory is what counts; the features between passes lie in TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from efrdn_fast import EFRDN, checkpoint, images
from efrdn_fast.commands._options import positive

__all__ = ["main"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edge", type=positive, default=2500, help="LR pixels (default: 2500)")
    parser.add_argument("--segment-tokens", type=positive, default=1024)
    parser.add_argument(
        "--channels", type=positive, help="an untrained x4 network of so many channels"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.png", Path(folder) / "out.png"
        images.write(source, images.Picture(_picture(args.edge)))
        words = [
            "--exact",
            "--segment-tokens",
            str(args.segment_tokens),
            "--max-pixels",
            "1000000000",
        ]
        if args.channels:
            torch.manual_seed(0)
            net = EFRDN(4, channels=args.channels, distilled=args.channels // 3)
            words += ["-n", str(checkpoint.save(net, Path(folder) / "net.safetensors"))]
        start = time.perf_counter()
        command = [sys.executable, "-m", "efrdn_fast", "upscale", str(source), "-o", str(target)]
        subprocess.run([*command, *words], check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        Image.MAX_IMAGE_PIXELS = None  # the result is ours
        with Image.open(target) as result:
            width, height = result.size
    summary = {
        "input": [args.edge, args.edge],
        "output": [width, height],
        "output_megapixels": round(width * height / 1e6, 1),
        "channels": args.channels or 32,
        "segment_tokens": args.segment_tokens,
        "peak_rss_mib": peak // 1024,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    text = json.dumps(summary, indent=2) + "\n"
    if args.json:
        args.json.write_text(text)
    print(text, end="")
    return 0


def _picture(edge: int) -> np.ndarray:
    y, x = np.mgrid[:edge, :edge].astype(np.float32)
    planes = [128 + 60 * np.sin(x / 37 + c) + 40 * np.cos(y / 23 - c) for c in range(3)]
    noise = np.random.default_rng(0).integers(-20, 21, (edge, edge, 3))
    return (np.stack(planes, axis=2) + noise).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
