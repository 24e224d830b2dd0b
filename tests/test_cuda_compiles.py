"""nvcc compiles every torch-free CUDA file, without spilling a register, and the machine code is what was meant.

For one architecture; for the others with --extended. csrc/cuda/op_cuda.cu, which includes torch, is compiled by the
builds of the whole extension (test_jit_load.py). What is kept of a compilation, and where, is in bench/sass.py.
"""

import os

import pytest

from bench import sass, static

USUAL = "sm_80"  # the oldest with asynchronous copies and all types on the tensor cores
OTHERS = tuple(architecture for architecture in sass.ARCHITECTURES if architecture != USUAL)
# Architectures compiled at a time; where pytest runs in two processes, each of them compiles.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


def _missing() -> str:
    try:
        sass.nvcc()
        sass.cuobjdump()
    except sass.MissingTool as missing:
        return str(missing)
    return ""


@pytest.mark.skipif(_missing() != "", reason=_missing())
@pytest.mark.parametrize("source", sass.sources())
@pytest.mark.parametrize(
    "architectures", [(USUAL,), pytest.param(OTHERS, marks=pytest.mark.extended)], ids=[USUAL, "others"]
)
def test_compiles_without_spills(source, architectures):
    kernels = sass.compile_kernels(source, architectures, threads=THREADS)
    assert not static.broken_rules(static.rows_of(kernels, {}))
    assert {kernel.architecture for kernel in kernels} == set(architectures)
    # The same kernels everywhere: no architecture is left out of a part of them.
    assert len({kernel.symbol for kernel in kernels}) * len(architectures) == len(kernels)
