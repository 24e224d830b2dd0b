"""nvcc compiles every torch-free CUDA file for the whole list of architectures, without spilling a register.

csrc/cuda/op_cuda.cu, which includes torch, is compiled by the builds of the whole extension (test_jit_load.py).
"""

import hashlib
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsconv_cuda import _build

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / ".cache" / "nvcc"
SOURCES = sorted(path.name for path in CUDA.glob("cuda_*.cu"))
ARCHITECTURES = tuple(name.replace(".", "") for name in _build.DEFAULT_ARCHITECTURES)
NVCC = _build._find_nvcc()
PARALLEL_COMPILES = 2

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda*)"),
    pytest.mark.xdist_group("cuda_compiles"),  # one process has all the reports
]

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
        command = [NVCC, *flags, "-c", str(CUDA / source), "-o", str(kept.with_suffix(".o"))]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            return f"error: {done.stdout}"
        kept.with_suffix(".o").unlink()
        kept.write_text(done.stdout)
    return kept.read_text()


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    with ThreadPoolExecutor(PARALLEL_COMPILES) as pool:
        return dict(zip(SOURCES, pool.map(ptxas_report, SOURCES), strict=True))


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(reports, source):
    report = reports[source]
    assert not report.startswith("error"), report
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
