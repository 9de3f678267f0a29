"""Results of `efrdn eval` as a table beside the paper's rows; as JSON, those of `verify` too."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import nn

from . import __version__
from .config import EFRDNConfig
from .counts import count
from .evaluate import Network, Score, SelfEnsemble, SetResult
from .fast import EFRDNFast
from .tables import paper_tables, render
from .verify import Row

__all__ = ["as_json", "results_table", "verify_json"]

PROTOCOL = (
    "uint8 RGB LR in, uint8 RGB SR out; Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, "
    "unrounded; border of <scale> pixels cut; PSNR peak 255; "
    "SSIM Gaussian 11x11, sigma 1.5, valid area"
)


def results_table(results: Sequence[SetResult], network: Network | None) -> str:
    """PSNR / SSIM of bicubic, the paper's rows and the network, all sets of one scale."""
    scale = results[0].scale
    published = paper_tables()["bicubic_published"]
    rows = [
        ("bicubic, measured here", "", "", *(str(result.bicubic) for result in results)),
        (
            "bicubic, published",
            "",
            "",
            *(_printed(published.get(result.name, {}).get(f"x{scale}")) for result in results),
        ),
    ]
    methods = dict(paper_tables()["table1"][f"x{scale}"])
    own = methods.pop("EFRDN")
    if scale == 4:
        methods |= paper_tables()["table6_x4"]
    methods["EFRDN"] = own  # last, next to the network's row
    for method, row in methods.items():
        title = "EFRDN, published" if method == "EFRDN" else method
        cost = [
            "" if row[key] is None else f"{row[key].normalize():f}{unit}"
            for key, unit in (("params_k", "K"), ("multi_adds_g", "G"))
        ]
        rows.append((title, *cost, *(_printed(row.get(result.name)) for result in results)))
    if network is not None:
        cost = count(EFRDNConfig(**network.config))
        size = (f"{cost.parameters / 1e3:.0f}K", f"{cost.conv / 1e9:.1f}G")
        rows.append((f"this network: {network.source}", *size, *(str(r.model) for r in results)))
    header = (f"x{scale}", "params", "M-Adds", *(_title(result) for result in results))
    lines = [render(header, rows), ""]
    lines += [_about(result) for result in results]
    return "\n".join(lines)


def _title(result: SetResult) -> str:
    return f"{result.name} ({len(result.images)})"


def _printed(figures: Sequence | None) -> str:
    return "" if figures is None else f"{figures[0]:.2f} / {figures[1]:.4f}"


def _about(result: SetResult) -> str:
    """Where the LR images are from and what the bicubic row was compared with."""
    images = result.images
    computed = sum(image.lr_source == "computed" for image in images)
    exact = sum(image.lr_is_matlab_bicubic for image in images)
    if computed:
        origin = "LR computed (MATLAB bicubic)"
    elif exact == len(images):
        origin = "LR files are MATLAB bicubic of HR, bit for bit"
    else:
        origin = f"only {exact} of {len(images)} LR files are MATLAB bicubic of HR"
    check = result.check
    if check.expected is None:
        state = f"bicubic row not checked ({check.note})"
    else:
        note = f", {check.note}" if check.note else ""
        state = f"bicubic row agrees with the {check.against} {check.expected}{note}"
    part = "" if result.whole else " Published rows are of the whole set."
    return f"{result.name} x{result.scale}: {origin}; {state}.{part}"


def as_json(
    asked: Mapping[str, object],
    results: Mapping[int, Sequence[SetResult]],
    networks: Mapping[int, Network | None],
) -> str:
    """All figures, per image, with the hashes, versions and settings they depend on.

    Args:
        asked: The command's arguments.
        results: Scale -> results of its sets.
        networks: Scale -> network, or None for bicubic only.
    """
    record = {
        **_origin(asked),
        "protocol": PROTOCOL,
        "scales": {
            f"x{scale}": {
                "network": _network(networks[scale]),
                "sets": {result.name: _set(result) for result in of_scale},
            }
            for scale, of_scale in results.items()
        },
    }
    return json.dumps(record, indent=1, default=str) + "\n"


def verify_json(
    asked: Mapping[str, object],
    rows: Sequence[Row],
    device: torch.device,
    checkpoint: Path | None,
    psnr_not_measured: str,
) -> str:
    """Every comparison of `efrdn verify`, with what it depends on.

    Args:
        asked: The command's arguments.
        checkpoint: File of the weights; None: random ones.
        psnr_not_measured: Why, or "".
    """
    record = {
        **_origin(asked),
        **_device(device),
        "sha256": checkpoint and hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "psnr_not_measured": psnr_not_measured or None,
        "failed": sum(not row.passed for row in rows),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    return json.dumps(record, indent=1, default=str) + "\n"


def _origin(asked: Mapping[str, object]) -> dict:
    """Command, versions and machine."""
    return {
        "efrdn_fast": __version__,
        "command": "efrdn " + " ".join(sys.argv[1:]),
        "arguments": {name: value for name, value in asked.items() if not callable(value)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def _device(device: torch.device) -> dict:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    return {"device": str(device), "device_name": name}


def _network(network: Network | None) -> dict | None:
    if network is None:
        return None
    upscaler = network.upscaler
    return {
        "model": network.source,
        "sha256": network.sha256,
        "config": network.config,
        "training": network.training,
        **_device(upscaler.device),
        "dtype": upscaler.dtype,
        **_served(upscaler.net),
    }


def _served(net: nn.Module) -> dict:
    """The backend that was asked for and, op by op, the one that served; None: the plain EFRDN."""
    net = net.net if isinstance(net, SelfEnsemble) else net
    if not isinstance(net, EFRDNFast):
        return {"backend": "reference", "plan": None}
    return {"backend": net.backend, "plan": net.plan}


def _set(result: SetResult) -> dict:
    return {
        "whole": result.whole,
        "bicubic": _score(result.bicubic),
        "model": _score(result.model),
        "check": {
            "against": result.check.against,
            "expected": _score(result.check.expected),
            "obtained": _score(result.check.obtained),
            "note": result.check.note,
        },
        "images": [dataclasses.asdict(image) for image in result.images],
    }


def _score(score: Score | None) -> dict | None:
    return None if score is None else dataclasses.asdict(score)
