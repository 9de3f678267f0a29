"""Bookkeeping of CUDA graphs of EFRDNFast, with graphs that run on the CPU."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import ClassVar

import pytest
import torch

from efrdn_fast import EFRDNFast, env, graphs, reference


class FakeGraph:
    """A replay computes again, in place, from the memory it was captured on."""

    made: ClassVar[list[FakeGraph]] = []
    error: ClassVar[Exception | None] = None

    def __init__(self, function, x):
        if self.error is not None:
            raise self.error
        self.function, self.x, self.replays = function, x, 0
        self.y = torch.full_like(function(x), torch.nan)
        self.made.append(self)

    ordered = staticmethod(contextlib.nullcontext)

    def replay(self):
        self.replays += 1
        self.y.copy_(self.function(self.x))


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(FakeGraph, "made", [])
    monkeypatch.setattr(FakeGraph, "error", None)
    monkeypatch.setattr(graphs, "CudaGraph", FakeGraph)
    return FakeGraph


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(graphs, "capturable", lambda x: True)


def triple(x):
    return 3 * x


def test_captures_at_the_second_call_and_never_returns_its_buffers(fake):
    cache, x = graphs.GraphCache(), torch.rand(1, 3, 4, 5)
    results = []
    for i in range(4):
        results.append(cache.run(triple, x + i))
        assert len(fake.made) == len(cache) == (i > 0)
    (graph,) = fake.made
    assert graph.replays == 3
    for i, y in enumerate(results):
        assert torch.equal(y, 3 * (x + i))  # later calls did not write into earlier results
        assert y.data_ptr() != graph.y.data_ptr()
    assert graph.x.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("x", "key"),
    [
        (torch.rand(1, 3, 5, 4), 0),
        (torch.rand(2, 3, 4, 5), 0),
        (torch.rand(1, 3, 4, 5).double(), 0),
        (torch.rand(1, 3, 4, 5), 1),
    ],
)
def test_another_shape_dtype_or_key_is_another_graph(x, key, fake):
    cache = graphs.GraphCache()
    for _ in range(2):
        cache.run(triple, torch.rand(1, 3, 4, 5), 0)
        assert torch.equal(cache.run(triple, x, key), 3 * x)
    assert len(fake.made) == 2


def test_another_memory_layout_is_the_same_graph(fake):
    cache, x = graphs.GraphCache(), torch.rand(2, 3, 4, 5)
    for each in (x, x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert torch.equal(cache.run(triple, each), 3 * x)
    assert len(fake.made) == 1


def test_bound_drops_what_was_used_longest_ago(fake):
    cache = graphs.GraphCache(bound=2)

    def call(width):
        cache.run(triple, torch.rand(1, 3, 4, width))

    for width in (5, 5, 6, 6, 5, 7, 7):  # 6 makes room for 7
        call(width)
    assert len(cache) == 2 and len(fake.made) == 3
    call(5)
    assert len(fake.made) == 3
    call(6)  # once more a first time
    call(6)
    assert len(cache) == 2 and len(fake.made) == 4


def test_shapes_that_come_once_are_not_remembered_forever():
    cache = graphs.GraphCache()
    for width in range(1, graphs.SEEN + 10):
        cache.run(triple, torch.rand(1, 1, 1, width))
    assert len(cache._seen) == graphs.SEEN and len(cache) == 0


def test_a_failed_capture_runs_without_and_is_not_tried_again(fake, monkeypatch):
    cache, x = graphs.GraphCache(), torch.rand(1, 3, 4, 5)
    monkeypatch.setattr(fake, "error", RuntimeError("operation not permitted\nwhen capturing"))
    cache.run(triple, x)
    message = r"no CUDA graph for an input of \[1, 3, 4, 5\].*\(operation not permitted\)"
    with pytest.warns(RuntimeWarning, match=message):
        assert torch.equal(cache.run(triple, x), 3 * x)
    monkeypatch.setattr(fake, "error", None)
    assert torch.equal(cache.run(triple, x), 3 * x)
    assert not fake.made and len(cache) == 0


def test_out_of_memory_in_a_capture_drops_the_other_graphs(fake, monkeypatch):
    cache, x = graphs.GraphCache(), torch.rand(1, 3, 4, 5)
    for _ in range(2):
        cache.run(triple, x[..., :2])
    assert len(cache) == 1
    monkeypatch.setattr(fake, "error", torch.OutOfMemoryError("CUDA out of memory."))
    cache.run(triple, x)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        cache.run(triple, x)
    assert len(cache) == 0


def test_buffers_of_inference_mode_are_written_outside_it(fake):
    cache, x = graphs.GraphCache(), torch.rand(1, 3, 4, 5)
    with torch.inference_mode():
        for _ in range(2):
            cache.run(triple, x + 0)
    assert torch.equal(cache.run(triple, x + 1), 3 * (x + 1))
    assert len(fake.made) == 1


def test_only_cuda_tensors_outside_a_capture(monkeypatch):
    class OnGpu:
        is_cuda = True

    monkeypatch.setenv("EFRDN_FAST_CUDA_GRAPHS", "1")
    assert not graphs.capturable(torch.rand(1))
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        assert graphs.capturable(OnGpu()) is not capturing
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("EFRDN_FAST_CUDA_GRAPHS")
    assert not graphs.capturable(OnGpu())
    monkeypatch.setenv("EFRDN_FAST_CUDA_GRAPHS", "off")
    with pytest.raises(ValueError, match="EFRDN_FAST_CUDA_GRAPHS must be 0 or 1, got 'off'"):
        env.cuda_graphs()


def small(**options) -> EFRDNFast:
    return EFRDNFast(2, channels=16, distilled=5, **options).eval()


def test_network_replays_and_captures_again_for_changed_weights(fake, on_gpu):
    net, x = small(), torch.rand(1, 3, 6, 7)
    with torch.inference_mode():
        first = net(x)  # packs, in tensors of inference mode
    with torch.no_grad():
        assert not fake.made
        assert torch.equal(net(x), first) and len(fake.made) == 1
        assert not torch.equal(net(x.flip(2)), first) and len(fake.made) == 1
        net.head.weight.mul_(1.5)
        other = net(x)
        assert not torch.equal(other, first) and len(fake.made) == 1
        assert torch.equal(net(x), other) and len(fake.made) == 2
    assert all(graph.replays for graph in fake.made)
    assert net(x).requires_grad and len(fake.made) == 2
    for each in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            assert torch.equal(each(x), other)
    assert len(fake.made) == 2


def test_network_captures_again_for_what_is_no_weight(fake, on_gpu):
    net, x = small(), torch.rand(1, 3, 6, 7)
    with torch.no_grad():
        for _ in range(2):
            net(x)
        for trans in net.trans:
            trans.emha.segment_tokens = 5
        expected = net(x)
        assert torch.equal(net(x), expected) and len(fake.made) == 2
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        try:
            matmul.fp32_precision = "tf32" if before != "tf32" else "ieee"
            net(x)
            net(x)
        finally:
            matmul.fp32_precision = before
    assert len(fake.made) == 3


def test_no_graph_of_what_runs_as_python(fake, on_gpu):
    own = small().set_attention(lambda *args: reference.emha(*args))
    with torch.no_grad():
        for net in (own, small(module="imdb"), small(ablation="no_fflb")):
            for _ in range(3):
                net(torch.rand(1, 3, 4, 4))
    assert not fake.made
