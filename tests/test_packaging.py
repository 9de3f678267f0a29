"""The wheel: what it holds, and that it works away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("efrdn_fast", "kernels", "csrc")
SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h", ".json", ".html", ".safetensors")


def run(*command: object, **options) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout stays as it is."""
    source = tmp_path_factory.mktemp("source") / "tree"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "wheel", *options, "-q", "-w", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "-q", "--target", target, wheel)
    return target


def test_wheel_holds_every_source_and_nothing_else(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
        assert "efrdn = efrdn_fast.cli:main" in archive.read(metadata).decode()
    expected = set()
    for package in PACKAGES:
        place = Path("efrdn_fast") if package == "efrdn_fast" else Path("efrdn_fast", package)
        for file in (ROOT / package).rglob("*"):
            if file.suffix in SOURCES and "__pycache__" not in file.parts:
                expected.add((place / file.relative_to(ROOT / package)).as_posix())
    assert held == expected


SCRIPT = """
import json, sys
import efrdn_fast
light = sorted({"torch", "triton", "numpy"} & set(sys.modules))
from efrdn_fast import functional
from efrdn_fast.kernels import reference
import torch
x = torch.randn(1, 9, 4, 5)
y = functional.acrb(x, torch.randn(9, 9, 3, 3), torch.randn(9), backend="reference")
print(json.dumps({
    "light": light, "package": efrdn_fast.__file__, "kernels": reference.__file__,
    "triton": "triton" in sys.modules, "shape": list(y.shape), "version": efrdn_fast.__version__,
}))
"""


def test_installed_package_works_elsewhere(installed, tmp_path):
    """Nothing is imported that a user did not ask for."""
    said = speak(installed, cwd=tmp_path)
    assert Path(said["package"]).is_relative_to(installed)
    assert Path(said["kernels"]).is_relative_to(installed)
    assert said["light"] == []
    assert said["triton"] is False
    assert said["shape"] == [1, 9, 4, 5]


def test_python_started_in_the_checkout_takes_the_checkout(installed):
    """There `kernels/` stands beside the package, not inside it."""
    said = speak(installed, cwd=ROOT)
    assert Path(said["package"]) == ROOT / "efrdn_fast" / "__init__.py"
    assert Path(said["kernels"]) == ROOT / "kernels" / "reference.py"


def speak(installed: Path, cwd: Path) -> dict:
    return json.loads(run("-c", SCRIPT, cwd=cwd, env={**os.environ, "PYTHONPATH": str(installed)}))
