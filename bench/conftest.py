"""`pytest bench/`: every bench checks its result first, then measures; the table comes last.

All variants of a case are timed in turns (A B C A B C ...). Rows go to
`bench/results/<device>/<op>.csv` and `.json`; `--benchmark-json` writes pytest-benchmark's form.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.harness import collect, provenance, summary
from bench.harness.session import Session, Subject
from efrdn_fast.device import resolve_device

SESSION = pytest.StashKey[Session]()
KNOWN = pytest.StashKey[set[str]]()


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
    for name in ("seconds", "cap"):
        if not config.getoption(name) > 0:
            raise pytest.UsageError(f"--{name} must be positive, got {config.getoption(name)}")
    try:
        device = resolve_device(config.getoption("device"))
    except ValueError as error:
        raise pytest.UsageError(f"--device: {error}") from error
    config.stash[KNOWN] = set()
    config.stash[SESSION] = Session(
        device,
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
def show(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Hands samples (seconds) to pytest-benchmark, for its table and JSON; else does nothing.

    The variants of a case are one group of the table.
    """
    if not request.config.pluginmanager.has_plugin("benchmark"):
        return lambda seconds, **extra: None
    benchmark = request.getfixturevalue("benchmark")
    params = request.node.callspec.params
    shown = [request.node.originalname, *(str(params[k]) for k in ("case", "dtype") if k in params)]
    benchmark.group = " ".join(shown)

    def replay(seconds: list[float], **extra: Any) -> None:
        benchmark.extra_info |= extra
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
        for mode, samples in list(got.samples.items())[:1]:
            if got.status == "measured":
                show(samples, mode=mode, first_s=got.first, peak_bytes=got.peak, error=got.error)

    return run


@pytest.fixture
def bench(compare: Callable, request: pytest.FixtureRequest) -> Callable:
    """bench(op, case, dtype, variant, calls, args, work): one variant of an op.

    `calls()` makes {name: call}.
    """
    base = collect.baseline(request.module)

    def run(op, case, dtype, variant, calls, args, work):
        made = lambda: collect.kernel_subject(op, case, dtype, calls(), args, work, base)  # noqa: E731
        compare((op, case, dtype), made, variant)

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases, dtypes and variants of a bench; one that cannot run here is skipped and says why."""
    if "variant" not in metafunc.fixturenames:
        return
    module, session = metafunc.module, metafunc.config.stash[SESSION]
    metafunc.parametrize("case", collect.cases(module, session.full), ids=str)
    if "dtype" in metafunc.fixturenames:
        kinds = collect.dtypes(session.full)
        metafunc.parametrize("dtype", kinds, ids=lambda d: str(d).removeprefix("torch."))
    found = collect.variants(module, session.device, session.full)
    metafunc.config.stash[KNOWN] |= {*found, *module.names(session.device, True)}
    base = collect.baseline(module)
    wanted = {name: reason for name, reason in found.items() if session.wants(name, base)}
    metafunc.parametrize("variant", [_param(name, reason) for name, reason in wanted.items()])


def _param(name: str, reason: str | None) -> Any:
    marks = [pytest.mark.skip(reason=f"not run: {name}: {reason}")] if reason else []
    return pytest.param(name, marks=marks)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known, only = config.stash[KNOWN], config.stash[SESSION].only
    if items and only - known:
        raise pytest.UsageError(
            f"--variants: no bench here has {', '.join(sorted(only - known))}; "
            f"there are {', '.join(sorted(known))}"
        )
