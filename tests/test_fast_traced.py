"""EFRDNFast where the call is recorded: FLOP counter, torch.compile, torch.export, AOTInductor."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from efrdn_fast import EFRDN, EFRDNFast, functional, tokens

OPS = {"gcrb", "acrb", "merge3x3", "calibrate", "sigmoid_gate", "unfold", "emha", "fold"}


def one_step(mode: str = "eval", **options) -> EFRDNFast:
    """A small network whose body is one step instead of four: every part, a quarter of the work."""
    net = EFRDNFast(**{"scale": 2, "channels": 16, "distilled": 5, **options})
    net.gconv = net.gconv[:1]
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.copy_(torch.rand_like(buffer) * 0.8 + (0.4 if "var" in name else -0.4))
    return net.train(mode == "train")


def assert_same_gradients(net: EFRDN, plain: EFRDN) -> None:
    """After a backward pass each; parts that the one step does not use have none."""
    names = [name for name, p in plain.named_parameters() if p.grad is not None]
    assert any(name.startswith("acdm.0.fflb") for name in names)
    own = dict(net.named_parameters())
    for name in names:
        expected = plain.get_parameter(name).grad
        torch.testing.assert_close(own[name].grad, expected, rtol=1e-3, atol=1e-6, msg=name)
    for (name, a), b in zip(plain.named_buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_flops_equal_those_of_the_reference(mode):
    net = EFRDNFast(2, channels=16, distilled=5).train(mode == "train")
    x, counts = torch.rand(2, 3, 6, 7), []
    for each in (copy.deepcopy(net).to_reference(), net):
        with FlopCounterMode(display=False) as forward:
            y = each(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        with torch.no_grad(), FlopCounterMode(display=False) as inference:
            each(x)
        modes = (forward, backward, inference)
        counts.append([counter.get_total_flops() for counter in modes])
    assert counts[0] == counts[1]
    assert counts[0][0] == counts[0][2] > 0


def test_compiles_in_one_graph():
    net, x = one_step(), torch.rand(1, 3, 6, 7)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
            net.head.weight.mul_(2)  # the graph has the parameters as inputs


def test_compiled_training_step():
    net, x = one_step("train"), torch.rand(2, 3, 6, 7)
    plain = copy.deepcopy(net).to_reference()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for each in (compiled, plain):
        each(x).square().mean().backward()
    assert_same_gradients(net, plain)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_exports(mode):
    """One graph of fused ops for any batch, with the parameters as inputs; gradients too."""
    net = one_step(mode)
    batch = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(net, (torch.rand(2, 3, 6, 7),), dynamic_shapes=batch)
    seen = Counter(
        str(n.target).removeprefix("efrdn_fast.").split(".")[0] for n in program.graph.nodes
    )
    training = {"gcrb": "gcrb_train", "acrb": "conv3x3"} if mode == "train" else {}
    assert {training.get(op, op) for op in OPS} <= set(seen)
    exported, plain = program.module(), copy.deepcopy(net).to_reference()
    x = torch.rand(3, 3, 6, 7)
    y, expected = exported(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for each in (y, expected):
        each.square().mean().backward()
    assert_same_gradients(exported, plain)


class Parts(nn.Module):
    """Every op of the network's walk once, on its weights as they are."""

    def __init__(self):
        super().__init__()
        shapes = {
            "gcrb": ((8, 8, 1, 1), (8,), (8, 1, 3, 3), (8,), (16, 4, 1, 1), (16,)),
            "acrb": ((5, 5, 3, 3), (5,)),
            "calibrate": ((4, 16, 1, 1), (4,), (16, 4, 1, 1), (16,)),
            "merge": ((32, 4, 3, 3),),
        }
        self.weights = nn.ParameterDict(
            {
                name: nn.ParameterList(torch.randn(s) / 4 for s in each)
                for name, each in shapes.items()
            }
        )

    def forward(self, x):
        weights = self.weights
        y = functional.calibrate(x, functional.gcrb(x, *weights["gcrb"]), *weights["calibrate"])
        y = functional.sigmoid_gate(y, x)
        y = torch.cat((y, y[:, 5:], functional.acrb(y, *weights["acrb"], start=3)), dim=1)
        y = functional.merge3x3(y, *weights["merge"], gate=y.mean(dim=(2, 3), keepdim=True))
        t = functional.emha(tokens.unfold(y)[:, :, :96], 2)
        return tokens.fold(torch.cat([t] * 9, dim=2), y.shape, True)


def test_aot_inductor(tmp_path):
    """The ops through the C++ runtime; for a whole network C++ compiles for minutes (README)."""
    module, x = Parts().eval(), torch.rand(2, 16, 6, 7)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            torch.export.export(module, (x,)),
            package_path=str(tmp_path / "parts.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
        compiled = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
