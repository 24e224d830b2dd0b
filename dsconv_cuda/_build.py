"""What is compiled, with which flags, and whether CUDA is in: the one source for setup.py and for jit.py.

setup.py loads this file by path, before the package exists, so it imports the standard library and torch only.
No flag here is mandatory: the files in csrc also compile from a bare torch.utils.cpp_extension.load().
"""

import contextlib
import dataclasses
import functools
import glob
import importlib.util
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

# On import torch guesses CUDA_HOME and warns about its guess; _find_cuda() below replaces it.
_logger = logging.getLogger("torch.utils.cpp_extension")
_logger.disabled = True
from torch.utils import cpp_extension  # noqa: E402

_logger.disabled = False

# What a build for any machine covers, and PTX of the newest, from which the driver makes code for later GPUs.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# A compile of the largest file takes less than this.
MEMORY_PER_JOB = 4 << 30

SWITCHES = (
    "FORCE_CUDA",
    "DSCONV_CPU_ONLY",
    "CUDA_HOME",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
    "DEBUG",
    "CXX",
    "CXXFLAGS",
    "NVCC_FLAGS",
)


class BuildError(RuntimeError):
    """A part that was asked for is missing; the message names it and what to do."""


@dataclasses.dataclass(frozen=True)
class Toolkit:
    home: str
    version: str  # of nvcc, such as 13.0


@dataclasses.dataclass(frozen=True)
class BuildParameters:
    sources: list[str]
    include_dirs: list[str]
    cxx_flags: list[str]
    nvcc_flags: list[str]
    toolkit: Toolkit | None  # None: CPU-only
    arch_list: str  # in the form of TORCH_CUDA_ARCH_LIST; empty for CPU-only
    max_jobs: int
    decisions: list[str]  # what was decided and why, a line each

    @property
    def cuda(self) -> bool:
        return self.toolkit is not None


def switched_on(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get(name, "").strip().lower() not in ("", "0", "off", "false", "no")


def build_parameters(
    csrc: Path,
    *,
    cuda: bool | None = None,
    architectures: tuple[str, ...] = (),
    extra_cxx_flags: tuple[str, ...] = (),
    extra_nvcc_flags: tuple[str, ...] = (),
) -> BuildParameters:
    """Decides how to compile the sources under csrc.

    cuda: True asks for CUDA and raises BuildError where a part is missing, False leaves it out, None takes it where
    everything is there (and follows FORCE_CUDA and DSCONV_CPU_ONLY).
    architectures: the default where TORCH_CUDA_ARCH_LIST is not set; DEFAULT_ARCHITECTURES where empty.
    """
    toolkit, reason = _choose_cuda(cuda)
    decisions = [f"CUDA kernels: {'yes' if toolkit else 'no'} ({reason})"]
    arch_list = ""
    if toolkit is not None:
        arch_list, reason = _choose_architectures(toolkit, architectures or DEFAULT_ARCHITECTURES)
        decisions.append(f"architectures: {arch_list} ({reason})")

    debug = switched_on("DEBUG")
    cxx_flags = ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3", "-g0"]
    nvcc_flags = ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3"]
    cxx_flags += ["-fvisibility=hidden"]
    nvcc_flags += ["-Xcompiler=-fvisibility=hidden"]
    cxx_flags += [*os.environ.get("CXXFLAGS", "").split(), *extra_cxx_flags]
    nvcc_flags += [*os.environ.get("NVCC_FLAGS", "").split(), *extra_nvcc_flags]
    decisions.append(f"mode: {'debug (DEBUG is set)' if debug else 'release'}")
    decisions.append(f"C++ flags: {' '.join(cxx_flags)}")
    if toolkit is not None:
        decisions.append(f"nvcc flags: {' '.join(nvcc_flags)}")

    include_dirs, reason = _pybind11_include_dirs()
    decisions.append(f"pybind11: {reason}")
    max_jobs, reason = _choose_max_jobs()
    decisions.append(f"parallel compiles: {max_jobs} ({reason})")
    return BuildParameters(
        sources=_sources(csrc, toolkit is not None),
        include_dirs=include_dirs,
        cxx_flags=[*cxx_flags, _record_flags(cxx_flags)],
        nvcc_flags=[*nvcc_flags, _record_flags(nvcc_flags)],
        toolkit=toolkit,
        arch_list=arch_list,
        max_jobs=max_jobs,
        decisions=decisions,
    )


@contextlib.contextmanager
def build_environment(parameters: BuildParameters) -> Iterator[None]:
    """Hands to torch.utils.cpp_extension what it reads from the environment, and takes it back afterwards."""
    wanted = {"MAX_JOBS": str(parameters.max_jobs)}
    if parameters.toolkit is not None:
        wanted["TORCH_CUDA_ARCH_LIST"] = parameters.arch_list
        wanted["CUDA_HOME"] = parameters.toolkit.home
    before = {name: os.environ.get(name) for name in wanted}
    cuda_home_before = cpp_extension.CUDA_HOME
    os.environ.update(wanted)
    if parameters.toolkit is not None:
        cpp_extension.CUDA_HOME = parameters.toolkit.home
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = cuda_home_before
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def report(parameters: BuildParameters) -> str:
    """The decisions as text, with a box around the notice that CUDA is left out."""
    compiler = " ".join(cpp_extension.get_cxx_compiler().split())
    lines = [
        f"dsconv_cuda: torch {torch.__version__}, CUDA of torch {torch.version.cuda or 'none'}, compiler {compiler}"
    ]
    lines += [f"  {line}" for line in parameters.decisions]
    given = [f"{name}={os.environ[name]}" for name in SWITCHES if os.environ.get(name)]
    lines.append(f"  switches in the environment: {', '.join(given) or 'none'}")
    if not parameters.cuda:
        notice = [
            "dsconv_cuda is built for the CPU only: tensors on a GPU will raise an error.",
            parameters.decisions[0],
        ]
        if not switched_on("DSCONV_CPU_ONLY"):
            notice.append("FORCE_CUDA=1 turns this notice into an error that says what to do.")
        lines += _boxed(notice)
    return "\n".join(lines)


def _boxed(lines: list[str]) -> list[str]:
    width = max(map(len, lines))
    edge = "+" + "-" * (width + 2) + "+"
    return [edge, *(f"| {line:<{width}} |" for line in lines), edge]


def _sources(csrc: Path, cuda: bool) -> list[str]:
    found = sorted(glob.glob("**/*.cpp", root_dir=csrc, recursive=True))
    if cuda:
        found += sorted(glob.glob("**/*.cu", root_dir=csrc, recursive=True))
    return [os.path.join(csrc, path) for path in found]


def _record_flags(flags: list[str]) -> str:
    """A macro that lets the build say how it was made; without it the build says that it does not know."""
    return '-DDSCONV_BUILD_FLAGS="{}"'.format(re.sub(r"[^\w+=.,:/ -]", "_", " ".join(flags)))


# --- CUDA ------------------------------------------------------------------------------------------------------------


def _choose_cuda(cuda: bool | None) -> tuple[Toolkit | None, str]:
    if cuda is False:
        return None, "cuda=False was passed"
    if cuda is None and switched_on("DSCONV_CPU_ONLY"):
        if switched_on("FORCE_CUDA"):
            raise BuildError("FORCE_CUDA and DSCONV_CPU_ONLY are both set: unset one of them.")
        return None, "DSCONV_CPU_ONLY is set"
    toolkit, reason, remedy = _find_cuda()
    if toolkit is None and (cuda or switched_on("FORCE_CUDA")):
        asked = "cuda=True was passed" if cuda else "FORCE_CUDA is set"
        raise BuildError(f"{asked}, but {reason}.\n{remedy}")
    return toolkit, reason


def _find_cuda() -> tuple[Toolkit | None, str, str]:
    """(toolkit, what was found, what to do where it is None)."""
    if torch.version.cuda is None:
        return (
            None,
            f"torch {torch.__version__} is a build without CUDA",
            "Install a CUDA build of torch (see https://pytorch.org/get-started/locally) and build again.",
        )
    install = (
        f"Install the CUDA toolkit {torch.version.cuda} (in containers: an image whose name has 'devel' in it), or set "
        "CUDA_HOME to the folder that holds bin/nvcc."
    )
    nvcc = _find_nvcc()
    if nvcc is None:
        where = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        looked = f"CUDA_HOME={where}" if where else "CUDA_HOME (not set), PATH and /usr/local/cuda*"
        return None, f"nvcc was not found in {looked}", install
    home, version = _toolkit_home(nvcc), _nvcc_version(nvcc)
    if home is None or version is None:
        return None, f"{nvcc} does not tell its toolkit or its version", install
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            None,
            f"nvcc {version} of {home} is of another major version than torch's CUDA {torch.version.cuda}",
            install,
        )
    return Toolkit(home, version), f"torch has CUDA {torch.version.cuda}, nvcc {version} is in {home}", ""


def _find_nvcc() -> str | None:
    # A CUDA_HOME that is set is a statement: where it is wrong, another toolkit would be a surprise.
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return shutil.which(os.path.join(home, "bin", "nvcc"))
    if nvcc := shutil.which("nvcc"):
        return nvcc
    newest_first = sorted(glob.glob("/usr/local/cuda-*"), key=_version_key, reverse=True)
    for home in ["/usr/local/cuda", *newest_first]:
        if nvcc := shutil.which(os.path.join(home, "bin", "nvcc")):
            return nvcc
    return None


def _version_key(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


@functools.cache
def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _toolkit_home(nvcc: str) -> str | None:
    """The toolkit of an nvcc that may be a link or a wrapper script outside of it."""
    candidates = [os.path.dirname(os.path.dirname(path)) for path in (nvcc, os.path.realpath(nvcc))]
    if top := re.search(r"\bTOP=(\S+)", _output_of(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)):
        candidates.append(os.path.realpath(top.group(1)))
    for home in candidates:
        headers = glob.glob(os.path.join(home, "include", "cuda_runtime.h"))
        headers += glob.glob(os.path.join(home, "targets", "*", "include", "cuda_runtime.h"))
        if headers and os.path.exists(os.path.join(home, "bin", "nvcc")):
            return home
    return None


def _nvcc_version(nvcc: str) -> str | None:
    found = re.search(r"\brelease (\d+\.\d+)", _output_of(nvcc, "--version"))
    return found.group(1) if found else None


def _choose_architectures(toolkit: Toolkit, default: tuple[str, ...]) -> tuple[str, str]:
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if given and given != "native":
        return given, "TORCH_CUDA_ARCH_LIST"
    visible = gpu_architectures()
    if given == "native" and visible:
        default, source = visible, "TORCH_CUDA_ARCH_LIST=native: the GPUs of this machine"
    else:
        source = "the default list" if default == DEFAULT_ARCHITECTURES else "the GPUs of this machine"
    known = re.findall(r"\bcompute_(\d+)", _output_of(os.path.join(toolkit.home, "bin", "nvcc"), "--list-gpu-arch"))
    kept = [arch for arch in default if arch.replace(".", "") in known and _torch_accepts(arch)]
    dropped = [arch for arch in default if arch not in kept]
    if not kept:
        raise BuildError(
            f"nvcc {toolkit.version} compiles for none of {', '.join(default)}. Set TORCH_CUDA_ARCH_LIST to something "
            f"that it lists ({', '.join(known) or 'nothing'}), or install another toolkit."
        )
    if dropped:
        source += f" without {', '.join(dropped)}, unknown to nvcc {toolkit.version} or torch {torch.__version__}"
    return ";".join(kept) + "+PTX", source


def gpu_architectures() -> tuple[str, ...]:
    """The compute capabilities of the GPUs that this process sees, lowest first; empty without one."""
    if not torch.cuda.is_available():
        return ()
    seen = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return tuple(f"{major}.{minor}" for major, minor in sorted(seen))


def _torch_accepts(arch: str) -> bool:
    # torch keeps the list of names it takes inside this function.
    flags_of = getattr(cpp_extension, "_get_cuda_arch_flags", None)
    if flags_of is None:
        return True
    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = arch
    try:
        return bool(flags_of())
    except ValueError:
        return False
    finally:
        if before is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before


# --- the rest --------------------------------------------------------------------------------------------------------


def _pybind11_include_dirs() -> tuple[list[str], str]:
    """None where torch's own include folder has pybind11, else that of the pybind11 package."""
    for folder in cpp_extension.include_paths():
        if os.path.exists(os.path.join(folder, "pybind11", "pybind11.h")):
            return [], "the headers that torch ships"
    package = importlib.util.find_spec("pybind11")
    if package is None or package.origin is None:
        raise BuildError("The headers of pybind11 were not found.\nInstall them with: pip install pybind11")
    folder = os.path.join(os.path.dirname(package.origin), "include")
    return [folder], f"the headers in {folder}"


def _choose_max_jobs() -> tuple[int, str]:
    given = os.environ.get("MAX_JOBS", "")
    if given.isdigit() and int(given) > 0:
        return int(given), "MAX_JOBS"
    cores, memory = len(os.sched_getaffinity(0)), _memory()
    reason = f"{cores} cores, {memory / (1 << 30):.1f} GiB of memory, 4 GiB a job"
    return max(1, min(cores, memory // MEMORY_PER_JOB)), reason


def _memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A container may have less than the machine.
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
