"""Which kernels the tests run, and how many cases each of them ran.

    pytest tests                              the built extension on the CPU, every instruction set this machine has
    pytest tests --isa=generic                only that one
    pytest tests --backend=cuda               the built extension on the GPU
    pytest tests --backend=emulated           the CUDA kernels, compiled for the host (tests/cuda_host)
    pytest tests --backend=avx512-emulated    the AVX-512 kernels on emulated intrinsics (tests/isa_emulation)
    pytest tests --extended                   with the long sweeps

A test that has to do with kernels asks for the fixture `isa` and runs once for each of them; the backends other than
the default one run these tests only.
"""

import contextlib
import importlib.util
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from guarded import InputsEndAtPages

TESTS = Path(__file__).resolve().parent
BUILD = TESTS.parent / ".cache"
ISAS = ("generic", "avx2", "avx512")


def pytest_addoption(parser):
    group = parser.getgroup("dsconv_cuda")
    group.addoption("--backend", choices=("cpu", "cuda", "emulated", "avx512-emulated"), default="cpu")
    group.addoption("--isa", choices=("all", *ISAS), default="all", help="of the CPU kernels")
    group.addoption("--extended", action="store_true", help="run the long sweeps too")


def pytest_configure(config):
    config.addinivalue_line("markers", "extended: a long sweep, run with --extended")
    config.addinivalue_line("markers", "one_isa: says the same on every instruction set; runs on the best one only")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
    # Before anything of dsconv_cuda looks for its library: it takes ops that are registered already.
    backend = config.getoption("--backend")
    if backend == "emulated":
        torch.ops.load_library(_builder("cuda_host").build_emulated_extension(BUILD / "cuda_host"))
    elif backend == "avx512-emulated":
        torch.ops.load_library(_builder("isa_emulation").build_emulated_avx512(BUILD / "isa_emulation"))
    elif backend == "cuda":
        # The oracle's error budget is that of float32, not of TF32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _builder(folder: str):
    spec = importlib.util.spec_from_file_location(f"{folder}_build", TESTS / folder / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _kernels(config) -> list[str]:
    """The names under which the cases of this run are counted."""
    backend = config.getoption("--backend")
    if backend != "cpu":
        return [backend]
    from dsconv_cuda import _loader

    available = _loader.load_library().module.isa_available()
    wanted = config.getoption("--isa")
    if wanted == "all":
        return available
    if wanted not in available:
        raise pytest.UsageError(f"--isa={wanted}: this machine and this build have {', '.join(available)}")
    return [wanted]


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        kernels = _kernels(metafunc.config)
        if metafunc.definition.get_closest_marker("one_isa") is not None:
            kernels = kernels[-1:]
        metafunc.parametrize("isa", kernels, indirect=True, scope="function")


def pytest_collection_modifyitems(config, items):
    kept, left_out = [], []
    for item in items:
        extended = item.get_closest_marker("extended") is not None and not config.getoption("--extended")
        other = config.getoption("--backend") != "cpu" and "isa" not in item.fixturenames
        (left_out if extended or other else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def isa(request):
    """The kernels of this case, made active: an instruction set of the CPU, or the backend's name."""
    request.node.user_properties.append(("kernels", request.param))
    if request.config.getoption("--backend") == "cpu":
        from dsconv_cuda import _loader

        _loader.load_library().module.set_isa(request.param)
    return request.param


@pytest.fixture
def inputs_at_pages(request):
    """The emulated CUDA kernels may not touch the memory behind what they read (guarded.py). Not for the CPU's own:
    a mode, which this is, keeps a block from its operators for a whole step."""
    emulated = request.config.getoption("--backend") == "emulated"
    with InputsEndAtPages() if emulated else contextlib.nullcontext():
        yield


@pytest.fixture
def device(request) -> torch.device:
    return torch.device("cuda" if request.config.getoption("--backend") == "cuda" else "cpu")


def pytest_terminal_summary(terminalreporter):
    counts = Counter(
        value
        for report in terminalreporter.stats.get("passed", [])
        if report.when == "call"
        for name, value in report.user_properties
        if name == "kernels"
    )
    for kernels, count in sorted(counts.items()):
        terminalreporter.write_line(f"dsconv_cuda: {count} cases passed on the {kernels} kernels")
