"""Roofline, comparison, smoke, tables and pictures of the bench."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import compare, devices, groups, plain, records, report, roofline, smoke
from bench.harness.store import Store, load
from bench.harness.work import ExpCounter, counted
from efrdn_fast import EFRDN, cases, cli, reference
from efrdn_fast.cases_attention import EmhaCase
from efrdn_fast.config import EFRDNConfig
from efrdn_fast.counts import count
from efrdn_fast.fast import EFRDNFast
from efrdn_fast.timing import Ratio
from efrdn_fast.transformer import TransformerBlock

PYTHON = sys.executable


@pytest.mark.parametrize("options", [{}, {"segments": 3}, {"segment_tokens": 50}])
def test_groups_hold_what_a_forward_pass_does(options):
    """Multiply-adds against the flop counter, exponentials against those of softmax."""
    net, x = EFRDN(4, **options).eval(), torch.rand(1, 3, 15, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, ExpCounter() as exps:
        net(x)
    found = groups.groups(count(EFRDNConfig(4, **options), 16, 15))
    assert sum(group.flops for group in found) == flops.get_total_flops()
    assert sum(group.exps for group in found) == exps.softmax


def test_bytes_of_a_block_are_those_of_its_tensors():
    found = {group.name: group for group in groups.groups(count(EFRDNConfig(), 20, 10))}
    pixels, parameters = 200, 32 // 2 * 8 + 8 * 9 + 8 // 2 * 32 + 2 * (8 + 8 + 32)
    assert found["GCRB"].elements == 60 * (2 * 32 * pixels + parameters)
    assert found["attention"].elements == 2 * 4 * 144 * pixels


def test_gates_are_a_small_share_of_the_exponentials():
    """Sigmoids are not counted: at 320x180, under half a percent of the softmax's."""
    net, x = EFRDN(4).eval(), torch.rand(1, 3, 16, 16)
    with torch.no_grad(), ExpCounter() as exps:
        net(x)
    assert exps.sigmoid / 256 * 57600 < 0.005 * count(EFRDNConfig()).exps


def test_floor_names_what_binds():
    group = groups.Group("a", 1, flops=100, exps=10, elements=1000)
    rates = {"copy": 1e3, "matmul": 1e3, "exp": 1e3}
    assert group.floor(rates, 4) == (4.0, "copy")
    assert group.floor({**rates, "matmul": 1.0}, 4) == (100.0, "matmul")
    assert group.floor({**rates, "exp": 0.01}, 4) == (1000.0, "exp")


def test_block_times_add_up():
    net, x = EFRDN(4).eval(), torch.rand(1, 3, 16, 16)
    fast = EFRDNFast.from_reference(net, backend="reference")
    for subject in (net, fast):
        before = subject.forward
        times = groups.block_times(subject, x)
        assert {"GCRB", "ESA", "attention", "tokens", groups.REST} <= times.keys()
        assert min(times.values()) > 0
        assert subject.forward == before
        with torch.inference_mode():
            torch.testing.assert_close(subject(x), net(x), rtol=0, atol=1e-4)


def test_roofline_of_a_named_device(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["roofline", "--device", "h200", "--size", "320x180"])
    assert roofline.main() == 0
    text = capsys.readouterr().out
    assert "not measured" in text and "modelled" in text and "datasheet" in text
    (attention,) = (line for line in text.splitlines() if line.startswith("attention"))
    assert attention.split()[3] == "13.271" and "exp" in attention


def test_roofline_without_results_says_how_to_get_them(capsys, monkeypatch, tmp_path):
    def refused(*words):
        with pytest.raises(SystemExit) as wrong:
            roofline.main(words)
        assert wrong.value.code == 2
        return capsys.readouterr().err

    assert "no device 'h900': expected h200" in refused("--device", "h900")
    assert "invalid choice: 'theirs'" in refused("--variant", "theirs")
    monkeypatch.setattr(roofline, "device_folder", lambda device: "cpu-never-measured")
    text = refused()
    assert "no results of this machine (cpu-never-measured): " in text
    assert "`pytest bench/bench_blocks.py` measures it, --device NAME takes another" in text


def test_counts_are_those_of_the_profiler():
    """torch.profiler's own count of convolutions and matrix products, beside the one in counts."""
    net, x = EFRDN(4).eval(), torch.rand(1, 3, 12, 12)
    with torch.no_grad(), torch.profiler.profile(with_flops=True, acc_events=True) as profiler:
        net(x)
    counted = ("aten::conv2d", "aten::addmm", "aten::mm", "aten::bmm")
    seen = sum(event.flops for event in profiler.key_averages() if event.key in counted)
    assert seen == 2 * count(EFRDNConfig(), 12, 12).total


@pytest.mark.parametrize("op", roofline.KERNELS)
def test_work_of_kernels_is_what_their_reference_does(op):
    """The counts of the roofline against the flop counter on a small case of each bench."""
    module = importlib.import_module(f"bench.bench_{op}")
    moved = None
    if op == "transformer":
        case = module.BlockCase(8, 5, 12)
        function = TransformerBlock(segment_tokens=12).eval()
        args = (torch.rand(1, 32, 5, 8),)
        moved = 4 * (2 * 32 * 40 + sum(p.numel() for p in function.parameters()))
    else:
        case = {
            "gcrb": cases.GcrbCase((2, 32, 6, 5)),
            "gcrb_chain": cases.GcrbChainCase((2, 32, 6, 5)),
            "acrb": cases.AcrbCase((2, 32, 6, 5), start=23),
            "conv3x3": cases.Conv3x3Case((1, 6, 5), (9, 7), 8),
            "emha": EmhaCase(1, 10, 4),
        }[op]
        function, args = case.reference, case.args()
    if op == "acrb":
        moved = 4 * (2 * 2 * 9 * 30 + 9 * 9 * 9 + 9)
    if op == "emha":  # its reference returns lse too
        function = reference.emha
        args = args[:3]
    _, work = counted(function, args, torch.float32, moved)
    got = module.work(case, torch.float32)
    assert (got.flops, got.exps, got.bytes) == (work.flops, work.exps, work.bytes)
    half = module.work(case, torch.float16)
    assert (half.flops, half.exps) == (work.flops, work.exps) and half.bytes < work.bytes


def test_the_roofline_has_every_bench_that_counts_its_work():
    modules = {name: importlib.import_module(f"bench.bench_{name}") for name in plain.names()}
    assert {name for name, module in modules.items() if hasattr(module, "work")} == set(
        roofline.KERNELS
    )


def test_roofline_of_kernels(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    monkeypatch.setattr(roofline, "KERNELS", ("emha",))
    case = {"case": "N1-T3600-L3600-H8-D18", "dtype": "float16", "mode": "graph"}
    rows = [row("cuda", **times(1, 1, 1)), row("triton", **times(2, 2, 2)), row("sdpa", p50_ms=0.5)]
    run = {"revision": "r", "date": "d"}
    Store(tmp_path / "h200", "emha").add([r | case for r in rows], run)
    assert roofline.main(["--device", "h200", "--kernels"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("emha"))
    shown = "N1-T3600-L3600-H8-D18 7.465 0.104 4.1 0.02479 exp 1 40.3x cuda graph measured"
    assert line.split()[1:] == shown.split()
    assert roofline.main(["--device", "a100", "--kernels"]) == 0
    assert "not measured" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        roofline.main(["--size", "96by96"])
    assert "'96by96' is no size; expected such as 320x180" in capsys.readouterr().err


def test_measured_rates_are_those_of_the_runs(tmp_path):
    run = {"revision": "r", "ceilings": {"copy": 1.0, "matmul": {"float32": 2.0}, "exp": 3.0}}
    row = {"op": "a", "case": "c", "dtype": "d", "mode": "warm", "threads": 1, "status": "noisy"}
    for i in (1, 2):
        best = {**run["ceilings"], "copy": float(i)}
        variant = {**row, "variant": str(i)}
        Store(tmp_path / "cpu-x", "a").add([variant], {**run, "ceilings": best, "date": str(i)})
    rates, source = devices.rates("cpu-x", results=tmp_path)
    assert rates == {"copy": 2.0, "matmul": 2.0, "exp": 3.0} and source == "measured"


def test_curve_grows_as_attention_does(monkeypatch):
    monkeypatch.setattr(roofline, "CURVE", ((480, 270), (1920, 1080)))
    points = {(p.way, p.width): p for p in roofline.curve(devices.rates("h200")[0], element=2)}
    for way in ("4 segments", "16 segments"):
        assert points[way, 1920].floor / points[way, 480].floor > 200
    fixed = "segment_tokens=576"
    assert points[fixed, 1920].floor / points[fixed, 480].floor == pytest.approx(16, rel=0.05)
    assert points[fixed, 1920].scores == points[fixed, 480].scores
    tiled = f"tiles of {roofline.TILE}"
    assert points[tiled, 1920].maps == points[tiled, 480].maps


def row(variant: str, **more) -> dict:
    key = {"op": "a", "case": "c", "dtype": "float32", "mode": "warm", "threads": 2}
    return {**key, "variant": variant, "status": "measured", **more}


def times(low: float, median: float, high: float) -> dict:
    return {"p20_ms": low, "p50_ms": median, "p80_ms": high}


def ratio(low: float, value: float, high: float) -> dict:
    return {"ratio_low": low, "ratio": value, "ratio_high": high, **times(1, 1, 1)}


def test_compare(tmp_path, capsys, monkeypatch):
    old = [
        row("alone", **times(9, 10, 11)),
        row("same", **times(9, 10, 11)),
        row("load", **{**ratio(1.9, 2.0, 2.1), **times(1, 1, 1)}),
        row("lost", **ratio(1.9, 2.0, 2.1)),
        row("loud", **times(9, 10, 11)),
        row("gone", **times(9, 10, 11)),
        row("guess", **times(9, 10, 11)),
    ]
    new = [
        row("alone", **times(4, 5, 6)),
        row("same", **times(10, 11, 12)),
        row("load", **{**ratio(1.95, 2.05, 2.2), **times(3, 3, 3)}),
        row("lost", **ratio(0.9, 1.0, 1.1)),
        {**row("loud", **times(90, 100, 110)), "status": "noisy"},
        {**row("guess", **times(9, 10, 11)), "status": "modelled"},
    ]
    for folder, rows, torch_version in (("old", old, "2.10"), ("new", new, "2.11")):
        run = {"revision": "r", "date": folder, "versions": {"torch": torch_version}}
        Store(tmp_path / folder, "a").add(rows, run)
    found = {c.key[3]: c for c in compare.changes(tmp_path / "old", tmp_path / "new" / "a.json")}
    assert {name: change.verdict for name, change in found.items()} == {
        "alone": "faster",
        "same": "within the noise",
        "load": "within the noise",
        "lost": "slower",
        "loud": "noisy",
        "guess": "no figure: measured, then modelled",
    }
    assert found["alone"].factor == 2 and found["lost"].factor == 0.5
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    assert compare.main() == 1
    text = capsys.readouterr().out
    assert "not the same: torch: 2.10, then 2.11" in text
    assert "1 faster, 1 slower, 1 noisy" in text
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "old"), str(tmp_path / "old")])
    assert compare.main() == 0


def test_compare_says_why_there_is_nothing_to_compare(tmp_path):
    """As a file, as it is called; status 2 and the file's name, whatever is wrong with it."""

    def compared(old, new):
        command = [PYTHON, compare.__file__, str(tmp_path / old), str(tmp_path / new)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    Store(tmp_path / "old", "a").add([row("v", **times(1, 2, 3))], {"revision": "r", "date": "d"})
    Store(tmp_path / "b", "a").add([row("w", **times(1, 2, 3))], {"revision": "r", "date": "d"})
    (tmp_path / "latin.json").write_bytes(b'{"runs": "\xe9"}')
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "a.json").write_text("{")
    (tmp_path / "empty.json").write_text(json.dumps({"runs": {}, "rows": [{}]}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text("[]")
    done = compared("old", "old/a.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 rows in both: 0 faster, 0 slower, 0 noisy" in done.stdout
    for new, message in (
        (
            "b",
            f"no row is in both, by op, case, dtype, variant, mode, threads: {tmp_path}/old begins",
        ),
        ("latin.json", "latin.json is no JSON: 'utf-8' codec can't decode"),
        ("cut", "a.json is no JSON: "),
        ("empty.json", "empty.json holds a row without case, dtype, op, status, variant"),
        ("other", "other holds no results of the bench"),
        ("none.json", "none.json"),
    ):
        done = compared("old", new)
        assert done.returncode == 2 and message in done.stderr, done
        assert "Traceback" not in done.stderr and not done.stdout


def test_smoke_fails_below_its_floor(monkeypatch, capsys):
    x = torch.rand(64)

    def pair():
        return (lambda: [x.exp() for _ in range(400)] and x.exp()), lambda: x.exp()

    monkeypatch.setattr(smoke, "PAIRS", {"network": pair})
    got, passed = smoke.check("network", 0.05, 2.0)
    assert isinstance(got, Ratio) and passed
    assert not smoke.check("network", 0.05, 1e6)[1]
    monkeypatch.setattr(smoke, "FLOORS", {"network": 1e6})
    monkeypatch.setattr(sys, "argv", ["smoke", "--seconds", "0.05"])
    assert smoke.main() == 1
    assert "SLOWER" in capsys.readouterr().out


def test_floors_of_the_smoke_stand_well_under_what_is_committed():
    folder = records.RESULTS / "cpu-amd-epyc-2-threads"

    def ms(op, case, variant):
        rows = load(folder / f"{op}.json")["rows"]
        key = case, variant, "measured"
        (found,) = (r for r in rows if (r["case"], r["variant"], r["status"]) == key)
        return found["p50_ms"]

    pairs = {
        "network": ("x4-64x64-b1", "eager-fp32", "ours-cpu-fp32"),
        "gcrb": (str(cases.GCRB_BENCH[0]), "folded", "cpu"),
    }
    committed = {
        op: ms(op, case, plain) / ms(op, case, ours) for op, (case, plain, ours) in pairs.items()
    }
    for name, floor in smoke.FLOORS.items():
        assert 1.2 < floor < 0.75 * committed[name], (name, committed[name])


def test_bench_command(capsys):
    sized = ["bench", "--device", "cpu", "--backend", "reference", "--size", "20x16"]
    assert cli.main([*sized, "--seconds", "0.05"]) == 0
    text = capsys.readouterr().out
    assert "20x16 plain, SDPA" in text and "20x16 EFRDNFast" in text
    assert "torch" in text.splitlines()[0] and "x [" in text


def test_report_makes_tables_from_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    run = {"revision": "abc", "date": "d", "device": "Some CPU", "isa": "AVX2"}
    run["versions"] = {"torch": "2.11"}
    rows = [
        {**row("sdpa", **times(9, 10, 11)), "baseline": "sdpa", "error": 1.5e-6},
        {**row("ours", **ratio(1.9, 2.0, 2.1)), "baseline": "sdpa", "error": None},
        {**row("loud", **ratio(1, 2, 9)), "status": "noisy", "baseline": "sdpa", "error": 1e-6},
        {**row("late", p50_ms=2500.0), "status": "modelled", "baseline": "sdpa"},
        {**row("gone"), "status": "not run", "baseline": "sdpa"},
    ]
    Store(tmp_path / "cpu-x", "a").add(rows, run)
    page = "before\n<!-- bench: network cpu-x a c -->\nold\n<!-- /bench -->\nafter\n"
    made = report.render_page(page, "../")
    assert "old" not in made and made.startswith("before\n") and made.endswith("after\n")
    assert "| `sdpa` | 10 ms | 1 | 1.5e-06 |" in made
    assert "| `ours` | 1 ms | 2.00x [1.90, 2.10] |  |" in made
    assert "| `late` | 2.50 s (modelled) |  |  |" in made
    assert "| `loud` | noisy |  | 1.0e-06 |" in made
    order = [made.index(f"`{name}`") for name in ("sdpa", "ours", "late", "loud")]
    assert order == sorted(order)
    assert "gone" not in made and "Some CPU, AVX2, torch 2.11, revision abc" in made
    assert report.render_page(made, "../") == made
    absent = report.render_page(page.replace("cpu-x", "cuda-nvidia-h200"), "")
    assert "Not measured: no results of `a` on cuda-nvidia-h200." in absent
    with pytest.raises(ValueError, match="expected TABLE DEVICE OP CASE"):
        report.render_page(page.replace(" a c", ""), "")
    with pytest.raises(ValueError, match="no table 'networks'"):
        report.render_page(page.replace("network", "networks"), "")


def test_sources_of_a_table_are_named_once(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    run = {"device": "Some CPU", "isa": "AVX2", "versions": {"torch": "2.11"}}
    names = ("one", "two", "three", "four", "five")
    for name, revision in zip(names, ("abc", "abc+", "def+", "abc", ""), strict=True):
        memory = {"peak_mib": 4.4, **times(1, 1, 1), "baseline": "none"}
        Store(tmp_path / "cpu-x", "a").add(
            [{**row(name, **memory), "status": "noisy" if name == "two" else "measured"}],
            {**run, "revision": revision, "date": name},
        )
    text = report.table("attention", "cpu-x", "a", "*")
    source = "Some CPU, AVX2, torch 2.11, revisions "
    assert f"\n{source}unknown, abc (partly +), def+ (" in text and text.count("Some CPU") == 1
    assert "| c | `one` | 1 ms |  | 4 MiB |" in text
    assert "| c | `two` | noisy |  |  |" in text


def test_tables_of_what_users_call(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    (tmp_path / "cpu-x").mkdir()
    run = {"device": "X", "versions": {"torch": "2"}, "revision": "abc"}
    rows = [
        {"setting": "4 segments", "size": "64x64", "source": "measured", "seconds": 0.1764},
        {"setting": "4 segments", "size": "960x540", "source": "modelled", "seconds": 516.0},
        {"setting": "576 tokens", "size": "64x64", "source": "measured", "seconds": 0.17},
    ]
    rows = [{**r, "peak_mib": m} for r, m in zip(rows, (31.2, 2765, None), strict=True)]
    (tmp_path / "cpu-x" / "segments.json").write_text(json.dumps({"run": run, "rows": rows}))
    text = report.table("segments", "cpu-x", "segments", "*")
    assert "| 64 x 64 | 0.176 s | 31 MiB | 0.17 s |  |" in text
    assert "| 960 x 540 | *8.6 min, modelled* | *2.7 GiB* | not measured |  |" in text
    rows = [
        {**what, "fast": fast, "median_s": 1.5 - fast, "peak_mib": 1234}
        for what in ({"what": "upscale", "size": [128, 128]}, {"what": "train"})
        for fast in (False, True)
    ]
    rows = [{"batch": 4, "patch": 32, **each} for each in rows]
    record = {"network": "N", "dtype": "float32", "threads": 2, "torch": "2", "command": "c"}
    (tmp_path / "cpu-x" / "foundation.json").write_text(json.dumps({**record, "rows": rows}))
    text = report.table("foundation", "cpu-x", "foundation", "*")
    cells = "1.5 s | 1,234 MiB | 0.5 s | 1,234 MiB |"
    assert f"| `upscale()` of 128 x 128 to 512 x 512 | {cells}" in text
    assert f"| training step, 4 patches of 32 x 32 | {cells}" in text
