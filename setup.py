"""Package layout: `kernels/` and `csrc/` stand at the top level and install inside `efrdn_fast`.

Nothing is compiled here: the CUDA and C++ sources ship as data and are built at first use.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "efrdn_fast/__init__.py").read_text())[1]

EXTRAS = {
    "train": ["tensorboard>=2.15", "nvidia-ml-py>=12; platform_system == 'Linux'"],
    "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
    "images": ["opencv-python-headless>=4.12"],
    "video": ["av>=18; python_version >= '3.11'"],  # it has no wheels for 3.10
    "figures": ["matplotlib>=3.8"],
    # Pins its parts to one release, that of the cuda-toolkit which torch brings.
    "cuda": ["cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]>=13; platform_system == 'Linux'"],
    "bench": ["pytest>=8", "pytest-benchmark>=5", "matplotlib>=3.8"],
    "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "scikit-image>=0.24"],
}
for extra in ("export", "images", "video", "train", "bench"):
    EXTRAS["test"] += EXTRAS[extra]
# What the bench compares with; it names what is missing, and tests do without.
EXTRAS["bench"] = [*EXTRAS["bench"], *EXTRAS["export"], "openvino>=2025.0", "spandrel>=0.4"]
EXTRAS["dev"] = [*EXTRAS["test"], "ruff>=0.9", "pre-commit>=3", "build>=1"]

setup(
    name="efrdn_fast",
    version=VERSION,
    description="EFRDN, a lightweight image super-resolution network, fast on GPUs and CPUs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=["efrdn_fast", "efrdn_fast.commands", "efrdn_fast.kernels", "efrdn_fast.csrc"],
    package_dir={"efrdn_fast.kernels": "kernels", "efrdn_fast.csrc": "csrc"},
    package_data={
        "efrdn_fast": ["weights/*.safetensors", "weights/*.json", "data/*.json", "data/*.html"],
        "efrdn_fast.kernels": ["configs/*.json"],
        "efrdn_fast.csrc": ["*.cpp", "*.cu", "*.cuh", "*.h"],
    },
    install_requires=[
        "torch>=2.10",
        "numpy>=1.26",
        "pillow>=11",
        "safetensors>=0.4.5",
        "tqdm>=4.66",
        "filelock>=3.12",
        "triton>=3.4; platform_system == 'Linux'",
        "ninja>=1.11; platform_system == 'Linux'",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["efrdn = efrdn_fast.cli:main"]},
)
