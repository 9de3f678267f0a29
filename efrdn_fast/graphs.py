"""Inference as CUDA graphs, one per shape, within a bound.

A call copies its input into the buffer of a graph, replays it and returns a copy of its result;
the buffers are never handed out. A shape is captured when it comes for the second time, so that
images of ever new sizes pay for no capture. EFRDN_FAST_CUDA_GRAPHS=1 turns graphs on.

This code has not run on a GPU yet; the tests have a stand-in for `CudaGraph`.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from . import env
from .device import is_out_of_memory

__all__ = ["BOUND", "CudaGraph", "GraphCache", "capturable", "capturing"]

BOUND = 4
"""Graphs that a cache keeps; each owns the memory of a whole forward pass."""
SEEN = 64
"""Keys that are remembered as having come once."""


def capturing(x: Tensor) -> bool:
    """Whether the caller captures a graph of what is done with `x`."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def capturable(x: Tensor) -> bool:
    """Whether a forward pass of `x` may be a graph: on a GPU, not inside the caller's capture."""
    return x.is_cuda and env.cuda_graphs() and not capturing(x)


class CudaGraph:
    """`function(x)` captured; `replay` computes `y` from what then is in the memory of `x`."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor):
        self.device, self.graph = x.device, torch.cuda.CUDAGraph()
        with torch.cuda.device(x.device):
            self.done = torch.cuda.Event()
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                function(x)  # what is built or tuned at a first call cannot be inside a capture
            current.wait_stream(stream)
            # Other threads may allocate meanwhile; the stream given is one of this device.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.y = function(x)

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """After all earlier use of the buffers, on whichever stream that was."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            yield
            self.done.record(stream)

    def replay(self) -> None:
        self.graph.replay()


class GraphCache:
    """The graphs of one function whose weights stay as they are; makes a new one per key."""

    def __init__(self, bound: int = BOUND):
        self.bound = bound
        # key -> buffer of the input and graph; None where the capture failed
        self._graphs: OrderedDict[Hashable, tuple[Tensor, CudaGraph] | None] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor, key: Hashable = ()) -> Tensor:
        """`function(x)`, by a graph from the second call for a shape, dtype, device and `key` on.

        Args:
            key: What the result depends on besides `x` and the weights.
        """
        key = tuple(x.shape), x.dtype, x.device, key
        with self._lock:
            if key in self._graphs or self._comes_again(key):
                graph = self._take(function, x, key)
                if graph is not None:
                    return _replay(*graph, x)
        return function(x)

    def _comes_again(self, key: Hashable) -> bool:
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return False

    def _take(
        self, function: Callable[[Tensor], Tensor], x: Tensor, key: Hashable
    ) -> tuple[Tensor, CudaGraph] | None:
        if key not in self._graphs:
            while len(self._graphs) >= self.bound:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(function, x)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _capture(
        self, function: Callable[[Tensor], Tensor], x: Tensor
    ) -> tuple[Tensor, CudaGraph] | None:
        # Buffers outlive the call: inference tensors could not be written outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            try:
                buffer = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
                return buffer, CudaGraph(function, buffer)
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                full = is_out_of_memory(error)
        if full:
            self._graphs.clear()
        warnings.warn(
            f"EFRDNFast: no CUDA graph for an input of {list(x.shape)}, it runs without ({reason})",
            RuntimeWarning,
        )
        return None


def _replay(buffer: Tensor, graph: CudaGraph, x: Tensor) -> Tensor:
    with graph.ordered():
        buffer.copy_(x)
        graph.replay()
        return graph.y.clone()
