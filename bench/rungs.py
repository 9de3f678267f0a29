"""The ways to run the network that the ladder compares, from plain eager to ours.

A rung names its dtype, says why it cannot run on a device, and makes of a network the function to
be timed: `[N, 3, H, W]` in [0, 1] -> `[N, 3, sH, sW]`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efrdn_fast import EFRDN, dispatch, env
from efrdn_fast.device import HALF
from efrdn_fast.fast import EFRDNFast
from efrdn_fast.reference import emha_sdpa

__all__ = ["BASELINE", "RUNGS", "Run", "Rung", "onnx_file"]

BASELINE = "sdpa-fp32"

Run = Callable[[Tensor], Tensor]
Make = Callable[[EFRDN, Tensor], Run]
WhyNot = Callable[[torch.device], "str | None"]


@dataclass(frozen=True)
class Rung:
    """One way to run the network."""

    kind: str
    """What runs it: "eager", "sdpa", "compile", "onnxruntime", "ours-cpu", ..."""
    dtype: str
    """fp32, tf32, fp16 or bf16."""
    make: Make
    """(float32 network in evaluation mode, float32 input) -> function to be timed."""
    why_not: WhyNot
    """Device -> reason why it cannot run there."""
    full: bool = False
    """Only with `--full`."""
    fixed: bool = False
    """Made anew for every shape."""
    prepare: Callable[[EFRDN], Any] = lambda net: None
    """What is done once for a network and is no part of the first call: the ONNX export."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.dtype}"


def _anywhere(device: torch.device) -> None:
    return None


def _cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "no CUDA device here"


def _cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"runs on the CPU, the bench on {device}"


def _installed(package: str, where: WhyNot) -> WhyNot:
    def why_not(device: torch.device) -> str | None:
        missing = importlib.util.find_spec(package) is None
        return where(device) or (f"{package} is not installed" if missing else None)

    return why_not


def _network(net: EFRDN, dtype: str, sdpa: bool) -> EFRDN:
    net = copy.deepcopy(net).to(HALF.get(dtype, torch.float32))
    return net.set_attention(emha_sdpa) if sdpa else net


def _eager(dtype: str, sdpa: bool) -> Make:
    def make(net: EFRDN, x: Tensor) -> Run:
        net, kind = _network(net, dtype, sdpa), HALF.get(dtype, torch.float32)
        return lambda x: net(x.to(kind))

    return make


def _compiled(dtype: str, mode: str | None) -> Make:
    def make(net: EFRDN, x: Tensor) -> Run:
        kind = HALF.get(dtype, torch.float32)
        compiled = torch.compile(_network(net, dtype, sdpa=True), mode=mode, dynamic=False)
        return lambda x: compiled(x.to(kind))

    return make


def _ours(backend: str, dtype: str) -> Make:
    def make(net: EFRDN, x: Tensor) -> Run:
        return EFRDNFast.from_reference(net, backend=backend, dtype=dtype)

    return make


def _why_not_ours(backend: str) -> WhyNot:
    def why_not(device: torch.device) -> str | None:
        if backend != "reference" and device.type != ("cpu" if backend == "cpu" else "cuda"):
            return "no CUDA device here" if device.type == "cpu" else "runs on the CPU"
        return {row.backend: row.reason for row in dispatch.backends()}[backend]

    return why_not


def onnx_file(net: EFRDN) -> Path:
    """The network as ONNX, exported once for these weights into the cache folder.

    Raises:
        ImportError, RuntimeError: See `export.to_onnx`.
    """
    from efrdn_fast.export import to_onnx

    weights = hashlib.sha256(str(net.config).encode())
    for name, value in net.state_dict().items():
        weights.update(name.encode() + value.detach().cpu().numpy().tobytes())
    path = env.cache_dir() / "bench" / f"{weights.hexdigest()[:20]}.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        to_onnx(copy.deepcopy(net).cpu(), path)
    return path


def _onnxruntime(net: EFRDN, x: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(onnx_file(net), options, providers=providers)
    return lambda x: torch.from_numpy(session.run(None, {"lr": x.numpy()})[0])


def _openvino(dtype: str) -> Make:
    def make(net: EFRDN, x: Tensor) -> Run:
        import openvino

        core = openvino.Core()
        model = core.read_model(onnx_file(net))
        model.reshape({"lr": list(x.shape)})  # a fixed size is what it optimizes best
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = core.compile_model(model, "CPU", options).create_infer_request()
        return lambda x: torch.from_numpy(request.infer({0: x.numpy()})[0])

    return make


def _tensorrt(dtype: str) -> Make:
    def make(net: EFRDN, x: Tensor) -> Run:
        import tensorrt as trt

        log = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(log)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(onnx_file(net))):
            raise RuntimeError(f"TensorRT cannot read the export: {parser.get_error(0).desc()}")
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        profile.set_shape("lr", *[tuple(x.shape)] * 3)
        config.add_optimization_profile(profile)
        if dtype == "fp16":
            config.set_flag(trt.BuilderFlag.FP16)
        plan = builder.build_serialized_network(network, config)
        context = trt.Runtime(log).deserialize_cuda_engine(plan).create_execution_context()
        n, _, height, width = x.shape
        y = x.new_empty(n, 3, net.scale * height, net.scale * width)
        context.set_input_shape("lr", tuple(x.shape))
        context.set_tensor_address("sr", y.data_ptr())

        def run(x: Tensor) -> Tensor:
            context.set_tensor_address("lr", x.data_ptr())
            context.execute_async_v3(torch.cuda.current_stream(x.device).cuda_stream)
            return y

        return run

    return make


def _rungs() -> list[Rung]:
    gpu = functools.partial(Rung, why_not=_cuda)
    ort, ov, trt = (
        _installed(name, where)
        for name, where in (("onnxruntime", _cpu), ("openvino", _cpu), ("tensorrt", _cuda))
    )
    rungs = [
        Rung("eager", "fp32", _eager("fp32", sdpa=False), _anywhere),
        Rung("eager", "bf16", _eager("bf16", sdpa=False), _anywhere, full=True),
        gpu("eager", "fp16", _eager("fp16", sdpa=False)),
        Rung("sdpa", "fp32", _eager("fp32", sdpa=True), _anywhere),
        Rung("sdpa", "bf16", _eager("bf16", sdpa=True), _anywhere),
        gpu("sdpa", "fp16", _eager("fp16", sdpa=True)),
        Rung("compile", "fp32", _compiled("fp32", None), _anywhere, full=True),
        Rung("compile", "bf16", _compiled("bf16", None), _anywhere, full=True),
        gpu("compile", "fp16", _compiled("fp16", None), full=True),
        gpu("compile-max", "fp32", _compiled("fp32", "max-autotune"), full=True),
        gpu("compile-max", "fp16", _compiled("fp16", "max-autotune"), full=True),
        Rung("onnxruntime", "fp32", _onnxruntime, ort, prepare=onnx_file),
        Rung("openvino", "fp32", _openvino("fp32"), ov, fixed=True, prepare=onnx_file),
        Rung("openvino", "bf16", _openvino("bf16"), ov, fixed=True, prepare=onnx_file),
        Rung("tensorrt", "fp32", _tensorrt("fp32"), trt, full=True, fixed=True, prepare=onnx_file),
        Rung("tensorrt", "fp16", _tensorrt("fp16"), trt, full=True, fixed=True, prepare=onnx_file),
        Rung("ours-reference", "fp32", _ours("reference", "fp32"), _anywhere),
    ]
    for backend, dtypes in (
        ("cpu", ("fp32", "bf16")),
        ("triton", ("fp32", "tf32", "bf16", "fp16")),
        ("cuda", ("fp32", "tf32", "bf16", "fp16")),
    ):
        for dtype in dtypes:
            rungs.append(
                Rung(f"ours-{backend}", dtype, _ours(backend, dtype), _why_not_ours(backend))
            )
    return rungs


RUNGS = {rung.name: rung for rung in _rungs()}
"""Name -> rung, from the plainest to ours."""
