"""What setup.py and the JIT loader decide, on machines that are not this one: toolkits here are scripts that answer."""

import os
from pathlib import Path

import pytest
import torch

from dsconv_cuda import _build

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SWITCHES = ("FORCE_CUDA", "DSCONV_CPU_ONLY", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "DEBUG")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (*SWITCHES, "CXXFLAGS", "NVCC_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    _build._output_of.cache_clear()


@pytest.fixture
def torch_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def make_toolkit(home: Path, version: str = "13.0", architectures: str = "75 80 86 89 90 100 120") -> Path:
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    listing = "\\n".join(f"compute_{number}" for number in architectures.split())
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"  --version) echo 'Cuda compilation tools, release {version}, V{version}.88';;\n"
        f"  --dryrun) echo '#$ TOP={home}/bin/..' >&2;;\n"
        f"  --list-gpu-arch) printf '{listing}\\n';;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return home


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    home = make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


def test_cuda_is_built_where_torch_and_nvcc_have_it(torch_with_cuda, toolkit):
    parameters = _build.build_parameters(CSRC)
    assert parameters.cuda
    assert parameters.toolkit == _build.Toolkit(str(toolkit), "13.0")
    assert parameters.arch_list == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    assert any(source.endswith(".cu") for source in parameters.sources)


def test_cpu_only_notice_names_the_cause(torch_with_cuda, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    parameters = _build.build_parameters(CSRC)
    assert not parameters.cuda
    assert not any(source.endswith(".cu") for source in parameters.sources)
    text = _build.report(parameters)
    assert "built for the CPU only" in text
    assert f"nvcc was not found in CUDA_HOME={tmp_path}" in text
    assert "FORCE_CUDA=1" in text


def test_cpu_only_switch(torch_with_cuda, toolkit, monkeypatch):
    monkeypatch.setenv("DSCONV_CPU_ONLY", "1")
    assert not _build.build_parameters(CSRC).cuda
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(_build.BuildError, match="both set"):
        _build.build_parameters(CSRC)


def test_forced_cuda_names_the_missing_toolkit(torch_with_cuda, monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError, match=r"(?s)FORCE_CUDA is set, but nvcc was not found.*CUDA_HOME.*'devel'"):
        _build.build_parameters(CSRC)


def test_forced_cuda_names_a_torch_without_cuda(toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not _build.build_parameters(CSRC).cuda
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(_build.BuildError, match=r"(?s)build without CUDA.*Install a CUDA build of torch"):
        _build.build_parameters(CSRC)


def test_asking_for_cuda_by_argument_is_forcing(torch_with_cuda, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError, match="cuda=True was passed"):
        _build.build_parameters(CSRC, cuda=True)


def test_toolkit_of_another_major_version(torch_with_cuda, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda", version="12.8")))
    parameters = _build.build_parameters(CSRC)
    assert not parameters.cuda
    assert "another major version" in parameters.decisions[0]


def test_toolkit_behind_a_wrapper_script(torch_with_cuda, monkeypatch, tmp_path):
    home = make_toolkit(tmp_path / "toolkit")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert _build.build_parameters(CSRC).toolkit == _build.Toolkit(str(home), "13.0")


def test_architectures_are_cut_to_what_nvcc_knows(torch_with_cuda, monkeypatch, tmp_path):
    home = make_toolkit(tmp_path / "cuda", architectures="75 80 86 90")
    monkeypatch.setenv("CUDA_HOME", str(home))
    parameters = _build.build_parameters(CSRC)
    assert parameters.arch_list == "7.5;8.0;8.6;9.0+PTX"
    assert "without 8.9, 10.0, 12.0" in parameters.decisions[1]


def test_architectures_of_the_environment(torch_with_cuda, toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a")
    parameters = _build.build_parameters(CSRC)
    assert parameters.arch_list == "8.0 9.0a"
    assert "TORCH_CUDA_ARCH_LIST" in parameters.decisions[1]


def test_flags_leave_standard_and_architectures_to_torch(torch_with_cuda, toolkit):
    parameters = _build.build_parameters(CSRC)
    assert not [flag for flag in parameters.cxx_flags + parameters.nvcc_flags if "-std" in flag or "arch" in flag]


@pytest.mark.parametrize(
    ("debug", "expected", "excluded"), [("", "-O3", "-O0"), ("0", "-O3", "-O0"), ("1", "-O0", "-O3")]
)
def test_debug(monkeypatch, debug, expected, excluded):
    monkeypatch.setenv("DEBUG", debug)
    flags = _build.build_parameters(CSRC, cuda=False).cxx_flags
    assert expected in flags
    assert excluded not in flags


def test_jobs(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(_build, "_memory", lambda: 33 << 30)
    assert _build.build_parameters(CSRC, cuda=False).max_jobs == 8
    monkeypatch.setattr(_build, "_memory", lambda: 1 << 30)
    assert _build.build_parameters(CSRC, cuda=False).max_jobs == 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert _build.build_parameters(CSRC, cuda=False).max_jobs == 3


def test_environment_is_given_back(torch_with_cuda, toolkit, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}:{os.environ['PATH']}")
    before, home_before = dict(os.environ), cpp_extension.CUDA_HOME
    with _build.build_environment(_build.build_parameters(CSRC)):
        assert os.environ["CUDA_HOME"] == cpp_extension.CUDA_HOME == str(toolkit)
        assert os.environ["MAX_JOBS"].isdigit()
    assert dict(os.environ) == before
    assert home_before == cpp_extension.CUDA_HOME
