"""Damaged images through `efrdn upscale`: each ends within 10 s in a whole result or in one line.

    python tests/fuzz/run.py --count 5000 --log fuzz.json

A worker process runs the command on one mutant after the other. What counts as a failure: the
worker dies, computes for 10 s without an answer or takes more memory than allowed; an exception
gets out of the command; a line on stderr is not the command's own; the status is neither 0 nor 1;
a result is missing, unreadable or half; a file stays behind. The mutants of failures are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mutate import mutant
from seeds import seeds

__all__ = ["fuzz", "main"]

LIMIT_S = 10.0
"""Processor time for one mutant; 20 times as much on the clock, for the machine may be busy."""
MEMORY_MIB = 1024
"""What the worker may add to its memory before the first mutant."""
MAX_PIXELS = 16_384
"""Given as --max-pixels: the time of larger images is the network's, not the decoders'."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="mutants (default: 5000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    parser.add_argument(
        "--memory", type=int, default=MEMORY_MIB, metavar="MIB", help="growth (default: 1024)"
    )
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"), help="for failures")
    parser.add_argument("--log", type=Path, help="summary as JSON")
    args = parser.parse_args()
    summary = fuzz(args.count, args.seed, args.keep, args.memory)
    if args.log:
        args.log.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps({key: value for key, value in summary.items() if key != "messages"}, indent=2))
    return 1 if summary["failures"] else 0


def fuzz(count: int, seed: int, keep: Path, memory_mib: int = MEMORY_MIB) -> dict:
    """Run `count` mutants; what came of them, JSON-ready. Mutants of failures go into `keep`."""
    corpus = seeds()
    ended, kinds, messages, failures = Counter(), Counter(), Counter(), []
    slowest, memory, start = (0.0, -1), 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        worker = _Worker(Path(folder), memory_mib)
        for index in range(count):
            name, extension, data = mutant(corpus, seed, index)
            answer = worker.do(extension, data)
            slowest = max(slowest, (answer["cpu_s"], index))
            memory = max(memory, answer.get("memory_mib", 0))
            if answer["trouble"]:
                failures.append({"index": index, "mutation": name, "trouble": answer["trouble"]})
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}_{index}{extension}").write_bytes(data)
            ended[answer["end"]] += 1
            kinds[name] += 1
            messages[_kind(answer.get("message", ""))] += 1
        worker.close()
    return {
        "count": count,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "ended": dict(ended),
        "mutations": dict(kinds),
        "slowest_cpu_s": round(slowest[0], 2),
        "slowest_index": slowest[1],
        "memory_growth_mib": memory,
        "failures": failures,
        "messages": dict(messages.most_common(40)),
    }


class _Worker:
    """A process that upscales mutants; started again when it is lost."""

    def __init__(self, folder: Path, memory_mib: int):
        self.folder, self.memory_mib = folder, memory_mib
        self.process = None

    def do(self, extension: str, data: bytes) -> dict:
        if self.process is None:
            self._start()
        first, start = _cpu_s(self.process.pid), time.monotonic()
        self.pipe.send((extension, data))
        while not self.pipe.poll(0.5):
            used, waited = _cpu_s(self.process.pid) - first, time.monotonic() - start
            if used > LIMIT_S or waited > 20 * LIMIT_S:
                self.close()
                return {"end": "lost", "cpu_s": used, "trouble": f"no answer in {used:.1f} s"}
        with contextlib.suppress(EOFError):
            answer = self.pipe.recv()
            return {**answer, "cpu_s": _cpu_s(self.process.pid) - first}
        self.process.join()
        trouble = f"the process died with {self.process.exitcode}"
        self.close()
        return {"end": "lost", "cpu_s": 0.0, "trouble": trouble}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.folder, self.memory_mib))
        self.process.start()
        theirs.close()
        self.pipe.recv()  # ready


def _cpu_s(pid: int) -> float:
    """Processor time that a process has used, in seconds (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(pipe, folder: Path, memory_mib: int) -> None:
    import torch

    from efrdn_fast import EFRDN, checkpoint, cli, images

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = EFRDN(2, channels=16, distilled=4, segment_tokens=64)
    weights = str(checkpoint.save(net, folder / "net.safetensors"))
    work = folder / "work"
    work.mkdir(exist_ok=True)
    source = work / "in.png"
    source.write_bytes(next(seed.data for seed in seeds() if seed.mode == "RGB + alpha"))
    cli.main(["upscale", "-n", weights, str(source), "-o", str(work / "first.png")])
    (work / "first.png").unlink()
    first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send("ready")
    while True:
        source.unlink()
        extension, data = pipe.recv()
        source = work / f"in{extension}"
        source.write_bytes(data)
        target = work / f"out{extension if extension != '.gif' else '.png'}"
        words = ["upscale", "-n", weights, "--max-pixels", str(MAX_PIXELS), str(source)]
        out, err = io.StringIO(), io.StringIO()
        answer = {"end": "refused", "trouble": ""}
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = cli.main([*words, "-o", str(target)])
        except BaseException as error:
            status, answer["trouble"] = -1, f"{type(error).__name__} got out: {error}"
        lines = err.getvalue().splitlines()
        errors = [line for line in lines if line.startswith("efrdn upscale: error: ")]
        if any(not line.startswith(("efrdn upscale: ", "TIFF")) for line in lines):
            answer["trouble"] = answer["trouble"] or f"stderr says {lines}"
        if status == 0:
            answer["end"] = "upscaled"
            try:
                images.read(target)
            except (OSError, ValueError) as error:
                answer["trouble"] = f"result: {error}"
        elif not answer["trouble"] and (status != 1 or len(errors) != 1 or target.exists()):
            answer["trouble"] = f"status {status}, lines {lines}, result {target.exists()}"
        answer["message"] = (
            errors[0].removeprefix(f"efrdn upscale: error: {source}: ") if errors else ""
        )
        target.unlink(missing_ok=True)
        left = [path.name for path in work.iterdir() if path != source]
        if left:
            answer["trouble"] = answer["trouble"] or f"left behind: {left}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first) // 1024
        answer["memory_mib"] = grown
        answer["trouble"] = answer["trouble"].replace(f"{work}/", "")
        if grown > memory_mib and not answer["trouble"]:
            answer["trouble"] = f"memory grew by {grown} MiB"
        pipe.send(answer)


def _kind(message: str) -> str:
    """A message without its numbers and what decoders add."""
    return "".join("#" if letter.isdigit() else letter for letter in message)[:60]


if __name__ == "__main__":
    sys.exit(main())
