"""Weight algebra against the blocks that it folds, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from efrdn_fast import blocks, reference, reparam
from efrdn_fast.testing import make_input

EXACT = {"rtol": 0, "atol": 1e-12}


def randomize(block: torch.nn.Module) -> torch.nn.Module:
    """Everything random, statistics of the two uses too, so that no term can hide."""
    generator = torch.Generator().manual_seed(3)
    block = block.double().eval()
    with torch.no_grad():
        for name, value in (*block.named_parameters(), *block.named_buffers()):
            random = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            positive = "running_var" in name
            value.copy_(random + 0.3 if positive else (random - 0.5) * 1.5)
    return block


def test_fold_bn_equals_convolution_then_batch_norm():
    x = make_input((2, 4, 7, 5), torch.float64)
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    gamma, beta, mean = torch.randn(3, 6, dtype=torch.float64)
    var = torch.rand(6, dtype=torch.float64) + 0.1
    expected = F.batch_norm(
        F.conv2d(x, weight, padding=1, groups=2), mean, var, gamma, beta, False, 0.0, 1e-3
    )
    folded, bias = reparam.fold_bn(weight, gamma, beta, mean, var, 1e-3)
    torch.testing.assert_close(F.conv2d(x, folded, bias, padding=1, groups=2), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_bn_rounds_once(dtype):
    weight = torch.randn(6, 2, 3, 3).to(dtype)
    gamma, beta, mean = torch.randn(3, 6).to(dtype)
    var = (torch.rand(6) + 0.1).to(dtype)
    folded = reparam.fold_bn(weight, gamma, beta, mean, var, 1e-5)
    doubles = (t.double() for t in (weight, gamma, beta, mean, var))
    exact = reparam.fold_bn(*doubles, 1e-5)
    for value, expected in zip(folded, exact, strict=True):
        assert value.dtype == dtype
        assert torch.equal(value, expected.to(dtype))


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (1, 6)])
def test_merge_asymmetric_equals_the_sum_of_the_branches(size):
    x = make_input((2, 5, *size), torch.float64)
    w1x3, w3x3, w3x1 = (
        torch.randn(3, 5, *kernel, dtype=torch.float64) for kernel in ((1, 3), (3, 3), (3, 1))
    )
    merged = reparam.merge_asymmetric(w1x3, w3x3, w3x1)
    expected = reference.asymmetric_conv(x, w1x3, w3x3, w3x1)
    torch.testing.assert_close(F.conv2d(x, merged, padding=1), expected, **EXACT)


def test_merge_asymmetric_hands_each_branch_its_gradient():
    shapes = ((2, 3, 1, 3), (2, 3, 3, 3), (2, 3, 3, 1))
    weights = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    grad = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    grads = torch.autograd.grad(reparam.merge_asymmetric(*weights), weights, grad)
    assert torch.equal(grads[0], grad[:, :, 1:2, :])
    assert torch.equal(grads[1], grad)
    assert torch.equal(grads[2], grad[:, :, :, 1:2])


@pytest.mark.parametrize("use", [0, 1])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fold_gcrb_equals_the_block(use, groups):
    block = randomize(blocks.GCRB(16, groups))
    x = make_input((2, 16, 7, 5), torch.float64)
    y = reference.gcrb(x, *reparam.fold_gcrb(block, use), groups=groups)
    torch.testing.assert_close(y, block(x, use), **EXACT)
    assert not torch.allclose(y, block(x, 1 - use))


@pytest.mark.parametrize("use", [0, 1])
def test_fold_acrb_equals_the_block(use):
    block = randomize(blocks.ACRB(9))
    x = make_input((2, 32, 7, 5), torch.float64)
    y = reference.acrb(x, *reparam.fold_acrb(block, use), start=23)
    torch.testing.assert_close(y, block(x[:, 23:], use), **EXACT)
    assert not torch.allclose(y, block(x[:, 23:], 1 - use))


def test_folding_keeps_the_dtype_of_the_weights():
    assert all(p.dtype == torch.float32 for p in reparam.fold_gcrb(blocks.GCRB(16)))
    assert all(p.dtype == torch.float32 for p in reparam.fold_acrb(blocks.ACRB(9)))
