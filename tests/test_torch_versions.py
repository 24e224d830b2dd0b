"""One binary for every torch from 2.10 on: built with one torch, run with another, in both directions.

make test prepares a second virtual environment with another torch; DSCONV_OTHER_PYTHON is its interpreter.
"""

import os
import sys

import pytest
import torch
from fresh_process import CHECK_OPERATORS, copy_of_sources, run, run_python

OTHER_PYTHON = os.environ.get("DSCONV_OTHER_PYTHON", "")

pytestmark = [
    pytest.mark.xdist_group("torch_versions"),
    pytest.mark.skipif(
        not OTHER_PYTHON,
        reason="DSCONV_OTHER_PYTHON is not set to an interpreter with another torch (make test sets it)",
    ),
]


def build_cpu_only(python: str, folder):
    checkout = copy_of_sources(folder / "checkout")
    command = [python, "setup.py", "build_ext", "--inplace"]
    # Without optimisation, to save time: what is tested is the interface to torch.
    run(command, package=checkout, cwd=checkout, DSCONV_CPU_ONLY="1", FORCE_CUDA=None, CXXFLAGS="-O0")
    return checkout


@pytest.fixture(scope="module")
def other_torch():
    code = f"import sys, torch; print(torch.__version__, sys.version_info[:2] == {sys.version_info[:2]})"
    version, same_python = run([OTHER_PYTHON, "-c", code]).stdout.split()
    if same_python != "True":
        pytest.skip(f"{OTHER_PYTHON} is another version of Python")
    if version == torch.__version__:
        pytest.skip(f"{OTHER_PYTHON} has the same torch, {version}")
    return version


@pytest.fixture(scope="module")
def built_with_other(other_torch, tmp_path_factory):
    return build_cpu_only(OTHER_PYTHON, tmp_path_factory.mktemp("built_with_other"))


@pytest.fixture(scope="module")
def built_with_this(other_torch, tmp_path_factory):
    return build_cpu_only(sys.executable, tmp_path_factory.mktemp("built_with_this"))


def built_with(checkout, python: str) -> str:
    code = "from dsconv_cuda import _loader; print(_loader.load_library().module.build_info()['torch'])"
    return run_python(code, package=checkout, python=python, DSCONV_JIT="0").stdout.strip()


@pytest.mark.parametrize("python", [OTHER_PYTHON, sys.executable], ids=["other_torch", "this_torch"])
@pytest.mark.parametrize("builder", ["built_with_other", "built_with_this"])
def test_built_with_one_torch_runs_with_another(builder, python, other_torch, request):
    checkout = request.getfixturevalue(builder)
    expected = other_torch if builder == "built_with_other" else torch.__version__
    assert built_with(checkout, python) == expected.split("+")[0]
    assert "agree" in run_python(CHECK_OPERATORS, package=checkout, python=python, DSCONV_JIT="0").stdout


def test_info_of_a_cpu_only_build(built_with_other, other_torch):
    text = run([OTHER_PYTHON, "-m", "dsconv_cuda.info"], package=built_with_other, DSCONV_JIT="0").stdout
    assert other_torch in text
    assert "not built in" in text
    assert "to build them: FORCE_CUDA=1" in text


def test_cpu_only_build_refuses_tensors_of_a_gpu(built_with_other):
    """No GPU is needed to ask: a fake tensor has a device and no memory."""
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import dsconv_cuda
with FakeTensorMode():
    tensors = [torch.empty(size, device="cuda") for size in ((1, 2, 4, 4), (2, 1, 3, 3), (5, 2, 1, 1))]
    try:
        dsconv_cuda.depthwise_separable_conv2d(*tensors)
    except RuntimeError as error:
        print(error)
"""
    text = run_python(code, package=built_with_other, python=OTHER_PYTHON, DSCONV_JIT="0").stdout
    assert "built without CUDA kernels" in text
    assert "FORCE_CUDA=1" in text


def test_forced_cuda_without_cuda_in_torch(built_with_other, other_torch):
    if "cpu" not in other_torch:
        pytest.skip(f"torch {other_torch} has CUDA")
    command = [OTHER_PYTHON, "setup.py", "build_ext", "--inplace"]
    done = run(
        command, package=built_with_other, cwd=built_with_other, check=False, FORCE_CUDA="1", DSCONV_CPU_ONLY=None
    )
    assert done.returncode == 1
    assert f"FORCE_CUDA is set, but torch {other_torch} is a build without CUDA" in done.stderr
    assert "Traceback" not in done.stderr
