"""README's figures of what users call, on this machine: `python -m bench.foundation`.

Time and peak memory of `upscale()` and of a step of the trainer, by the plain network and by
EFRDNFast, each in a process of its own, after one warm-up, medians of three. Writes
`bench/results/<device>/foundation.json`.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time

CASES = [
    {"what": "upscale", "size": [128, 128]},
    {"what": "upscale", "size": [320, 180]},
    {"what": "train", "batch": 4, "patch": 32},
    {"what": "train", "batch": 16, "patch": 48},
]


def measure(case: dict) -> dict:
    """Seconds (median of three after a warm-up) and peak resident memory of this process."""
    import torch

    import efrdn_fast

    torch.manual_seed(0)
    if case["what"] == "upscale":
        width, height = case["size"]
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)

        def once() -> None:
            with efrdn_fast.use_backend("auto" if case["fast"] else "reference"):
                efrdn_fast.upscale(image, 4, device="cpu", tile=0)
    else:
        from efrdn_fast.options import TrainOptions
        from efrdn_fast.trainer import Trainer

        batch, patch = case["batch"], case["patch"]
        trainer = Trainer(TrainOptions(batch_size=batch, patch_size=patch))
        if case["fast"]:
            trainer.run_through(efrdn_fast.accelerate(trainer.net))
        shape = (batch, 3, patch, patch)
        lr = torch.randint(0, 256, shape, dtype=torch.uint8)
        hr = lr.repeat_interleave(4, 2).repeat_interleave(4, 3)

        def once() -> None:
            trainer.train_step(lr, hr)

    once()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**case, "median_s": statistics.median(seconds), "peak_mib": round(peak)}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
        return
    import torch

    from .harness.provenance import RESULTS, device_folder

    device = device_folder(torch.device("cpu"))
    rows = []
    for case in (case | {"fast": fast} for case in CASES for fast in (False, True)):
        command = [sys.executable, "-m", "bench.foundation", json.dumps(case)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    record = {
        "command": "python -m bench.foundation",
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "network": "x4: EFRDN with attention by SDPA; fast: EFRDNFast",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": rows,
    }
    folder = RESULTS / device
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "foundation.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
