"""Sizes: every figure of the architecture's tables, and the paper's rows beside them."""

from __future__ import annotations

import argparse
from decimal import Decimal

import pytest
import torch

from efrdn_fast import EFRDN, checkpoint
from efrdn_fast.commands import info
from efrdn_fast.config import EFRDNConfig
from efrdn_fast.counts import LR_SIZES, Cost, count, count_parameters
from efrdn_fast.tables import SizeRow, agreement, paper_tables, render, size_rows

PIXELS = 320 * 180


@pytest.fixture(scope="module")
def full() -> Cost:
    return count(EFRDNConfig())


def part(cost: Cost, *names: str) -> Cost:
    for name in names:
        cost = next(inner for inner in cost.parts if inner.name == name)
    return cost


def test_whole_network(full):
    assert full.parameters == 767_938
    assert full.conv == 27_915_070_976
    assert full.linear == 26_276_659_200
    assert full.attention == 477_757_440_000
    assert full.total == 531_949_170_176
    assert full.conv / PIXELS == pytest.approx(484_637, abs=0.5)
    assert count_parameters(EFRDN()) == full.parameters


@pytest.mark.parametrize(("scale", "parameters"), [(2, 747_130), (3, 755_800), (4, 767_938)])
def test_scales(scale, parameters):
    cost = count(EFRDNConfig(scale=scale))
    assert cost.parameters == parameters
    width, height = LR_SIZES[scale]
    assert (width * scale, height * scale) == (1278 if scale == 3 else 1280, 720)


def test_sixteen_segments():
    cost = count(EFRDNConfig(segments=16))
    assert cost.attention == 119_439_360_000
    assert cost.total == pytest.approx(173.6e9, abs=0.05e9)


def test_training_patch():
    cost = count(EFRDNConfig(), 48, 48)
    assert cost.attention == pytest.approx(0.76e9, abs=0.005e9)
    assert cost.linear == pytest.approx(1.05e9, abs=0.005e9)
    assert cost.conv == pytest.approx(1.12e9, abs=0.005e9)


@pytest.mark.parametrize(
    ("segments", "segment_tokens", "lengths"),
    [(4, None, [5] * 4), (3, None, [7, 7, 6]), (50, None, [1] * 20), (4, 8, [8, 8, 4])],
)
def test_attention_counts_every_segment(segments, segment_tokens, lengths):
    config = EFRDNConfig(segments=segments, segment_tokens=segment_tokens)
    cost = count(config, 5, 4)
    assert cost.attention == 2 * 2 * 144 * sum(length**2 for length in lengths)


# Parameters and conv MACs per LR pixel and call.
PARTS = {
    ("head",): (896, 864),
    ("acdm.0",): (123_121, 105_807.16),
    ("gconv.0",): (1_344, 1_312),
    ("trans.0",): (229_968, 0),
    ("tconv.1",): (9_248, 9_216),
    ("reconstruct_deep",): (9_248 + 13_872, 9_216 + 13_824),
    ("reconstruct_shallow",): (13_872, 13_824),
    ("acdm.1", "refine.0"): (6_656, 6_624),
    ("acdm.1", "acrb.2"): (1_233, 1_215),
    ("acdm.1", "fflb.0"): (21_332, 15_674.72),
    ("acdm.1", "conv4"): (9_248, 9_216),
    ("acdm.1", "fuse"): (17_024, 16_992),
    ("acdm.1", "mscc"): (9_186, 9_058),
    ("acdm.0", "mscc", "scsa"): (4_578, 4_578),
    ("acdm.0", "mscc", "scca"): (4_608, 4_480),
    ("acdm.0", "fflb.1", "gcrb1"): (424, 328),
    ("acdm.0", "fflb.1", "esa2"): (2_960, 760.35),
    ("acdm.0", "fflb.1", "cc_b2"): (162, 0),
    ("acdm.0", "fflb.1", "effb"): (13_914, 13_498),
    ("trans.0", "norm1"): (576, 0),
    ("trans.0", "emha", "reduce"): (41_472, 0),
    ("trans.0", "emha", "qkv"): (62_208, 0),
    ("trans.0", "emha", "proj"): (41_760, 0),
    ("trans.1", "mlp", "fc1"): (41_616, 0),
    ("trans.1", "mlp", "fc2"): (41_760, 0),
}


@pytest.mark.parametrize("names", PARTS, ids=".".join)
def test_parts(full, names):
    cost = part(full, *names)
    parameters, macs = PARTS[names]
    assert cost.parameters == parameters
    assert cost.conv / cost.calls / PIXELS == pytest.approx(macs, abs=0.03)


def test_parts_add_up(full):
    def check(cost: Cost) -> None:
        if cost.parts:
            assert cost.conv == sum(inner.conv for inner in cost.parts)
            assert cost.total >= cost.conv + cost.linear
            for inner in cost.parts:
                check(inner)

    check(full)
    assert part(full, "acdm.0").calls == 2
    assert part(full, "trans.0").linear == 228_096 * PIXELS


# Table, row -> obtained parameters (K), M-Adds (G), agreement of both.
ROWS = {
    ("1", "x2, x4 network at 640x360"): ("767.938", "111.683", "r", "t"),
    ("1", "x2, true tail"): ("747.130", "106.905", "-20.870", "-4.695"),
    ("1", "x3, x4 network at 426x240"): ("767.938", "49.554", "r", "t"),
    ("1", "x3, true tail"): ("755.800", "48.318", "-12.200", "-1.182"),
    ("1", "x4"): ("767.938", "27.915", "t", "ok"),
    ("2", "IMDB, 2 shared blocks"): ("573.876", "9.480", "-63.124", "-0.320"),
    ("2", "IMDB, 4 blocks"): ("626.056", "9.480", "-10.944", "-0.320"),
    ("2", "RFDB, 2 shared blocks"): ("599.680", "11.970", "-88.320", "-1.030"),
    ("2", "RFDB, 4 blocks"): ("677.664", "11.970", "-10.336", "-1.030"),
    ("2", "ACDM"): ("767.938", "27.915", "+117.938", "ok"),
    ("3", "no_acrb_bn"): ("760.540", "27.075", "r", "t"),
    ("3", "acrb_to_conv3x3"): ("764.968", "27.579", "+3.968", "+0.579"),
    ("3", "no_fflb"): ("639.946", "17.081", "r", "t"),
    ("3", "no_mscc"): ("749.566", "25.828", "r", "ok"),
    ("3", "full"): ("767.938", "27.915", "r", "ok"),
    ("4", "no_gcrb"): ("762.850", "27.462", "+0.010", "+0.012"),
    ("4", "no_effb"): ("684.454", "18.585", "r", "t"),
    ("4", "no_cc"): ("764.050", "27.915", "t", "ok"),
    ("4", "full"): ("767.938", "27.915", "ok", "ok"),
    ("5", "no_cnn_dense"): ("767.938", "27.915", "ok", "ok"),
    ("5", "no_transformer_dense"): ("767.938", "27.915", "ok", "ok"),
    ("5", "no_dense"): ("767.938", "27.915", "ok", "ok"),
    ("5", "full"): ("767.938", "27.915", "ok", "ok"),
}


@pytest.fixture(scope="module")
def rows() -> tuple[SizeRow, ...]:
    return size_rows()


def test_every_size_row(rows):
    obtained = {
        (row.table, row.row): (
            f"{row.parameters / 1e3:.3f}",
            f"{row.multi_adds / 1e9:.3f}",
            row.parameters_agree,
            row.multi_adds_agree,
        )
        for row in rows
    }
    assert obtained == ROWS


def test_published_digits_are_kept(rows):
    printed = {(row.table, row.row): (str(row.published_k), str(row.published_g)) for row in rows}
    assert printed["1", "x2, true tail"] == ("768", "111.6")
    assert printed["3", "no_fflb"] == ("640", "17.0")
    assert printed["4", "no_cc"] == ("764.0", "27.9")


@pytest.mark.parametrize(
    ("published", "obtained", "mark"),
    [
        ("27.9", "27.915", "ok"),
        ("27.9", "27.96", "t"),
        ("28.0", "27.96", "r"),
        ("767", "767.938", "t"),
        ("764.0", "764.05", "t"),
        ("764.1", "764.05", "r"),
        ("27.45", "27.462", "+0.012"),
        ("13", "11.97", "-1.030"),
    ],
)
def test_agreement(published, obtained, mark):
    assert agreement(Decimal(published), Decimal(obtained)) == mark


def test_paper_tables_are_complete():
    tables = paper_tables()
    for scale in ("x2", "x3", "x4"):
        assert {"Set5", "Set14", "BSD100", "Urban100", "Manga109"} < set(
            tables["table1"][scale]["EFRDN"]
        )
    assert tables["table1"]["x4"]["EFRDN"]["Set5"] == [Decimal("32.33"), Decimal("0.8964")]


def test_too_small_an_image():
    with pytest.raises(ValueError, match=r"at least 3, got \[3, 2\]"):
        count(EFRDNConfig(), 2, 3)


def test_render():
    text = render(("name", "n"), [("a", "10"), ("long name", "2")])
    assert text.splitlines() == [
        "name        n",
        "---------  --",
        "a          10",
        "long name   2",
    ]


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    return info.run(parser.parse_args(arguments))


def test_info(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    for figure in ("767,938", "27.915 G", "531.949 G", "14,400 of 57,600 tokens"):
        assert figure in out
    assert "ACDM x 2, used 2 times each" in out
    assert "gcrb1 gcrb2 (GCRB) x 12" in out


def test_info_options(capsys):
    run("-s", "2", "--size", "48x40", "--segment-tokens", "64", "--depth", "0")
    out = capsys.readouterr().out
    assert "LR 48x40 -> 96x80" in out
    assert "segments of 64 of 1,920 tokens" in out
    assert "747,130" in out
    assert "head" not in out
    run("--module", "imdb")
    assert "626,056" in capsys.readouterr().out
    run("--ablation", "no_effb")
    assert "684,454" in capsys.readouterr().out


def test_info_tables(capsys):
    assert run("--tables") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line[:1] in "12345" for line in lines if line) == len(ROWS)
    row = next(line for line in lines if "no_gcrb" in line)
    assert row.split() == [
        "4", "no_gcrb", "762.84K", "762.850K", "+0.010", "27.45G", "27.462G", "+0.012",
    ]  # fmt: skip


def test_info_of_a_checkpoint(tmp_path, capsys):
    torch.manual_seed(0)
    net = EFRDN(scale=3, channels=16, distilled=5)
    record = {"steps": 40, "data": {"folder": "photos", "images": 7}}
    path = checkpoint.save(net, tmp_path / "net.safetensors", record)
    run(str(path))
    out = capsys.readouterr().out
    for line in ("  scale: 3", "  channels: 16", "  steps: 40", "    folder: photos"):
        assert line in out.splitlines()
    assert f"{count_parameters(net):,}" in out
    with pytest.raises(ValueError, match="a checkpoint fixes scale"):
        run(str(path), "-s", "2")
    run(str(path), "--segments", "8")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    run(str(tmp_path / "net.pth"))
    assert "training: no record" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["48", "2x9", "ax3", "48x-3"])
def test_info_rejects_sizes(size, capsys):
    with pytest.raises(SystemExit):
        run("--size", size)
    assert "WIDTHxHEIGHT" in capsys.readouterr().err
