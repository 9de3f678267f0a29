"""The choice of a backend: order, names, reasons, the one warning; environment variables."""

from __future__ import annotations

import ast
import contextvars
import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.utils.flop_counter

import efrdn_fast
from efrdn_fast import dispatch, env, flops, functional, ops
from efrdn_fast.errors import BackendUnavailable, BuildError
from efrdn_fast.testing import make_input

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def tier(backend: str, reason: str | None = None, **options) -> dispatch.Impl:
    return dispatch.Impl(backend, f"kernels.reference:{backend}", lambda device: reason, **options)


@pytest.fixture
def table(monkeypatch):
    """Puts a made-up row for the op `toy` into the table; caches are empty before and after."""

    def install(*impls: dispatch.Impl, fails_to_build: tuple[str, ...] = ()) -> None:
        def load(op: str, backend: str):
            if backend in fails_to_build:
                raise BuildError(f"{backend} does not compile")
            return print

        monkeypatch.setattr(dispatch, "IMPLS", {"toy": impls})
        monkeypatch.setattr(dispatch, "implementation", load)
        monkeypatch.setattr(dispatch, "_winners", dict)
        monkeypatch.setattr(env, "backend", lambda: "auto")
        monkeypatch.setattr(dispatch, "_warned", False)
        dispatch._resolve.cache_clear()

    yield install
    dispatch._resolve.cache_clear()


def pick(backend: str = "auto", device=CUDA, dtype=torch.float32) -> str:
    return dispatch._choose("toy", backend, device, dtype)


def test_auto_takes_the_first_tier_that_can_run(table):
    table(tier("reference"), tier("triton"), tier("cuda"), tier("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick() == "cuda"
        assert pick(device=CPU) == "cpu"
        assert pick(device=torch.device("meta")) == "reference"


def test_auto_warns_once_and_names_tier_reason_and_remedy(table):
    table(tier("cuda", "nvcc not found"), tier("triton"), tier("reference"))
    with pytest.warns(RuntimeWarning) as caught:
        assert pick() == "triton"
        assert pick(dtype=torch.bfloat16) == "triton"
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "toy runs on backend 'triton'" in message
    assert "cuda: nvcc not found" in message
    assert "`efrdn doctor`" in message


def test_auto_steps_down_after_a_failed_build(table):
    table(tier("cuda"), tier("triton"), tier("reference"), fails_to_build=("cuda",))
    with pytest.warns(RuntimeWarning, match="cuda does not compile"):
        assert pick() == "triton"


def test_a_missing_implementation_or_dtype_is_no_reason_to_warn(table):
    table(tier("cpu", dtypes=(torch.float32,)), tier("reference", dtypes=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick(device=CPU, dtype=torch.float64) == "reference"
        assert pick() == "reference"


def test_a_named_backend_runs_or_raises_its_reason(table):
    table(tier("cuda", "nvcc not found"), tier("triton"), tier("reference"))
    assert pick("reference") == "reference"
    with pytest.raises(BackendUnavailable, match=r"toy: backend 'cuda' cannot run: nvcc not found"):
        pick("cuda")
    with pytest.raises(
        BackendUnavailable, match=r"'cpu' has no implementation of it; cuda, triton"
    ):
        pick("cpu")


def test_a_named_backend_raises_when_its_build_fails(table):
    table(tier("cuda"), tier("reference"), fails_to_build=("cuda",))
    with pytest.raises(BackendUnavailable, match="cuda does not compile"):
        pick("cuda")


def test_a_named_backend_refuses_a_dtype_that_it_does_not_compute_in(table):
    table(tier("cpu"), tier("reference", dtypes=None))
    with pytest.raises(BackendUnavailable, match=r"it computes in float32.*got float64"):
        pick("cpu", CPU, torch.float64)


def test_an_unknown_backend_lists_the_names(table):
    table(tier("reference"))
    with pytest.raises(ValueError, match="one of auto, reference, triton, cuda, cpu; got 'gpu'"):
        pick("gpu")
    with (
        pytest.raises(ValueError, match="use_backend: backend must be one of"),
        efrdn_fast.use_backend("gpu"),
    ):
        pass


def test_use_backend_nests_and_leaves_other_contexts_alone(table, monkeypatch):
    table(tier("cuda"), tier("triton"), tier("reference"))
    outside = contextvars.copy_context()
    with efrdn_fast.use_backend("triton"):
        assert pick() == "triton"
        assert pick("cuda") == "cuda"
        assert outside.run(pick) == "cuda"
        with efrdn_fast.use_backend("reference"):
            assert pick() == "reference"
        assert pick() == "triton"
        monkeypatch.setattr(env, "backend", lambda: "reference")
        assert pick() == "triton"
    assert pick() == "reference"


def test_use_backend_auto_overrides_the_environment(table, monkeypatch):
    table(tier("cuda"), tier("reference"))
    monkeypatch.setattr(env, "backend", lambda: "reference")
    with efrdn_fast.use_backend("auto"):
        assert pick() == "cuda"


def test_the_committed_winner_comes_first(table, monkeypatch):
    table(tier("cuda"), tier("triton"), tier("reference"))
    monkeypatch.setattr(dispatch, "_winners", lambda: {"NVIDIA H200": {"toy": "triton"}})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert pick() == "triton"


def test_the_winners_file_names_known_ops_and_backends():
    for winners in dispatch._winners().values():
        for op, backend in winners.items():
            assert backend in {impl.backend for impl in dispatch.IMPLS[op]}


def test_backward_takes_the_backend_of_its_forward_where_it_can(table):
    table(tier("cuda"), tier("triton"), tier("reference"))
    assert dispatch.choose_backward("toy", "triton", CUDA, torch.float32) == "triton"
    table(tier("reference"))
    assert dispatch.choose_backward("toy", "triton", CUDA, torch.float32) == "reference"


def test_every_entry_of_the_table_names_a_function_that_exists():
    """Read from the source: Triton is not imported, it may not be installed."""
    functions = {}
    for op, impls in dispatch.IMPLS.items():
        assert impls[-1].backend == "reference"
        assert callable(dispatch.implementation(op, "reference"))
        for impl in impls:
            assert impl.backend in env.BACKENDS
            module, function = impl.target.split(":")
            assert function.startswith(op)
            if module not in functions:
                source = Path(importlib.util.find_spec(f"efrdn_fast.{module}").origin)
                tree = ast.parse(source.read_text(encoding="utf-8"))
                functions[module] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert function in functions[module], impl.target


def test_triton_says_why_not_on_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in dispatch.WHY_NOT["triton"](CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.WHY_NOT["triton"](CPU) is None
    assert "got one on cpu" in dispatch.WHY_NOT["cuda"](CPU)
    assert "got one on cuda:0" in dispatch.WHY_NOT["cpu"](CUDA)


def test_backends_lists_all_with_reasons():
    rows = efrdn_fast.backends()
    assert [row.backend for row in rows] == ["cuda", "triton", "cpu", "reference"]
    assert rows[-1].available and set(rows[-1].ops) == set(dispatch.IMPLS)
    assert all(row.available != bool(row.reason) for row in rows)
    lines = repr(rows).splitlines()
    assert lines[-1].split() == ["reference", "yes"]
    if not torch.cuda.is_available():
        assert lines[0].split(maxsplit=1) == ["cuda", "no: torch sees no CUDA device"]


def test_use_backend_reaches_the_ops():
    x, weight, bias = make_input((1, 4, 3, 3)), torch.randn(4, 4, 3, 3), torch.randn(4)
    with (
        efrdn_fast.use_backend("cuda"),
        pytest.raises(BackendUnavailable, match=r"^acrb: .*'cuda'"),
    ):
        functional.acrb(x, weight, bias)
    with efrdn_fast.use_backend("reference"):
        assert functional.acrb(x, weight, bias).shape == x.shape


@pytest.fixture
def fresh_env():
    env.backend.cache_clear()
    yield
    env.backend.cache_clear()


def test_env_backend(monkeypatch, fresh_env):
    monkeypatch.delenv("EFRDN_FAST_BACKEND", raising=False)
    assert env.backend() == "auto"
    env.backend.cache_clear()
    monkeypatch.setenv("EFRDN_FAST_BACKEND", "triton")
    assert env.backend() == "triton"
    env.backend.cache_clear()
    monkeypatch.setenv("EFRDN_FAST_BACKEND", "opencl")
    with pytest.raises(ValueError, match=r"EFRDN_FAST_BACKEND must be auto, .*'opencl'"):
        env.backend()


def test_env_folders(monkeypatch, tmp_path):
    for name in ("EFRDN_FAST_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / "efrdn_fast"
    monkeypatch.setenv("EFRDN_FAST_CACHE_DIR", str(tmp_path / "builds"))
    assert env.cache_dir() == tmp_path / "builds"
    file = tmp_path / "file"
    file.touch()
    for name, read in (
        ("EFRDN_FAST_CACHE_DIR", env.cache_dir),
        ("EFRDN_FAST_DATA", env.data_dir),
    ):
        monkeypatch.setenv(name, str(file))
        with pytest.raises(ValueError, match=f"{name} must be a"):
            read()
    monkeypatch.setenv("EFRDN_FAST_DATA", str(tmp_path))
    assert env.data_dir() == tmp_path
    monkeypatch.delenv("EFRDN_FAST_DATA")
    assert env.data_dir() is None


@pytest.mark.parametrize(("value", "verbose"), [("0", False), ("1", True), ("", False)])
def test_env_verbose_build(monkeypatch, value, verbose):
    monkeypatch.setenv("EFRDN_FAST_VERBOSE_BUILD", value)
    assert env.verbose_build() is verbose
    monkeypatch.setenv("EFRDN_FAST_VERBOSE_BUILD", "yes")
    with pytest.raises(ValueError, match="EFRDN_FAST_VERBOSE_BUILD must be 0 or 1, got 'yes'"):
        env.verbose_build()


IMPORTS = """
import importlib, json, sys
seen = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    seen[name] = sorted(sys.modules)
import torch.utils.flop_counter
seen["formula"] = torch.ops.efrdn_fast.gcrb in torch.utils.flop_counter.flop_registry
print(json.dumps(seen))
"""
FAST = {"efrdn_fast.dispatch", "efrdn_fast.functional", "efrdn_fast.ops", "efrdn_fast.kernels"}
# What each import may not have loaded, in an order in which each needs more than the one before.
ABSENT = {
    "efrdn_fast": {"torch", "triton", "numpy"},
    "efrdn_fast.env": {"torch", "triton", "numpy"},
    "efrdn_fast.reference": {"triton", *FAST},
    "efrdn_fast.model": {"triton", *FAST},
    "efrdn_fast.dispatch": {"triton", "efrdn_fast.functional", "efrdn_fast.ops"},
    "efrdn_fast.functional": {"triton", "torch._dynamo", "torch.utils.flop_counter"},
}


def test_import_direction():
    """fast -> functional -> dispatch -> kernels; the reference and the model import none of it."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *ABSENT],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    seen = json.loads(done.stdout)
    for module, absent in ABSENT.items():
        assert module in seen[module]
        assert not absent & set(seen[module]), module
    assert seen["formula"], "the flop counter, imported after the ops, does not know them"


def test_flop_formulas_register_with_a_counter_that_is_already_there(monkeypatch):
    registry = {}
    monkeypatch.setattr(torch.utils.flop_counter, "flop_registry", registry)
    flops.register_when_needed()
    assert set(registry) == {getattr(torch.ops.efrdn_fast, op) for op in ops.SCHEMAS}


def test_kernel_passes_the_arguments_of_the_launcher(monkeypatch):
    """Without `backend`, and without the `taps` that only FLOP counting reads."""
    seen = []
    tensor = make_input((1, 2, 3, 3))
    monkeypatch.setattr(dispatch, "implementation", lambda op, backend: lambda *a: seen.append(a))
    ops._kernel("toy")(tensor, 3, "reference")
    ops._kernel("toy")([tensor], 3, "reference", taps=15)
    assert seen == [(tensor, 3), ([tensor], 3)]
