"""`efrdn upscale`: image files, folders and videos, 2, 3 or 4 times as large."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

from ..errors import UsageError
from . import _options

HELP = "upscale image files, folders and videos"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="*", type=Path, metavar="INPUT", help="image, folder or video"
    )
    parser.add_argument(
        "-i", "--input", action="append", default=[], type=Path, metavar="INPUT", help="the same"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="folder for the results, or a file name for one image; -: standard output, as with "
        "-i - for standard input (default: beside an image; FOLDER_x4 for a folder)",
    )
    parser.add_argument(
        "-s",
        "--scale",
        "--outscale",
        type=int,
        choices=(2, 3, 4),
        help="factor (default: that of the model, else 4)",
    )
    parser.add_argument(
        "-n", "--model", "--model-name", help="x2, x3, x4 or a checkpoint (default: x<scale>)"
    )
    parser.add_argument(
        "--suffix",
        help="put behind the names of results (default: _x4 beside the input, else none)",
    )
    parser.add_argument(
        "--ext",
        choices=("auto", "png", "jpg", "webp", "tiff", "bmp"),
        default="auto",
        help="format of the results; auto keeps that of the input (default: auto)",
    )
    parser.add_argument(
        "--recursive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="folders with their sub-folders (default: yes)",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--skip-existing",
        dest="overwrite",
        action="store_false",
        default=False,
        help="leave out what has a result already (default)",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument(
        "--strip-metadata",
        action="store_true",
        help="leave out EXIF, XMP, IPTC and resolution; the colour profile stays",
    )
    parser.add_argument(
        "--dpi",
        choices=("keep", "scale"),
        default="keep",
        help="resolution of a print: keep the number, so that it grows, or scale it with the "
        "image, so that it keeps its size (default: keep)",
    )
    parser.add_argument(
        "--max-pixels",
        type=_options.positive,
        metavar="N",
        help="refuse larger images as decompression bombs (default: 178956970)",
    )
    parser.add_argument(
        "--json-summary", type=Path, metavar="FILE", help="write what became of every image"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and do nothing"
    )
    videos = parser.add_argument_group("videos (pip install efrdn_fast[video])")
    videos.add_argument(
        "--video-codec",
        metavar="NAME",
        help="encoder of FFmpeg, such as libx265 or ffv1 (default: libx264; in WebM libvpx-vp9)",
    )
    videos.add_argument(
        "--crf",
        type=_options.natural,
        default=16,
        metavar="N",
        help="quality of the encoder, less is better (default: 16)",
    )
    tiles = parser.add_argument_group("tiles, for images that do not fit in memory")
    tiles.add_argument(
        "-t",
        "--tile",
        type=_options.tile,
        metavar="N",
        help="edge in pixels; 0: never; auto: only when memory runs out (default: auto)",
    )
    tiles.add_argument(
        "--tile-pad",
        "--tile_pad",
        type=_options.natural,
        metavar="N",
        help="pixels that neighbouring tiles share (default: 16)",
    )
    tiles.add_argument(
        "--exact",
        action="store_true",
        help="bands of --tile rows with the very numbers of the whole image: slower, features lie "
        "in temporary files (TMPDIR)",
    )
    tiles.add_argument(
        "--segment-tokens",
        type=_options.positive,
        metavar="N",
        help="attention in segments of N pixels, so that time and memory grow with the area only; "
        "changes the picture a little (default: four segments)",
    )
    _options.add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    inputs = args.inputs + args.input
    if not inputs:
        raise UsageError("no input: name an image or a folder")
    from tqdm import tqdm

    from ..batch import plan, process
    from ..distributed import world
    from ..images import MAX_PIXELS, STREAM
    from ..upscaler import Upscaler
    from ..video import VideoOptions

    # What Pillow logs of a damaged file is said once, by the error.
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    start, here = time.perf_counter(), world()
    piped = args.output == STREAM
    if piped and sys.stdout.isatty():
        raise UsageError("standard output is a terminal: redirect it to a file or a program")
    notes = sys.stderr if piped else sys.stdout
    upscaler = Upscaler(
        args.scale,
        args.model,
        tile=args.tile,
        overlap=args.tile_pad,
        exact=args.exact,
        segment_tokens=args.segment_tokens,
        device=here.device(args.device),
        dtype=args.dtype,
        backend=args.backend,
    )
    jobs = plan(
        inputs,
        args.output,
        scale=upscaler.scale,
        suffix=args.suffix,
        ext=args.ext,
        recursive=args.recursive,
    )
    # Under torchrun every process upscales its share of the images.
    jobs = [job for job in jobs if here.owns(str(job.source))]
    video_options = VideoOptions(args.video_codec, args.crf)
    if args.dry_run:
        return _dry_run(jobs, upscaler, video_options, args.overwrite)
    results = []
    # Off when stderr is no terminal. Counts parts of images too.
    style = "{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=len(jobs), disable=None, file=sys.stderr, bar_format=style) as bar:

        def show(done: int, count: int) -> None:
            bar.n = len(results) + done / count
            bar.set_postfix_str(f"tile {done}/{count}" if count > 1 else "")

        def show_frames(done: int, count: int, rate: float) -> None:
            bar.n = len(results) + done / max(count, 1)
            bar.set_postfix_str(f"frame {done}/{count or '?'}, {rate:.2f} frames/s")

        try:
            for result in process(
                jobs,
                upscaler,
                overwrite=args.overwrite,
                strip_metadata=args.strip_metadata,
                scale_dpi=args.dpi == "scale",
                max_pixels=args.max_pixels or MAX_PIXELS,
                video_options=video_options,
                progress=show,
                frame_progress=show_frames,
            ):
                results.append(result)
                bar.n = len(results)
                bar.refresh()
                if result.status == "failed":
                    tqdm.write(f"efrdn upscale: error: {result.message}", file=sys.stderr)
                elif result.status == "done":
                    size = "x".join(map(str, result.size))
                    tqdm.write(f"{result.input} -> {result.output} ({size})", file=notes)
        finally:
            counts = {
                status: sum(result.status == status for result in results)
                for status in ("done", "skipped", "failed")
            }
            seconds = round(time.perf_counter() - start, 1)
            if args.json_summary:
                path = Path(args.json_summary)
                if here.rank:
                    path = path.with_suffix(f".{here.rank}{path.suffix}")
                _write_summary(path, counts, seconds, upscaler, results)
    skipped = f"{counts['skipped']} skipped"
    if counts["skipped"] and not args.overwrite:
        skipped += " (results exist; --overwrite replaces them)"
    print(
        f"{counts['done']} upscaled, {skipped}, {counts['failed']} failed, {seconds} s", file=notes
    )
    return 1 if counts["failed"] else 0


def _dry_run(jobs: list, upscaler, video_options, overwrite: bool) -> int:
    """Print what would become of every job; 1 if some could not be done."""
    from ..batch import is_video
    from ..images import STREAM
    from ..video import plan_video

    failed = 0
    for job in jobs:
        try:
            if job.error:
                raise ValueError(job.error)
            if job.source != STREAM and not job.source.exists():
                raise FileNotFoundError(f"{job.source}: no such file")
            if job.skip or (job.target.exists() and not overwrite):
                print(f"{job.source}: skipped, {job.skip or f'{job.target} exists already'}")
            elif is_video(job.source):
                print(
                    *plan_video(job.source, job.target, upscaler, video_options).lines(), sep="\n"
                )
            else:
                print(f"{job.source} -> {job.target}")
        except (ValueError, OSError, ImportError) as error:
            failed += 1
            print(f"efrdn upscale: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1 if failed else 0


def _write_summary(path: Path, counts: dict, seconds: float, upscaler, results: list) -> None:
    import dataclasses

    import torch

    from .. import __version__
    from ..checkpoint import atomic_write

    summary = {
        **counts,
        "seconds": seconds,
        "scale": upscaler.scale,
        "device": str(upscaler.device),
        "efrdn_fast": __version__,
        "torch": torch.__version__,
        "images": [dataclasses.asdict(result) for result in results],
    }
    atomic_write(path, (json.dumps(summary, indent=2) + "\n").encode())
