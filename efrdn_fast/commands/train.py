"""`efrdn train`: the paper's recipe by default, every option of `TrainOptions` as a flag."""

from __future__ import annotations

import argparse

from ._options import options_only

HELP = "train EFRDN on a folder of images"


def add_fields(
    parser: argparse.ArgumentParser, record: type, title: str, leave_out: tuple[str, ...] = ()
) -> None:
    """Flags for the fields of a dataclass of options; absent from the result when not given."""
    import ast
    import dataclasses
    import inspect
    import itertools
    import textwrap

    # The text under a field of the dataclass is its help.
    body = ast.parse(textwrap.dedent(inspect.getsource(record))).body[0].body
    docs = {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(record):
        if field.name in leave_out:
            continue
        flag = "--" + field.name.replace("_", "-")
        text = docs[field.name]
        if "Default:" not in text:
            text += f" Default: {'none' if field.default in ('', None) else field.default}."
        text = text.replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            kind = {"minutes": float, "cache_dir": str}.get(field.name) or type(field.default)
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text)


def _check_images(data: list[str], benchmark: str, strict: bool) -> int:
    from tqdm import tqdm

    from ..contamination import check_images

    def bar(items):
        return tqdm(items, unit="image", disable=None)

    matches, trained, tested = check_images(data, benchmark, strict=strict, progress=bar)
    for match in matches:
        print(
            f"{match.train} shows {match.test} "
            f"(correlation {match.correlation:.3f}, {match.scale:.2f} times its size)"
        )
    print(f"{len(matches)} copies of {tested} test images among {trained} training images")
    return 1 if matches else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..options import PRESETS, RunOptions, TrainOptions

    parser.add_argument("data", nargs="+", help="folders of HR images (DIV2K layout or any)")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="paper", help="recipe to start from"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        help='"auto" (continue <out>/state.pt if it is there), "never", or a state.pt',
    )
    parser.add_argument(
        "--check-images",
        metavar="DIR",
        help="only look, by content, for images of the benchmark sets in DIR among the training "
        "images: cropped, resized, recompressed or turned ones too. Exit status 1 if there are any",
    )
    add_fields(parser, TrainOptions, "recipe (decides the weights)")
    add_fields(parser, RunOptions, "run")


def chosen_options(args: argparse.Namespace):
    """`TrainOptions` and `RunOptions` of the preset and the flags.

    Raises:
        UsageError: One that is wrong.
    """
    import dataclasses

    from ..options import PRESETS, RunOptions, TrainOptions

    def given(record: type) -> dict:
        return {f.name: vars(args)[f.name] for f in dataclasses.fields(record) if f.name in args}

    with options_only():
        run_options = RunOptions(**given(RunOptions))
        options = TrainOptions(**{**PRESETS[args.preset], **given(TrainOptions)})
    return options, run_options


def run(args: argparse.Namespace) -> int:
    from ..distributed import world
    from ..train import train

    if args.check_images is not None:
        return _check_images(args.data, args.check_images, strict=getattr(args, "strict", False))
    options, run_options = chosen_options(args)
    resume = None if args.resume == "never" else args.resume
    path = train(args.data, options, run_options, resume=resume)
    if world().is_first:
        print(path)
    return 0
