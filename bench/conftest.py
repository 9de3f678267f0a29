"""`pytest bench/`: every bench checks its result first, then measures; the table comes last.

All variants of a case are timed in turns (A B C A B C ...). Rows go to
`bench/results/<device>/<op>.csv` and `.json`; `--benchmark-json` writes pytest-benchmark's form.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness import provenance, summary
from bench.harness.session import Session, Subject
from bench.harness.work import counted, largest_error
from efrdn_fast import dispatch

BASELINE = "folded"
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("efrdn_fast benches")
    group.addoption("--full", action="store_true", help="all sizes and dtypes, torch.compile")
    group.addoption("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    group.addoption("--seconds", type=float, default=4.0, help="time per case (default: 4)")
    group.addoption(
        "--cap",
        type=float,
        default=20.0,
        help="seconds that a variant may take per case, else it is modelled (default: 20)",
    )
    group.addoption("--variants", default="", help="comma-separated; the baseline always runs")
    group.addoption(
        "--results",
        type=Path,
        default=provenance.RESULTS,
        help="folder of the results (default: bench/results)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(
        _device(config),
        full=config.getoption("full"),
        seconds=config.getoption("seconds"),
        cap=config.getoption("cap"),
        results=config.getoption("results"),
        only=filter(None, config.getoption("variants").split(",")),
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if session.rows:
        for line in summary.lines(session):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def harness(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[list[float]], None]:
    """Hands samples (seconds) to pytest-benchmark, for its table; nothing where it is missing."""
    if not request.config.pluginmanager.has_plugin("benchmark"):
        return lambda seconds: None
    benchmark = request.getfixturevalue("benchmark")

    def replay(seconds: list[float]) -> None:
        clock = iter([0.0, *(t for s in seconds for t in (s, 0.0))])
        benchmark._timer = lambda: next(clock)
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return replay


@pytest.fixture
def compare(harness: Session, show: Callable) -> Callable:
    """compare(key, subject, variant): check, measure and show one variant of a subject."""

    def run(key: Any, subject: Callable[[], Subject], variant: str) -> None:
        got = harness.outcome(key, subject, variant)
        if got.status == "not run":
            pytest.skip(f"not run: {got.note}")
        if got.status in ("wrong", "failed"):
            pytest.fail(f"no figure: {got.note}", pytrace=False)
        samples = next(iter(got.samples.values()), [])
        if got.status == "measured" and samples:
            show(samples)

    return run


@pytest.fixture
def bench(compare: Callable) -> Callable:
    """bench(op, case, dtype, variant, variants, args): one variant of an op.

    `variants()` makes {name: call}; `moved` is the least number of bytes, where not all of every
    argument is needed.
    """

    def run(op, case, dtype, variant, variants, args, moved=None):
        def subject() -> Subject:
            plain, work = counted(case.reference, args, dtype, moved)
            exact, _ = counted(case.reference, args, torch.float64)
            calls = variants()
            return Subject(
                op,
                str(case),
                {name: lambda call=call: call for name, call in calls.items()},
                lambda name, out: largest_error(name, out, exact, plain),
                BASELINE,
                lambda name: str(dtype).removeprefix("torch."),
                work,
            )

        compare((op, case, dtype), subject, variant)

    return run


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases, dtypes and variants of a bench: its module's CASES or `cases_of(full)`, and `names`.

    A backend of the op that cannot run here gets a skipped bench that says why.
    """
    if "variant" not in metafunc.fixturenames:
        return
    module, config = metafunc.module, metafunc.config
    device, full = _device(config), config.getoption("full")
    cases = module.cases_of(full) if hasattr(module, "cases_of") else module.CASES
    names = module.names(device, full)
    metafunc.parametrize("case", cases, ids=str)
    if "dtype" in metafunc.fixturenames:
        dtypes = [torch.float32, torch.bfloat16] if full else [torch.float32]
        metafunc.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))
        names += _absent(getattr(cases[0], "op", None), names, device)
    metafunc.parametrize("variant", names)


def _absent(op: str | None, names: list[str], device: torch.device) -> list[Any]:
    reasons = {
        impl.backend: impl.why_not(device)
        for impl in (dispatch.implementations(op) if op in dispatch.IMPLS else ())
        if impl.backend not in names and impl.backend != "reference"
    }
    return [
        pytest.param(name, marks=pytest.mark.skip(reason=f"not run: {name}: {reason}"))
        for name, reason in reasons.items()
    ]
