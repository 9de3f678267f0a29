"""Start of a run from the weights of another scale: resampled tails, or fitted ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checkpoint
from .model import EFRDN

__all__ = ["fit_tails", "warm_start"]

RIDGE = 1e-6  # weight of the squared norm of the change, per equation


def warm_start(net: EFRDN, source: str) -> dict:
    """Load the weights of `source` and return its training record.

    The upsampling tails of another scale are resampled: the filters of an s x s block of pixels
    become those of another grid on the same block by averaging, so that the start is the other
    network's result, enlarged or reduced.
    """
    stored = checkpoint.load(source)
    state, own, then = stored.state_dict, net.state_dict(), stored.config["scale"]
    for key in ("reconstruct_deep.conv2", "reconstruct_shallow.conv"):
        for name in (f"{key}.weight", f"{key}.bias"):
            if then != net.scale and name in state:
                blocks = state[name].view(3, then, then, -1).permute(0, 3, 1, 2)
                blocks = F.adaptive_avg_pool2d(blocks, net.scale)  # [3, taps, s, s]
                state[name] = blocks.permute(0, 2, 3, 1).reshape(own[name].shape)
    checkpoint.load_into(net, state, source)
    return stored.training


@torch.no_grad()
def fit_tails(net: EFRDN, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit the last convolutions of both tails to `batches` by least squares.

    The result is linear in them, so the least mean squared error for the present features is the
    solution of one linear system; it is solved for the change of the weights, in float64.

    Args:
        net: Network; its last convolutions are changed in place.
        batches: uint8 `[N, 3, h, w]` and `[N, 3, scale h, scale w]`.
    """
    tails = (net.reconstruct_deep.conv2, net.reconstruct_shallow.conv)
    inputs: dict[torch.nn.Module, Tensor] = {}
    hooks = [
        tail.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
        for tail in tails
    ]
    was_training, device = net.training, next(net.parameters()).device
    gram = moment = 0.0
    try:
        net.eval()
        for lr, hr in batches:
            missing = hr.to(device).float() / 255 - net(lr.to(device).float() / 255)
            target = F.pixel_unshuffle(missing, net.scale).movedim(1, -1).flatten(0, 2).double()
            # [pixels, 2 * 9 C]: what both convolutions see around every pixel; then one for bias.
            seen = torch.cat([F.unfold(inputs[tail], 3, padding=1) for tail in tails], dim=1)
            seen = F.pad(seen, (0, 0, 0, 1), value=1.0).movedim(1, -1).flatten(0, 1).double()
            gram = gram + seen.T @ seen / len(seen)
            moment = moment + seen.T @ target / len(seen)
    finally:
        for hook in hooks:
            hook.remove()
        net.train(was_training)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=device)
    change = torch.linalg.solve(gram + ridge, moment).T.to(torch.float32)  # [3 s^2, 2 * 9 C + 1]
    for tail, part in zip(tails, change[:, :-1].chunk(2, dim=1), strict=True):
        tail.weight += part.reshape(tail.weight.shape)
    tails[0].bias += change[:, -1]
