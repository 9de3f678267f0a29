"""What a packed call of EFRDNFast asks of the host."""

import torch

from bench.host import packed_ops, thread_seconds
from efrdn_fast import EFRDNFast


def test_nothing_is_copied_that_a_view_could_give():
    net = EFRDNFast(2, channels=16, distilled=5, ablation="no_effb", dtype="fp32").eval()
    ops = packed_ops(net, torch.rand(1, 3, 6, 7))
    copies = {op for op in ops if "copy" in op or "clone" in op or "contiguous" in op}
    assert copies <= {"aten.copy_.default"}  # parts go to where they are joined; nothing is cloned
    assert ops["view"] > 0 and ops["efrdn_fast.gcrb.default"] == 24


def test_times_are_of_the_calling_thread():
    seconds = thread_seconds({"one": lambda: None, "two": lambda: sum(range(20_000))})
    assert len(seconds["one"]) == len(seconds["two"]) > 1
    assert max(seconds["one"]) < min(seconds["two"])
