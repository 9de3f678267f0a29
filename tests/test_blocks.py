"""Every block against the committed float64 vectors: outputs, running statistics, gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from safetensors.torch import load_file

from efrdn_fast import blocks, transformer

BLOCKS = {
    "acdm": blocks.ACDM,
    "acrb": lambda: blocks.ACRB(9),
    "cc": lambda: blocks.CC(32),
    "effb": lambda: blocks.EFFB(32),
    "emha": transformer.EMHA,
    "esa": lambda: blocks.ESA(32),
    "fflb": lambda: blocks.FFLB(32),
    "gconv": lambda: blocks.GConv(32),
    "gcrb": lambda: blocks.GCRB(32),
    "mscc": lambda: blocks.MSCC(32),
    "reconstruct_deep_x3": lambda: blocks.Reconstruct(32, 3, deep=True),
    "scca": lambda: blocks.SCCA(32),
    "scsa": lambda: blocks.SCSA(32),
    "trans_segments3_sum": lambda: transformer.TransformerBlock(segments=3, fold="sum"),
    "trans_segments4_mean": transformer.TransformerBlock,
}
ATOL = 1e-10


def close(out: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(
        out, expected, rtol=0, atol=ATOL, msg=lambda message: f"{what}: {message}"
    )


class Case:
    """A block with the weights of its vectors file."""

    def __init__(self, name: str, folder):
        self.vectors = load_file(folder / f"{name}.safetensors")
        self.block = BLOCKS[name]().double()
        self.takes_use = "use" in inspect.signature(self.block.forward).parameters
        self.reload()

    def reload(self) -> None:
        prefix = "weight."
        self.block.load_state_dict(
            {k[len(prefix) :]: v for k, v in self.vectors.items() if k.startswith(prefix)}
        )

    def __call__(self, x: torch.Tensor, use: int) -> torch.Tensor:
        return self.block(x, use) if self.takes_use else self.block(x)


@pytest.fixture(params=BLOCKS)
def case(request, vectors_root) -> Case:
    return Case(request.param, vectors_root)


@pytest.mark.parametrize("use", [0, 1])
def test_evaluation(case, use):
    case.block.eval()
    before = {k: v.clone() for k, v in case.block.state_dict().items()}
    with torch.no_grad():
        out = case(case.vectors["input"], use)
    close(out, case.vectors[f"output.eval.use{use}"], "output")
    for key, value in case.block.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} changed in evaluation"


@pytest.mark.parametrize("use", [0, 1])
def test_training(case, use):
    case.block.train()
    before = {k: v.clone() for k, v in case.block.named_buffers()}
    with torch.no_grad():
        out = case(case.vectors["input"], use)
    close(out, case.vectors[f"output.train.use{use}"], "output")
    stored = {k for k in case.vectors if k.startswith(f"after_train.use{use}.")}
    assert len(stored) == len(before)
    for name, value in case.block.named_buffers():
        close(value, case.vectors[f"after_train.use{use}.{name}"], name)
        # The other use of the shared module keeps its statistics.
        assert torch.equal(value[1 - use], before[name][1 - use]), name


def test_gradients(case):
    case.block.eval()
    x = case.vectors["input"].clone().requires_grad_()
    (case(x, 0) * case.vectors["cotangent"]).sum().backward()
    close(x.grad, case.vectors["grad.input"], "input")
    gradients = {name: p.grad for name, p in case.block.named_parameters()}
    assert {f"grad.weight.{name}" for name in gradients} == {
        k for k in case.vectors if k.startswith("grad.weight.")
    }
    for name, gradient in gradients.items():
        close(gradient, case.vectors[f"grad.weight.{name}"], name)


def test_every_vectors_file_is_tested(vectors_root):
    assert {file.stem for file in vectors_root.glob("*.safetensors")} == BLOCKS.keys()


def test_uses_differ(vectors_root):
    """The two uses of an ACDM have statistics of their own, so their outputs differ."""
    case = Case("acdm", vectors_root)
    assert not torch.equal(case.vectors["output.eval.use0"], case.vectors["output.eval.use1"])


def test_interleave():
    a, b = torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
    assert blocks.interleave(a, b).flatten().tolist() == [0, 1, 0, 1]


def test_overlap_count():
    count = transformer.overlap_count(torch.zeros(1, 3, 4, 5))[0, 0]
    expected = torch.full((4, 5), 9.0)
    expected[[0, -1]] = 6
    expected[:, [0, -1]] = 6
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 4
    assert torch.equal(count, expected)


def test_esa_pools_less_on_small_maps():
    """From 15 x 15 the pooling window is 7 x 7; below it is the map itself."""
    esa = blocks.ESA(32).eval()
    for size in (3, 4, 14, 15):
        x = torch.rand(1, 32, size, size + 2)
        assert esa(x).shape == x.shape
        assert esa(x).isfinite().all()
