"""The C++ CPU kernels in every instruction set of this machine, and what only they promise."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch
from efrdn_fast.kernels import _build, _plan, _toolchain, native

from efrdn_fast import cases, reference
from efrdn_fast.testing import check_backward, check_forward, make_input

REASON = _plan.missing("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend cpu: {REASON}")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = ("generic", "avx2", "avx512") if _toolchain.is_x86() else ("generic",)
CSRC = Path(__file__).resolve().parent.parent / "csrc"

ALL = [(case, torch.float32) for case in (*cases.GCRB, *cases.ACRB)]
HALF = [(case, d) for case in (*cases.GCRB[6:8], *cases.ACRB[5:8]) for d in DTYPES[1:]]
MORE = [
    cases.GcrbCase((1, 32, 3, 16)),
    cases.GcrbCase((1, 32, 2, 48)),
    cases.GcrbCase((1, 64, 5, 33)),
    cases.GcrbCase((1, 17, 6, 9), groups=1, mid=5),
    cases.AcrbCase((1, 9, 3, 48)),
    cases.AcrbCase((1, 40, 5, 18), width=32, start=8),
    cases.AcrbCase((2, 3, 4, 6), width=1, start=2),
]
ALL += [(case, torch.float32) for case in MORE]


TRAIN = [(case, torch.float32) for case in cases.GCRB_TRAIN]
TRAIN += [(cases.GcrbTrainCase((1, 17, 6, 9), groups=1, mid=5), torch.float32)]
TRAIN += [(cases.GCRB_TRAIN[2], dtype) for dtype in DTYPES[1:]]


def ident(value: object) -> str | None:
    return str(value).removeprefix("torch.") if not isinstance(value, tuple) else None


def ext():
    _build.load("cpu")
    return torch.ops.efrdn_fast_ext


@pytest.fixture(params=ISAS)
def isa(request):
    """The kernels of one instruction set serve."""
    before = ext().cpu_isa()
    try:
        ext().use_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert ext().cpu_isa() == request.param
    yield request.param
    ext().use_cpu_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), ALL + HALF, ids=ident)
def test_forward(isa, case, dtype):
    check_forward(case, dtype, "cpu", "cpu")


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), ALL + HALF, ids=ident)
def test_backward(isa, case, dtype):
    check_backward(case, dtype, "cpu", "cpu")


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), TRAIN, ids=ident)
def test_train_forward(isa, case, dtype):
    check_forward(case, dtype, "cpu", "cpu")


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), TRAIN, ids=ident)
def test_train_backward(isa, case, dtype):
    check_backward(case, dtype, "cpu", "cpu")


def test_batch_statistics_of_a_map_far_from_zero():
    """Mean 1,000 times the deviation: sums of squares would lose all digits of the variance."""
    x, *rest, groups, eps = cases.GCRB_TRAIN[4].args()
    x = x + 1000
    _, mean, var = native.gcrb_train_cpu(x, *rest, groups, eps)
    double = [t.double() for t in rest]
    _, exact_mean, exact_var = reference.gcrb_train(x.double(), *double, groups=groups, eps=eps)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-3, atol=0)


def test_best_instruction_set_is_taken():
    flags = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    needs = {"avx512bf16": "avx512_bf16", "avx512": "avx512bw", "avx2": "avx2"}
    best = next((isa for isa, flag in needs.items() if flag in flags), None)
    if not _toolchain.is_x86() or best is None:
        pytest.skip("not an x86 Linux machine with AVX2")
    assert ext().cpu_isa() == best


def test_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match="this CPU runs up to"):
        ext().use_cpu_isa("sse9")


@pytest.mark.parametrize(
    "case", [cases.GCRB[6], cases.ACRB[5], cases.AcrbCase((1, 32, 67, 512))], ids=str
)
def test_results_do_not_depend_on_threads(threads, case):
    *args, last = case.args()
    forward, backward = (getattr(native, f"{case.op}{s}_cpu") for s in ("", "_backward"))
    runs = []
    for count in (1, 2, 3):
        threads(count)
        y = forward(*args, last)
        runs.append((y, *backward(y, *args, last)))
    for each in zip(*runs, strict=True):
        assert all(torch.equal(each[0], other) for other in each[1:])


def test_training_does_not_depend_on_threads(threads):
    args = cases.GCRB_TRAIN[4].args()
    *tensors, groups, eps = args
    runs = []
    for count in (1, 2, 3):
        threads(count)
        y, mean, var = native.gcrb_train_cpu(*args)
        grads = native.gcrb_train_backward_cpu(y, *tensors, mean, var, groups, eps)
        runs.append((y, mean, var, *grads))
    for each in zip(*runs, strict=True):
        assert all(torch.equal(each[0], other) for other in each[1:])


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_acrb_out_writes_its_channels_only(isa, layout, dtype):
    x, weight, bias, start = cases.ACRB[4].args(dtype)
    n, _, h, w = x.shape
    out = make_input((n, 59, h, w), dtype, layout=layout)
    before = out.clone()
    native.acrb_out_cpu(x, weight, bias, start, out, 18)
    assert torch.equal(out[:, 18:27], native.acrb_cpu(x, weight, bias, start))
    assert torch.equal(out[:, :18], before[:, :18]) and torch.equal(out[:, 27:], before[:, 27:])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=ident)
def test_every_finite_half_value_survives(isa, dtype):
    """With zero weights y = x: all 2^16 patterns go through load and store."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = torch.where(values.isfinite(), values, 0)
    x = values.view(1, 32, 1, 2048).to(memory_format=torch.channels_last)
    zero = [torch.zeros(s) for s in ((8, 16, 1, 1), 8, (8, 1, 3, 3), 8, (32, 4, 1, 1), 32)]
    assert torch.equal(native.gcrb_cpu(x, *zero, 2), x)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=ident)
def test_rounding_to_nearest_even(isa, dtype):
    """y = x + b3 in float32, rounded once: ties, subnormals and overflow as PyTorch rounds."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**15), 2**15, (1, 32, 4, 64), generator=generator, dtype=torch.int16)
    x = bits.view(dtype)
    x = torch.where(x.isfinite(), x, 0).to(memory_format=torch.channels_last)
    zero = [torch.zeros(s) for s in ((8, 16, 1, 1), 8, (8, 1, 3, 3), 8, (32, 4, 1, 1))]
    scale = torch.tensor([2.0**-26, 2.0**-25, 1e-6, 0.5, 1.0, 3.0, 16.0, 1e3]).repeat(4)
    y = native.gcrb_cpu(x, *zero, scale, 2)
    assert torch.equal(y, (x.float() + scale.view(1, 32, 1, 1)).to(dtype))


@pytest.mark.parametrize("case", [cases.GCRB[3], cases.ACRB[2]], ids=str)
def test_nan_spreads_as_in_the_reference(isa, case):
    x, *rest = case.args()
    x[0, 25, 0, 0] = torch.nan
    y = getattr(native, f"{case.op}_cpu")(x, *rest)
    assert torch.equal(y.isnan(), case.reference(x, *rest).isnan())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_acrb_of_a_row_that_is_not_finite(isa, value):
    """Rows go in pairs, a batch of two has an odd number: each place in a pair."""
    x, weight, bias, start = cases.AcrbCase((2, 32, 7, 35)).args()
    for row in range(7):
        changed = x.clone(memory_format=torch.preserve_format)
        changed[row % 2, 25, row, 17] = value
        y = native.acrb_cpu(changed, weight, bias, start)
        exact = changed.double(), weight.double(), bias.double(), start
        expected = cases.AcrbCase.reference(*exact)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gcrb_cpu", lambda a: [*a[:-1], 3], "groups=3 must divide"),
        ("gcrb_cpu", lambda a: [*a[:3], a[3][:4], *a[4:]], "w2 must have 72 values, got 36"),
        ("gcrb_cpu", lambda a: [a[0].double(), *a[1:]], "must be float32"),
        ("gcrb_backward_cpu", lambda a: [a[0][:, :8], *a], "grad_y must have"),
        ("acrb_cpu", lambda a: [*a[:-1], 24], "start=24 and 9 channels do not fit"),
        ("acrb_cpu", lambda a: [a[0], a[1], a[2][:4], a[3]], "got 729 and 4 values"),
        ("acrb_backward_cpu", lambda a: [a[0], *a], "grad_y must have"),
    ],
)
def test_what_would_touch_foreign_memory_is_refused(name, change, message):
    case = cases.GCRB[3] if name.startswith("gcrb") else cases.ACRB[1]
    with pytest.raises(RuntimeError, match=message):
        getattr(native, name)(*change(list(case.args())))


@pytest.mark.parametrize("which", ["best", "portable"])
def test_kernels_stay_inside_their_memory(which, tmp_path):
    """Every buffer, working memory included, ends or begins at a page that cannot be touched."""
    best = ext().cpu_isa() if which == "best" else "generic"
    isa = best.removesuffix("bf16")
    cxx = _toolchain.host_compiler()
    kernels = [p for p in sorted(CSRC.glob("*_cpu.cpp")) if not p.name.startswith("ops_")]
    program = tmp_path / "cpu_guard"

    def flags(isa: str) -> list[str]:
        return ["-O1", "-std=c++17", f"-DEFRDN_FAST_ISA={isa}", f"-I{CSRC}", *_plan._ISAS[isa]]

    guard = [Path(__file__).parent / "cpu_guard.cpp"]
    if best != isa:
        (own,) = (p for p in kernels if "_bf16_" in p.name)
        bf16 = tmp_path / "bf16.o"
        subprocess.run([*cxx, "-c", *flags(best), own, "-o", bf16], check=True)
        guard += [bf16, "-DGUARD_BF16"]
    sources = [*guard, *(p for p in kernels if "_bf16_" not in p.name)]
    subprocess.run([*cxx, *flags(isa), *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode} at: {done.stdout[-300:]}"
    assert "cases inside their memory" in done.stdout
    broken = subprocess.run([program, "break"], capture_output=True, text=True)
    assert broken.returncode < 0, "a kernel that has too little memory is seen"
