"""How the operators are found: nothing at import, one library a process, one error that says everything."""

import shutil

import pytest
from fresh_process import ROOT, copy_of_sources, run_python

LOAD = "from dsconv_cuda import _loader; print(_loader.load_library().origin)"


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory):
    """The package without a prebuilt library."""
    return copy_of_sources(tmp_path_factory.mktemp("loader") / "checkout")


@pytest.fixture
def unbuilt_copy(unbuilt, tmp_path):
    return shutil.copytree(unbuilt, tmp_path / "checkout")


def prebuilt_library():
    found = list((ROOT / "dsconv_cuda").glob("_C.*.so"))
    if not found:
        pytest.skip("no prebuilt library in the checkout: python setup.py build_ext --inplace")
    return found[0]


def test_import_loads_and_builds_nothing(unbuilt, tmp_path):
    code = """
import sys
import dsconv_cuda
from dsconv_cuda import _loader
assert _loader.loaded() is None and not _loader.operators_registered()
assert "torch.utils.cpp_extension" not in sys.modules
"""
    run_python(code, package=unbuilt, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_prebuilt_library_is_taken_first():
    prebuilt_library()
    assert run_python(LOAD, DSCONV_JIT="0").stdout.strip() == "prebuilt"


def test_first_use_from_many_threads():
    prebuilt_library()
    code = """
import threading
from dsconv_cuda import _loader
barrier, seen = threading.Barrier(8), []
def use():
    barrier.wait()
    seen.append(_loader.load_library())
threads = [threading.Thread(target=use) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(seen) == 8 and len({id(library) for library in seen}) == 1
"""
    run_python(code, DSCONV_JIT="0")


def test_without_library_and_jit_one_error_says_what_to_do(unbuilt):
    code = """
from dsconv_cuda import _loader
for _ in range(2):
    try:
        _loader.load_library()
    except ImportError as error:
        print(error)
    else:
        raise SystemExit("it loaded")
"""
    text = run_python(code, package=unbuilt, DSCONV_JIT="0").stdout
    assert text.count("The operators of dsconv_cuda cannot be loaded") == 2
    assert "dsconv_cuda._C is not there" in text
    assert "pip install --no-build-isolation ." in text
    assert "DSCONV_JIT=0" in text
    assert "unset DSCONV_JIT" in text
    assert "python -m dsconv_cuda.info" in text


def test_error_of_the_compiler_is_in_the_message(unbuilt, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\necho no space left for cats >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    done = run_python(
        LOAD, package=unbuilt, check=False, CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(tmp_path), FORCE_CUDA=None
    )
    assert done.returncode == 1
    assert "ImportError: The operators of dsconv_cuda cannot be loaded" in done.stderr
    assert "no space left for cats" in done.stderr


@pytest.mark.parametrize(
    ("content", "expected"), [("", "file too short"), ("not a library " * 100, "invalid ELF header")]
)
def test_damaged_library(unbuilt_copy, content, expected):
    (unbuilt_copy / "dsconv_cuda" / "_C.abi3.so").write_text(content)
    done = run_python(LOAD, package=unbuilt_copy, check=False, DSCONV_JIT="0")
    assert "dsconv_cuda._C does not load" in done.stderr
    assert expected in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr


def test_library_built_for_another_torch_is_explained():
    from dsconv_cuda import _loader

    text = _loader._remedy_of(ImportError("libtorch_cuda.so: cannot open shared object file"))
    assert "built with CUDA kernels" in text
    assert "another torch" in _loader._remedy_of(ImportError("_C.so: undefined symbol: aoti_torch_new"))


def test_operators_registered_elsewhere_are_used():
    library = prebuilt_library()
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
from dsconv_cuda import _loader
library = _loader.load_library()
assert library.module is None
print(library.origin)
"""
    assert "registered before" in run_python(code).stdout


def test_second_library_is_refused_with_a_reason():
    prebuilt_library()
    code = """
import dsconv_cuda
from dsconv_cuda import _loader
library = _loader.load_library()
assert dsconv_cuda.load() is library.module
assert dsconv_cuda.load(cuda=_loader.cuda_kernels_loaded()) is library.module
for other in ({"extra_cflags": ["-O1"]}, {"name": "mine"}, {"cuda": not _loader.cuda_kernels_loaded()}):
    try:
        dsconv_cuda.load(**other)
    except RuntimeError as error:
        assert library.path in str(error) and "new process" in str(error), error
    else:
        raise SystemExit(f"{other} did not raise")
"""
    run_python(code, DSCONV_JIT="0")
