"""Arguments that each public op takes: small, in float32, on the CPU."""

from __future__ import annotations

import torch

from efrdn_fast.testing import make_input


def gcrb_arguments(**changes):
    x = make_input((2, 8, 5, 6))
    arguments = {
        "x": x,
        "w1": torch.randn(4, 4, 1, 1),
        "b1": torch.randn(4),
        "w2": torch.randn(4, 1, 3, 3),
        "b2": torch.randn(4),
        "w3": torch.randn(8, 2, 1, 1),
        "b3": torch.randn(8),
    }
    return {**arguments, **changes}


def chain_arguments(**changes):
    given = [value for _ in range(3) for value in list(gcrb_arguments().values())[1:]]
    return {"x": make_input((2, 8, 5, 6)), "params": given, **changes}


def train_arguments(**changes):
    given = gcrb_arguments()
    arguments = {"x": given["x"]}
    for i, width in ((1, 4), (2, 4), (3, 8)):
        arguments[f"w{i}"] = given[f"w{i}"]
        arguments[f"gamma{i}"] = torch.ones(width)
        arguments[f"beta{i}"] = torch.zeros(width)
    running = {
        "running_mean": [torch.zeros(4), torch.zeros(4), torch.zeros(8)],
        "running_var": [torch.ones(4), torch.ones(4), torch.ones(8)],
    }
    return {**arguments, **running, **changes}


def acrb_arguments(**changes):
    arguments = {
        "x": make_input((2, 8, 5, 6)),
        "weight": torch.randn(3, 3, 3, 3),
        "bias": torch.randn(3),
        "start": 5,
    }
    return {**arguments, **changes}


def out_arguments(**changes):
    return acrb_arguments(**{"out": torch.zeros(2, 7, 5, 6), "out_start": 4, **changes})


def branch_arguments(**changes):
    arguments = {
        "x": make_input((2, 8, 5, 6)),
        "w1x3": torch.randn(2, 3, 1, 3),
        "w3x3": torch.randn(2, 3, 3, 3),
        "w3x1": torch.randn(2, 3, 3, 1),
        "bias": torch.randn(2),
        "start": 5,
    }
    return {**arguments, **changes}


def acrb_train_arguments(**changes):
    arguments = {
        "x": make_input((2, 8, 5, 6)),
        "w1x3": torch.randn(3, 3, 1, 3),
        "w3x3": torch.randn(3, 3, 3, 3),
        "w3x1": torch.randn(3, 3, 3, 1),
        "gamma": torch.ones(3),
        "beta": torch.zeros(3),
        "start": 5,
    }
    return {**arguments, **changes}


def conv_arguments(**changes):
    arguments = {
        "xs": [make_input((2, 4, 5, 6)), make_input((2, 4, 5, 6))],
        "weight": torch.randn(6, 4, 3, 3),
        "bias": torch.randn(6),
        "residual": make_input((2, 6, 5, 6)),
        "groups": 2,
    }
    return {**arguments, **changes}


OPS = {
    "gcrb": gcrb_arguments,
    "gcrb_chain": chain_arguments,
    "gcrb_train": train_arguments,
    "acrb": acrb_arguments,
    "acrb_out": out_arguments,
    "acrb_train": acrb_train_arguments,
    "asymmetric_conv": branch_arguments,
    "conv3x3": conv_arguments,
}
