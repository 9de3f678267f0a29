"""Many image files: which file becomes which, and upscaling them one after the other."""

from __future__ import annotations

import dataclasses
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import images, video
from .encode import FORMATS, check_output
from .errors import UsageError
from .images import STREAM, Picture
from .inference import Progress
from .metadata import Metadata
from .upscaler import Upscaler

__all__ = ["Job", "Result", "is_video", "plan", "process"]

NAMED_FORMAT = re.compile(r"\.[a-z][a-z0-9]{1,4}", re.IGNORECASE)
READ_EXTENSIONS = (*FORMATS, ".gif", ".jfif")
# What one bad file may raise; anything else is a bug and stops the run.
FILE_ERRORS = (ValueError, TypeError, OSError, MemoryError, RuntimeError, ImportError)


@dataclass(frozen=True)
class Job:
    """One input and where its result goes."""

    source: Path
    target: Path | None = None
    error: str = ""
    """Why it cannot be done, known before it begins."""
    skip: str = ""
    """Why there is nothing to do."""
    extension: str = ""
    """Format of a result on standard output; empty for that of the input."""


@dataclass(frozen=True)
class Result:
    """What became of a job; JSON-ready."""

    input: str
    output: str | None
    status: str
    """"done", "skipped" or "failed"."""
    message: str = ""
    """Why it was skipped or failed."""
    seconds: float = 0.0
    size: tuple[int, int] | None = None
    """Width and height of the result."""
    tile: int | None = None
    """Edge of the tiles it was computed in, 0 for none."""
    dtype: str | None = None
    """Precision it was computed in."""
    exact: bool | None = None
    """Whether its parts agree with the whole image."""


def plan(
    inputs: Sequence[Path],
    output: Path | None,
    *,
    scale: int,
    suffix: str | None = None,
    ext: str = "auto",
    recursive: bool = True,
) -> list[Job]:
    """Jobs for files and folders, in order.

    A folder's images keep their sub-folders below `output` (default: a folder beside it, named
    `<folder>_x<scale>`); a file's result goes into `output`, or is `output` where that has an image
    extension (default: beside the file). The suffix is by default `_x<scale>` for results beside
    their source and empty elsewhere; `ext` "auto" keeps the extension where it can be written and
    is .png otherwise. Results of an earlier run that lie among the inputs are not upscaled again.
    Videos are taken one by one, not from folders, and keep their extension where it is in
    `video.WRITABLE`, else become .mkv. `-` is standard input or output, for one image.

    Raises:
        ValueError: `output` names one file for several inputs, or a format that cannot be written,
            or `-` stands where it cannot.
    """
    if STREAM in (output, *inputs):
        return [_stream(inputs, output, ext)]
    fresh = output is not None and not output.is_dir()
    exact = fresh and output.suffix.lower() in (*FORMATS, *video.WRITABLE)
    if exact and (len(inputs) > 1 or inputs[0].is_dir()):
        raise UsageError(f"output {str(output)!r} is one file, but there may be several results")
    if exact:
        error = f"{output} is the input itself" if _key(output) == _key(inputs[0]) else ""
        if is_video(inputs[0]) != is_video(output):
            error = f"{inputs[0]} cannot become {output}: one is a video, the other an image"
        return [Job(inputs[0], output, error=error)]
    single = len(inputs) == 1 and not inputs[0].is_dir()
    if fresh and single and NAMED_FORMAT.fullmatch(output.suffix):
        can = video.WRITABLE if is_video(inputs[0]) else FORMATS
        raise UsageError(
            f"output {str(output)!r}: cannot write {output.suffix}; use one of {', '.join(can)} "
            "(if a folder is meant, make it first)"
        )
    jobs = []
    for path in inputs:
        if not path.is_dir():
            jobs.append(_job(path, output or path.parent, scale, suffix, ext))
            continue
        named = path if path.name not in ("", "..") else path.resolve()
        folder = output or named.with_name(f"{named.name}_x{scale}")
        found, troubles = _scan(path, recursive, None if _key(folder) == _key(path) else folder)
        jobs += [Job(path, error=trouble) for trouble in troubles]
        if not found and not troubles:
            kinds = " ".join(READ_EXTENSIONS)
            text = f"no images in this folder ({kinds}); videos are named one by one"
            jobs.append(Job(path, error=text))
        jobs += [
            _job(file, folder / file.parent.relative_to(path), scale, suffix, ext) for file in found
        ]
    return _without_clashes(jobs)


def process(
    jobs: Iterable[Job],
    upscaler: Upscaler,
    *,
    overwrite: bool = False,
    strip_metadata: bool = False,
    scale_dpi: bool = False,
    max_pixels: int = images.MAX_PIXELS,
    video_options: video.VideoOptions = video.DEFAULTS,
    progress: Progress | None = None,
    frame_progress: video.FrameProgress | None = None,
) -> Iterator[Result]:
    """Do the jobs in order; one that fails is a result like any other.

    `strip_metadata` leaves out EXIF, XMP, IPTC and resolution; the colour profile stays, or the
    colours would change. `scale_dpi` multiplies the resolution too, so that a print keeps its
    size; else the number stays and the print grows. `progress` gets (tiles done, tiles in all) of
    the present image, `frame_progress` that of a video.
    """
    for job in jobs:
        start = time.perf_counter()
        names = str(job.source), str(job.target) if job.target else None
        skip = job.skip
        kept = job.target and not (job.error or overwrite or job.target == STREAM)
        if kept and job.target.exists():
            skip = "exists already"
        if skip:
            yield Result(*names, "skipped", skip)
            continue
        try:
            if job.error:
                raise ValueError(job.error)
            with _naming(names[0]):
                if is_video(job.source):
                    made = video.upscale_video(
                        job.source, job.target, upscaler, video_options, frame_progress
                    )
                    size = made.form.out_width, made.form.out_height
                else:
                    picture = images.read(job.source, max_pixels)
                    picture = _upscale(picture, job, upscaler, progress)
                    metadata = picture.metadata
                    if strip_metadata:
                        metadata = Metadata(icc=metadata.icc)
                    elif scale_dpi:
                        metadata = metadata.denser(upscaler.scale)
                    images.write(job.target, dataclasses.replace(picture, metadata=metadata))
                    size = picture.pixels.shape[1], picture.pixels.shape[0]
        except FILE_ERRORS as error:
            text = " ".join(str(error).split()) or type(error).__name__
            text = text if text.startswith(names[0]) else f"{names[0]}: {text}"
            yield Result(*names, "failed", text, seconds=_since(start))
            continue
        yield Result(*names, "done", seconds=_since(start), size=size, **_how(upscaler))


def is_video(path: Path) -> bool:
    """Whether the name is that of a video."""
    return path.suffix.lower() in video.EXTENSIONS


def _how(upscaler: Upscaler) -> dict:
    return dataclasses.asdict(upscaler.outcome) if upscaler.outcome else {}


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Warnings of the block begin with `source`, as errors do, and are those of no earlier block.

    To enter `catch_warnings` forgets what was shown: one text is told of every file it is true of.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def named(message, category, *rest, **more) -> None:
            text = str(message)
            text = text if text.startswith(source) else f"{source}: {text}"
            show(category(text), category, *rest, **more)

        warnings.showwarning = named
        yield


def _upscale(picture: Picture, job: Job, upscaler: Upscaler, progress: Progress | None) -> Picture:
    """The network's work, begun only when the result can be stored."""
    pixels, target = picture.pixels, job.target
    extension = target.suffix.lower()
    if target == STREAM:
        extension = job.extension or picture.extension
    bits = 8 * pixels.itemsize
    most = 1 if pixels.dtype == np.float32 else np.iinfo(pixels.dtype).max
    opaque = pixels.shape[2] in (2, 4) and pixels[..., -1].min() == most
    if opaque and FORMATS[extension] in ("JPEG", "BMP"):
        pixels = pixels[..., :-1]  # nothing is lost
    height, width, channels = pixels.shape
    size = height * upscaler.scale, width * upscaler.scale
    check_output(target, *size, channels, bits=bits, extension=extension)
    parent = next(p for p in target.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{target}: cannot be written: no permission in {parent}")
    return Picture(upscaler.array(pixels, progress), picture.metadata, extension)


def _stream(inputs: Sequence[Path], output: Path | None, ext: str) -> Job:
    """The one job that reads standard input or writes standard output."""
    if len(inputs) > 1 or inputs[0].is_dir():
        raise UsageError("'-' is one image: name no other input and no folder")
    if output is None or (output != STREAM and output.suffix.lower() not in FORMATS):
        raise UsageError(
            f"standard input needs an output: -o - or a file name ({', '.join(FORMATS)})"
        )
    return Job(inputs[0], output, extension="" if ext == "auto" else f".{ext}")


def _job(source: Path, folder: Path, scale: int, suffix: str | None, ext: str) -> Job:
    beside = _key(folder) == _key(source.parent)
    if suffix is None:
        suffix = f"_x{scale}" if beside else ""
    if is_video(source):
        kept, ext = source.suffix if source.suffix.lower() in video.WRITABLE else ".mkv", "auto"
    else:
        kept = source.suffix if source.suffix.lower() in FORMATS else ".png"
    target = folder / f"{source.stem}{suffix}{kept if ext == 'auto' else f'.{ext}'}"
    if _key(target) == _key(source):
        return Job(source, target, error="the result would replace the input; give --suffix or -o")
    return Job(source, target)


def _without_clashes(jobs: list[Job]) -> list[Job]:
    """Mark inputs that are results of others, and results that two inputs would share."""
    sources = {_key(job.source): job.source for job in jobs}
    replacing = {
        id(job)
        for job in jobs
        if job.target and job.target.stem == job.source.stem and _key(job.target) in sources
    }
    owner: dict[str, Job] = {}
    # What keeps its format goes before what changes it.
    for job in sorted(
        jobs, key=lambda job: not job.target or job.target.suffix != job.source.suffix
    ):
        if job.target and not job.error and id(job) not in replacing:
            owner.setdefault(_key(job.target), job)
    checked = []
    for job in jobs:
        made_by = owner.get(_key(job.source))
        if made_by and made_by.source != job.source:
            checked.append(Job(job.source, skip=f"is the result of {made_by.source}"))
            continue
        if job.target and not job.error:
            key = _key(job.target)
            if id(job) in replacing:
                job = dataclasses.replace(job, error=f"the result would replace {sources[key]}")
            elif owner[key] is not job:
                taken = f"{job.target} is already the result of {owner[key].source}"
                job = dataclasses.replace(job, error=f"{taken}; use --suffix or --ext")
        checked.append(job)
    return checked


def _scan(root: Path, recursive: bool, leave_out: Path | None) -> tuple[list[Path], list[str]]:
    """Images below `root`, sorted, hidden ones not; and what could not be looked into."""
    found, troubles = [], []
    omitted = _key(leave_out) if leave_out else None

    def note(error: OSError) -> None:
        troubles.append(f"{error.filename}: {error.strerror}")

    for folder, below, files in os.walk(root, onerror=note):
        here = Path(folder)
        below[:] = sorted(
            name
            for name in below
            if recursive and not name.startswith(".") and _key(here / name) != omitted
        )
        found += [
            here / name
            for name in sorted(files)
            if not name.startswith(".") and Path(name).suffix.lower() in READ_EXTENSIONS
        ]
    return found, troubles


def _key(path: Path) -> str:
    """The same for all names of one file."""
    return os.path.normcase(os.path.realpath(path))


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 3)
