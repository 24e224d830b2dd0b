"""Every way to compile the operators from a running program, each in a process of its own."""

import os

import pytest
from fresh_process import CHECK_OPERATORS, ROOT, copy_of_sources, run_python

from dsconv_cuda import _build

CPP = sorted(str(path) for path in (ROOT / "csrc").rglob("*.cpp"))
CU = sorted(str(path) for path in (ROOT / "csrc").rglob("*.cu"))

toolkit, why_not, _ = _build._find_cuda()
needs_toolkit = pytest.mark.skipif(toolkit is None, reason=f"CUDA sources cannot be compiled: {why_not}")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package without a prebuilt library."""
    return copy_of_sources(tmp_path_factory.mktemp("jit_load") / "checkout")


def test_load_with_the_flags_of_the_build(package, tmp_path):
    code = """
import dsconv_cuda
from dsconv_cuda import _loader
module = dsconv_cuda.load()
assert module.build_info()["optimized"]
assert dsconv_cuda.load() is module
assert _loader.load_library().module is module
"""
    done = run_python(code + CHECK_OPERATORS, package=package, TORCH_EXTENSIONS_DIR=str(tmp_path), FORCE_CUDA=None)
    assert "agree" in done.stdout
    assert "dsconv_cuda: compiling the operators" in done.stderr
    assert len(list(tmp_path.iterdir())) == 1

    # First use in another process finds what that one compiled, and compiles nothing.
    again = run_python(CHECK_OPERATORS, package=package, TORCH_EXTENSIONS_DIR=str(tmp_path), FORCE_CUDA=None)
    assert "agree" in again.stdout
    assert "compiling" not in again.stderr
    assert len(list(tmp_path.iterdir())) == 1


def hand_written_load(package, folder, sources, flags, name="by_hand"):
    code = f"""
from torch.utils.cpp_extension import load
module = load({name!r}, {sources!r}, extra_cflags={flags!r}, build_directory={str(folder)!r})
assert module.__name__ == {name!r}
assert module.build_info()["optimized"] is {bool(flags)}
assert module.build_info()["cxx_flags"] is None
from dsconv_cuda import _loader
assert _loader.load_library().module is None
assert _loader.cuda_kernels_loaded() is {any(source.endswith(".cu") for source in sources)}
"""
    environment = {"TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": os.environ.get("MAX_JOBS", "2")}
    # Where nvcc on PATH is a script outside of the toolkit, torch has to be told.
    environment["CUDA_HOME"] = toolkit.home if toolkit else None
    return run_python(code + CHECK_OPERATORS, package=package, **environment)


# -O1 for -O3: as good a switch, and half the time.
@pytest.mark.parametrize("flags", [[], ["-O1"]], ids=["no_flags", "O1"])
def test_hand_written_load_of_the_cpp_files(package, tmp_path, flags):
    assert "agree" in hand_written_load(package, tmp_path, CPP, flags).stdout


@needs_toolkit
@pytest.mark.parametrize("flags", [[], pytest.param(["-O3"], marks=pytest.mark.extended)], ids=["no_flags", "O3"])
def test_hand_written_load_with_the_cu_files(package, tmp_path, flags):
    assert CU
    assert "agree" in hand_written_load(package, tmp_path, CPP + CU, flags).stdout
