"""python -m dsconv_cuda.info, where the operators load and where they do not."""

import platform
import re
import sys

import pytest
import torch
from fresh_process import ROOT, copy_of_sources, run


def info(package=ROOT, **environment) -> str:
    return run([sys.executable, "-m", "dsconv_cuda.info"], package=package, **environment).stdout


def rows(text: str) -> dict[tuple[str, str], str]:
    """(section, name) -> value"""
    found, section = {}, ""
    for line in text.splitlines():
        if match := re.fullmatch(r"  (\S.*?)  +(\S.*)", line):
            found[section, match.group(1)] = match.group(2)
        elif line:
            section = line
    return found


@pytest.fixture(scope="module")
def built():
    if not list((ROOT / "dsconv_cuda").glob("_C.*.so")):
        pytest.skip("no prebuilt library in the checkout: python setup.py build_ext --inplace")
    return rows(info(DSCONV_JIT="0", DSCONV_CPU_ISA=None))


def test_this_process(built):
    assert built["This process", "torch"] == torch.__version__
    assert built["This process", "CUDA of torch"] == (torch.version.cuda or "none")
    assert built["This process", "Python"] == platform.python_version()


def test_library_and_build(built):
    assert built["The library", "origin"] == "prebuilt"
    assert built["The library", "file"].startswith(str(ROOT / "dsconv_cuda" / "_C."))
    cuda = built["The library", "CUDA kernels"]
    assert cuda in ("yes", "no")
    assert (built["How it was built", "CUDA"] == "not built in") == (cuda == "no")
    assert re.match(r"2\.\d+\.\d+", built["How it was built", "torch"])
    assert "-O" in built["How it was built", "C++ flags"]
    if cuda == "yes":
        assert re.fullmatch(r"sm_\d+(, sm_\d+)*", built["How it was built", "architectures"])


def test_active_isa_is_the_best_available(built):
    available = built["CPU kernels", "this machine runs"].split(", ")
    assert available[0] == "generic"
    assert built["CPU kernels", "active"] == available[-1]
    assert set(available) <= set(built["CPU kernels", "built"].split(", "))


def test_isa_can_be_lowered(built):
    lowered = rows(info(DSCONV_JIT="0", DSCONV_CPU_ISA="generic"))
    assert lowered["CPU kernels", "active"] == "generic"
    assert lowered["CPU kernels", "bfloat16"].startswith("computed in float32")


def test_bfloat16_tells_whether_the_dot_product_is_used(built):
    from dsconv_cuda import _loader

    available = _loader.load_library().module.bf16_dot_available()
    assert (built["CPU kernels", "bfloat16"] == "forward by AVX512-BF16") == available


def test_unknown_isa_is_shown_and_does_not_stop_it(built):
    text = rows(info(DSCONV_JIT="0", DSCONV_CPU_ISA="mmx"))["CPU kernels", "active"]
    assert text.startswith("none: ")
    assert "mmx" in text
    assert "generic" in text


def test_where_the_operators_do_not_load(tmp_path):
    text = info(copy_of_sources(tmp_path / "checkout"), DSCONV_JIT="0")
    assert rows(text)["This process", "torch"] == torch.__version__
    assert "The operators do not load" in text
    assert "pip install --no-build-isolation ." in text
