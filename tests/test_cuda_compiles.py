"""nvcc compiles every torch-free CUDA file for the whole list of architectures, without spilling a register.

csrc/cuda/op_cuda.cu, which includes torch, is compiled by the builds of the whole extension (test_jit_load.py).
"""

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from dsconv_cuda import _build

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / ".cache" / "nvcc"
SOURCES = sorted(path.name for path in CUDA.glob("cuda_*.cu"))
ARCHITECTURES = tuple(name.replace(".", "") for name in _build.DEFAULT_ARCHITECTURES)
NVCC = _build._find_nvcc()
# Architectures compiled at a time; where pytest runs in two processes, each of them compiles.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda*)")

# What ptxas -v prints of each function of each architecture.
COMPILED = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
FUNCTION = re.compile(
    r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)


def ptxas_report(source: str) -> str:
    """What ptxas says of a file; kept under the hash of the file, the headers and the command."""
    flags = ["-std=c++20", "-O3", "-Xptxas=-v"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    digest = hashlib.sha256(repr((flags, _build._output_of(NVCC, "--version"))).encode())
    headers = [path for pattern in ("*.h", "cuda/*.h", "cuda/*.cuh") for path in (ROOT / "csrc").glob(pattern)]
    for path in [CUDA / source, *sorted(headers)]:
        digest.update(path.read_bytes())
    kept = CACHE / f"{source}-{digest.hexdigest()[:16]}.txt"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            command = [NVCC, *flags, f"--threads={THREADS}", "-c", str(CUDA / source), "-o", f"{scratch}/object.o"]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            assert done.returncode == 0, done.stdout
            report = Path(scratch, "report.txt")
            report.write_text(done.stdout)
            report.rename(kept)
    return kept.read_text()


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source):
    report = ptxas_report(source)
    assert "warning" not in report.lower(), report
    functions = FUNCTION.findall(report)
    for name, *numbers in functions:
        assert [int(number) for number in numbers] == [0, 0, 0], f"{name}: (stack, spill stores, loads) = {numbers}"
    kernels = COMPILED.findall(report)
    assert len(functions) >= len(kernels)
    if source != "cuda_build_info.cu":  # which has no kernel
        assert {arch for _, arch in kernels} == set(ARCHITECTURES)
        # The same kernels everywhere: no architecture is left out of a part of them.
        assert len({name for name, _ in kernels}) * len(ARCHITECTURES) == len(kernels)
