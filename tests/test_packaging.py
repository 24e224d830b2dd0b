"""The sdist and the wheel: what is in them, and that what is in them is enough to run."""

import email
import importlib.metadata
import sys
import tarfile
import zipfile

import pytest
from fresh_process import CHECK_OPERATORS, ROOT, copy_of_sources, run, run_python

pytestmark = pytest.mark.xdist_group("packaging")

SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return copy_of_sources(tmp_path_factory.mktemp("packaging") / "checkout")


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """A folder for PYTHONPATH in which torch is not installed."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "torch.py").write_text("raise ImportError('torch is not installed here')\n")
    return folder


@pytest.fixture(scope="module")
def sdist(sources, without_torch):
    run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation"],
        package=without_torch,
        cwd=sources,
        PATH="/usr/bin",
    )
    (path,) = (sources / "dist").glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, so that a file the sdist lacks fails here; without optimisation, to save time."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (checkout,) = folder.iterdir()
    run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation"],
        package=folder,
        cwd=checkout,
        DSCONV_CPU_ONLY="1",
        FORCE_CUDA=None,
        CXXFLAGS="-O0",
    )
    (path,) = (checkout / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed") / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    run(command, package=target)
    return target


def test_every_source_has_its_own_stem():
    """torch names objects by stem alone: two equal ones would overwrite each other."""
    stems = [path.stem for suffix in ("*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(suffix)]
    assert sorted(stems) == sorted(set(stems))


def test_sdist_needs_no_torch_and_no_compiler(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert set(SOURCES) <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", ".ci/run"} <= names
    assert {"dsconv_cuda/_build.py", "dsconv_cuda/models/__init__.py", "tests/test_packaging.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_carries_the_sources_and_the_library(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {f"dsconv_cuda/{source}" for source in SOURCES} <= set(names)
    assert {"dsconv_cuda/py.typed", "dsconv_cuda/models/__init__.py"} <= set(names)
    libraries = [name for name in names if name.endswith(".so")]
    assert len(libraries) == 1
    assert libraries[0].startswith("dsconv_cuda/_C.")
    assert not [name for name in names if not name.startswith(("dsconv_cuda/", "dsconv_cuda-"))]


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
        licenses = [name for name in archive.namelist() if name.endswith("LICENSE") and ".dist-info/" in name]
    assert metadata["Name"] == "dsconv_cuda"
    assert "BSD-3-Clause" in (metadata["License-Expression"], metadata["License"])
    assert licenses
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.10"]


def test_installed_wheel_runs(installed):
    where = run_python("import dsconv_cuda; print(dsconv_cuda.__file__)", package=installed, DSCONV_JIT="0")
    assert where.stdout.strip().startswith(str(installed))
    assert "agree" in run_python(CHECK_OPERATORS, package=installed, DSCONV_JIT="0").stdout


def test_installed_wheel_finds_its_own_sources(installed):
    code = "from dsconv_cuda import jit; print(jit.csrc_directory())"
    assert run_python(code, package=installed).stdout.strip() == str(installed / "dsconv_cuda" / "csrc")


def test_without_torch_setup_says_what_to_do(sources, without_torch):
    done = run([sys.executable, "setup.py", "build_ext"], package=without_torch, cwd=sources, check=False)
    assert done.returncode == 1
    assert "pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr


def test_formatters_are_pinned():
    pins = (ROOT / ".ci" / "requirements-format.txt").read_text()
    for tool in ("ruff", "clang-format"):
        assert f"{tool}=={importlib.metadata.version(tool)}" in pins
