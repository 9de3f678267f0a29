"""ONNX export: the exportable copy is exact, and ONNX Runtime agrees with it at free sizes."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

from efrdn_fast import EFRDN, __version__, checkpoint, cli, export


def small(**options) -> EFRDN:
    return EFRDN(**{"scale": 2, "channels": 16, "distilled": 5, **options}).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"segments": 3, "fold": "sum"}, {"segment_tokens": 64}, {"module": "rfdb", "scale": 3}],
    ids=str,
)
@pytest.mark.parametrize("size", [(1, 15, 15), (2, 16, 19)])
def test_exportable_copy_is_exact(options, size):
    net = small(**options).double()
    copy = export.exportable(net)
    batch, height, width = size
    x = torch.rand(batch, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(copy(x), net(x), rtol=0, atol=1e-12)
    assert list(net.trans[0]._modules) == ["norm1", "emha", "norm2", "mlp"]  # left as it was


class Attention(torch.nn.Module):
    """The attention alone, on tokens made of pixels."""

    scale = 1

    def __init__(self, heads: int, segments: int, segment_tokens: int):
        super().__init__()
        self.qkv = torch.nn.Conv2d(3, 3 * heads * 5, 1)
        self.options = (heads, segments, segment_tokens)

    def forward(self, x):
        tokens = export._attention(self.qkv(x).flatten(2).transpose(1, 2), *self.options)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize(
    ("segments", "segment_tokens", "least", "opset"),
    [(3, 0, 15, 18), (17, 0, 17, 18), (4, 50, 15, 20), (4, 1000, 15, 18)],
    ids=["3", "17-as-many-as-rows", "of-50-opset20", "of-more-than-there-are"],
)
def test_attention_in_onnx(segments, segment_tokens, least, opset):
    net = Attention(2, segments, segment_tokens)
    model = export._translate(net, opset, least)
    assert model.opset_imports[""] == opset
    export._clean(model)
    data = onnx_ir.serde.serialize_model(model).SerializeToString()
    for size in ((1, least, least), (2, least, least + 3), (1, 31, 33)):
        assert export._difference(net, data, size) < 1e-5


def test_no_segment_is_empty_from_the_least_size_on():
    assert export.least_size(small()) == 15
    assert export.least_size(small(segment_tokens=9, segments=99)) == 15
    for segments in (1, 14, 16, 40):
        least = export.least_size(small(segments=segments))
        tokens = least**2
        assert tokens > (segments - 1) * -(-tokens // segments)


def test_export(tmp_path, capsys):
    """Without EFFB, whose parts stand elsewhere too: that halves the time."""
    net = small(ablation="no_effb")
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_()
    weights = checkpoint.save(net, tmp_path / "net.safetensors", {"steps": 3})
    path = tmp_path / "out" / "net.onnx"
    assert cli.main(["export", "--model", str(weights), "-o", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{path}: EFRDN x2, opset 18, height and width >= 15"
    assert [line.split(":")[0] for line in out[1:]] == ["1x3x15x15", "2x3x19x23", "1x3x48x37"]

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["producer"] == f"efrdn_fast {__version__}"
    assert json.loads(metadata["config"]) == net.config.to_dict()
    assert json.loads(metadata["training"]) == {"steps": 3}
    assert metadata["least_height_and_width"] == "15"
    assert b".py" not in path.read_bytes()  # no trace of the exporting machine
    assert {node.domain for node in model.graph.node} == {""}

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1]) for i in session.get_inputs()] == [("lr", 3)]
    assert all(isinstance(session.get_inputs()[0].shape[i], str) for i in (0, 2, 3))
    for shape in ((3, 3, 17, 50), (1, 3, 64, 33)):
        x = torch.rand(shape)
        with torch.no_grad():
            expected = net(x).numpy()
        np.testing.assert_allclose(session.run(["sr"], {"lr": x.numpy()})[0], expected, atol=2e-5)


def identity(net, opset, least):
    """Stands for the exporter: a model that gives its input back."""
    lr = onnx_ir.val("lr", onnx_ir.DataType.FLOAT, ["n", 3, "h", "w"])
    node = onnx_ir.node("Identity", [lr])
    node.outputs[0].name = "sr"
    graph = onnx_ir.Graph([lr], node.outputs, nodes=[node], opset_imports={"": opset}, name="g")
    return onnx_ir.Model(graph, ir_version=10)


def test_writes_nothing_when_the_runtime_disagrees(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_translate", identity)
    path = tmp_path / "net.onnx"
    with pytest.raises(RuntimeError, match=r"gives \[1, 3, 15, 15\] .* expected \[1, 3, 30, 30\]"):
        export.to_onnx(small(), path)

    class Same(EFRDN):
        def forward(self, x):
            return x + 0.01

    with pytest.raises(RuntimeError, match=r"differs from PyTorch by 1\.00e-02"):
        export.to_onnx(Same(2, channels=16), path)
    assert not path.exists()


def test_names_what_is_not_installed(tmp_path, monkeypatch, capsys):
    weights = checkpoint.save(small(), tmp_path / "net.safetensors")
    found = export.importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "onnxscript" else found(name, *rest),
    )
    status = cli.main(["export", "--model", str(weights), "-o", str(tmp_path / "net.onnx")])
    assert status == 1
    assert "needs onnxscript: pip install 'efrdn_fast[export]'" in capsys.readouterr().err


def test_rejects(tmp_path):
    with pytest.raises(ValueError, match="opset must be at least 18, got 17"):
        export.to_onnx(small(), tmp_path / "net.onnx", opset=17)
    with pytest.raises(ValueError, match=r"float32 network on the CPU, got torch\.float64"):
        export.to_onnx(small().double(), tmp_path / "net.onnx")
