"""The ladder and the peers of the bench: what runs, what is said of what does not."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_network, bench_peers, bench_train, ntire
from bench.bench_network import NetworkCase
from bench.harness.session import Session
from bench.peers import PEERS
from bench.peers.esrt import ESRT
from bench.peers.lbnet import LBNet
from bench.rungs import RUNGS
from efrdn_fast.counts import count_parameters

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("network", "thousands"), [(ESRT, {2: 677, 3: 770, 4: 751}), (LBNet, {2: 731, 3: 735, 4: 741})]
)
def test_relatives_have_the_published_size(network, thousands):
    """ESRT prints 677, 770, 751 K and LBNet 731, 736, 742 K, rounded one way or the other."""
    got = {scale: count_parameters(network(scale)) // 1000 for scale in (2, 3, 4)}
    assert got == thousands


@pytest.mark.parametrize(("network", "giga"), [(LBNet, 38.9), (ESRT, 47.7)])
def test_convolutions_of_the_relatives(network, giga):
    """LBNet prints 38.9 G multiply-adds; ESRT prints 67.7 G, more than its convolutions need."""
    with torch.device("meta"):
        net, x = network(4).eval(), torch.empty(1, 3, 180, 320)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert round(convolutions / 2e9, 1) == giga


@pytest.mark.parametrize("network", [ESRT, LBNet])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_relatives_enlarge(network, scale):
    torch.manual_seed(0)
    net = network(scale).eval()
    with torch.no_grad():
        y = net(torch.rand(2, 3, 12, 16))
    assert y.shape == (2, 3, 12 * scale, 16 * scale)
    assert y.isfinite().all()


def test_peers_without_their_package_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    session = Session(CPU, seconds=0.01, results=None, only=("EFRDN", "LBNet", "SPAN", "bicubic"))
    case = NetworkCase(2, 16, 16)
    got = {
        name: session.outcome(case, lambda: bench_peers.subject(case, session), name)
        for name in session.only
    }
    assert got["SPAN"].status == "not run" and "spandrel" in got["SPAN"].note
    for name in ("EFRDN", "LBNet", "bicubic"):
        assert got[name].status == "measured" and got[name].error < 1e-4
    assert got["LBNet"].note.startswith("731,240 parameters, ")


def test_span_is_timed_with_merged_branches():
    pytest.importorskip("spandrel")
    assert count_parameters(PEERS["SPAN"].network(4, CPU)) == 426_288


def test_ladder(monkeypatch):
    rungs = ("sdpa-fp32", "eager-fp32", "eager-bf16", "ours-reference-fp32", "ours-cuda-fp16")
    session = Session(CPU, full=True, seconds=0.01, results=None, only=rungs)
    case = NetworkCase(4, 20, 16)
    got = {
        name: session.outcome(case, lambda: bench_network.subject(case, session), name)
        for name in rungs
    }
    assert got["ours-cuda-fp16"].status == "not run"
    assert got["ours-cuda-fp16"].note == "no CUDA device here"
    for name in ("sdpa-fp32", "eager-fp32", "ours-reference-fp32"):
        assert got[name].error < 1e-5, name
    assert 1e-4 < got["eager-bf16"].error < bench_network.TOLERANCES["bf16"]
    assert all(len(got[name].samples["warm"]) >= 3 for name in rungs[:4])


def test_a_wrong_network_gets_no_figure(monkeypatch):
    rung = RUNGS["eager-fp32"]

    def wrong(net, x):
        run = rung.make(net, x)
        return lambda x: run(x) + 0.01

    monkeypatch.setitem(RUNGS, "eager-fp32", dataclasses.replace(rung, make=wrong))
    session = Session(CPU, seconds=0.01, results=None, only=("eager-fp32",))
    case = NetworkCase(4, 16, 16)
    got = session.outcome(case, lambda: bench_network.subject(case, session), "eager-fp32")
    assert got.status == "wrong" and "max error 1.00e-02" in got.note


def test_cases_are_ordered_by_size():
    pixels = [c.batch * c.width * c.height for c in bench_network.cases_of(True)]
    assert pixels == sorted(pixels) and len(pixels) == 3 * 6 * 2
    assert [str(c) for c in bench_network.cases_of(False)] == ["x4-64x64-b1"]


def test_train_bench_checks_the_gradient():
    session = Session(CPU, seconds=0.01, results=None, only=("eager", "sdpa"))
    case = bench_train.TrainCase(1, 12)
    for name in ("eager", "sdpa"):
        got = session.outcome(case, lambda: bench_train.subject(case, session), name)
        assert got.status in ("measured", "noisy") and got.error < 1e-5


def test_ntire_takes_pictures_without_warm_up(monkeypatch, capsys):
    monkeypatch.delenv("EFRDN_FAST_DATA", raising=False)
    monkeypatch.setattr(ntire, "SET5", ((16, 20), (20, 16)))
    monkeypatch.setattr(sys, "argv", ["ntire", "ours-reference-fp32", "--device", "cpu"])
    assert ntire.main() == 0
    got = json.loads(capsys.readouterr().out)
    assert len(got["seconds"]) == 2 and min(got["seconds"]) > 0
    monkeypatch.setattr(sys, "argv", ["ntire", "ours-cuda-fp32", "--device", "cpu"])
    assert ntire.main() == 1
    assert "not run: no CUDA device here" in capsys.readouterr().err
