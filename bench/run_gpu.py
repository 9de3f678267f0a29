"""All GPU checks and measurements in one call of bounded time.

    EFRDN_FAST_DATA=... python bench/run_gpu.py --out DIR [--minutes 9] [--only STEP ...]

Needs the repository and an installed torch; what else is missing costs the steps that need it.
Every step is a process with a time limit and a log in DIR. The building of the kernels may take its
whole limit; the other steps share the time that is left in proportion to theirs, and what one does
not use goes to the next. Benches write their results after every case, `summary.json` is written
after every step, so that what was done is kept when the call is cut off. `--device cpu` rehearses
the steps without a GPU: what needs one fails or does not run. Exit status: 0 all steps passed, 1
some failed or did not fit the time, 2 wrong usage, 3 no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["NO_GPU", "Outcome", "Runner", "Step", "main", "steps"]

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 3
GRACE = 5.0  # seconds between asking a step to end and ending it
LEAST = 10.0  # seconds of a step, however many are to come


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    command: tuple[str, ...]
    limit: float
    """Seconds it may take."""
    needs: tuple[str, ...] = ()
    """Python packages, programs as "bin:NAME", or "data"."""
    whole: bool = False
    """Whether it may take its limit, whatever is to come."""

    def missing(self) -> list[str]:
        """What it needs and is not here."""
        return [need for need in self.needs if not _have(need)]


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    command: str
    status: str
    """passed, failed, cut off, not run."""
    note: str = ""
    seconds: float = 0.0
    returncode: int | None = None


def _have(need: str) -> bool:
    if need == "data":
        return bool(os.environ.get("EFRDN_FAST_DATA"))
    if need.startswith("bin:"):
        return shutil.which(need[4:]) is not None
    return importlib.util.find_spec(need) is not None


def steps(out: Path, device: str = "cuda") -> list[Step]:
    """All steps, the most telling first."""
    python = sys.executable
    efrdn = (python, "-m", "efrdn_fast")
    pytest = (python, "-m", "pytest", "-v", "-p", "no:cacheprovider")
    tests = tuple(f"tests/test_{name}.py" for name in TESTED)
    on = ("--device", device)
    verify = (*efrdn, "verify", "--model", "x4", *on)
    sanitized = (*pytest, "-k", "cuda and float32 and forward", "--maxfail", "3", *tests)
    data = Path(os.environ.get("EFRDN_FAST_DATA", "data")) / "benchmark"

    def bench(*words: str) -> tuple[str, ...]:
        return (python, "-m", "bench.plain", *words, *on, "--results", str(out / "results"))

    def checked(name: str, *words: str) -> tuple[str, ...]:
        return (*verify, *words, "--json", str(out / f"{name}.json"))

    ladder = ("network", "--full", "--seconds", "1.5", "--cap", "15")
    sizes = ("x4-64x64-b1", "x4-128x128-b1", "x4-320x180-b1", "x4-480x270-b1")
    kernels = ("gcrb", "acrb", "conv3x3", "emha", "transformer", "gcrb_chain", "--seconds", "0.5")
    return [
        Step("environment", (*efrdn, "doctor", "--build"), 240, whole=True),
        Step("verify", checked("verify", "--no-benchmark"), 40),
        Step("ladder", bench(*ladder, "--variants", QUICK, "--match", *sizes), 120),
        Step("kernels", bench(*kernels), 70),
        Step("tests", (*pytest, "-k", "cuda or gpu or triton", *tests), 120, ("pytest",)),
        Step("training", bench("train", "--full", "--seconds", "2"), 50),
        Step("sanitizer", ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9",
            *(sanitized if _have("pytest") else (*verify, "--no-benchmark"))), 50,
            ("bin:compute-sanitizer",)),
        Step("blocks", bench("blocks"), 20),
        Step("quality", checked("quality", "--benchmark", str(data), "--sets", "Set5"), 40,
            ("data",)),
        Step("tuning", (python, "-m", "bench.tune", "--minutes", "1", "--folder",
            str(out / "configs"), "--ops", *TUNED), 75, ("triton",)),
        Step("peers", bench("peers", "--seconds", "2"), 40),
        Step("ntire", bench("ntire"), 40),
        Step("compile", bench(*ladder, "--variants", "compile-fp16,compile-max-fp16",
            "--match", "x4-320x180-b1"), 120),
    ]  # fmt: skip


TESTED = ("gcrb", "acrb", "conv3x3", "emha", "transformer", "fusion_backends")
TUNED = ("gcrb", "conv3x3", "gcrb_chain", "gcrb_train")
QUICK = (
    "eager-fp32,eager-fp16,sdpa-fp16,tensorrt-fp16,ours-triton-fp32,ours-triton-fp16,"
    "ours-cuda-fp32,ours-cuda-tf32,ours-cuda-fp16"
)


class Runner:
    """Runs steps one after another until the time is up, and keeps what they gave.

    Args:
        out: Folder of logs and summary; made where it is missing.
        seconds: Time for all of them.
        clock: Seconds that only grow.
    """

    def __init__(self, out: Path, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.out, self.seconds, self.clock = out, seconds, clock
        self.begin = clock()
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)

    def run(self, todo: Sequence[Step]) -> list[Outcome]:
        """Run all; each outcome is in the summary before the next step begins."""
        for at, step in enumerate(todo):
            left = self.seconds - (self.clock() - self.begin)
            missing = step.missing()
            command = " ".join(step.command)
            if missing:
                outcome = Outcome(step.name, command, "not run", f"missing: {', '.join(missing)}")
            elif left <= GRACE:
                outcome = Outcome(step.name, command, "not run", "no time left")
            else:
                outcome = self._one(step, self._limit(todo[at:], left - GRACE))
            self.outcomes.append(outcome)
            self._save()
            print(f"{outcome.name:<12} {outcome.status:<8} {outcome.seconds:6.1f} s "
                  f"{outcome.note}", flush=True)  # fmt: skip
        return self.outcomes

    @staticmethod
    def _limit(todo: Sequence[Step], left: float) -> float:
        """Seconds of the first of the steps that are to come."""
        step = todo[0]
        if step.whole:
            return min(step.limit, left)
        share = left * step.limit / sum(s.limit for s in todo if not s.missing())
        return min(step.limit, left, max(LEAST, share))

    def _one(self, step: Step, limit: float) -> Outcome:
        begin, command = self.clock(), " ".join(step.command)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with (self.out / f"{step.name}.log").open("wb") as log:
            try:
                process = subprocess.Popen(
                    step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                return Outcome(step.name, command, "failed", str(error))
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                note = f"limit of {limit:.0f} s; what it had written is kept"
                return Outcome(step.name, command, "cut off", note, self.clock() - begin)
            except (KeyboardInterrupt, SystemExit):
                note = "the whole call was ended; what it had written is kept"
                cut = Outcome(step.name, command, "cut off", note, self.clock() - begin)
                self.outcomes.append(cut)
                self._save()
                raise
            finally:
                if process.poll() is None:
                    _end(process)
        status = "failed" if code else "passed"
        note = f"exit status {code}, see {step.name}.log" if code else ""
        return Outcome(step.name, command, status, note, self.clock() - begin, code)

    def _save(self) -> None:
        record = {
            "minutes": self.seconds / 60,
            "machine": {"python": platform.python_version(), "platform": platform.platform()},
            "steps": [asdict(outcome) for outcome in self.outcomes],
        }
        path = self.out / "summary.json"
        path.with_suffix(".part").write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".part").replace(path)


def _end(process: subprocess.Popen) -> None:
    """End a step with all that it started: they are of one process group."""
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ended(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _why_no_gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device: torch sees none"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of logs and results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything. Default: 9")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearsal")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and run nothing")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    todo = steps(args.out.resolve(), args.device)
    names = [step.name for step in todo]
    unknown = set(args.only or ()) - set(names)
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    todo = [step for step in todo if not args.only or step.name in args.only]
    if args.dry_run:
        for step in todo:
            missing = ", ".join(step.missing())
            state = f"would not run, missing: {missing}" if missing else f"{step.limit:.0f} s"
            print(f"{step.name:<12} {state}\n    {' '.join(step.command)}")
    reason = _why_no_gpu() if args.device == "cuda" else None
    if reason:
        not_run = ", ".join(step.name for step in todo)
        print(f"run_gpu: {reason}; nothing was run (not {not_run})", file=sys.stderr)
        return NO_GPU
    if args.dry_run:
        return 0
    signal.signal(signal.SIGTERM, _ended)  # a child has its own process group: end it too
    outcomes = Runner(args.out.resolve(), 60 * args.minutes).run(todo)
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
