"""Builds the CUDA kernels for the host, where the engine of this folder runs them.

Needs g++ and, for the torch library, the headers of torch and pybind11; no CUDA toolkit.

Objects are kept in the build directory under the hash of what they were made from, so a second call compiles nothing.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

ENGINE_SOURCES = tuple(
    HERE / f"{name}.cpp"
    for name in ("async_copy", "engine", "fiber", "host_runtime", "shared_memory", "tensor_core", "warp")
)
COUNT = "-DCUDA_HOST_COUNT"
SANITIZERS = ("address,undefined", "thread")
# A misaligned access of a vector, which a GPU refuses, would work on the host: here it ends the process as an illegal
# instruction, for which no library of a sanitizer is needed.
ALIGNMENT = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
PARALLEL_COMPILES = 2


class CompileError(RuntimeError):
    pass


def build_emulated_extension(build_dir: Path | str) -> Path:
    """A library for torch.ops.load_library() in which torch.ops.dsconv_cuda.* on CPU tensors run the CUDA kernels."""
    flags = _kernel_flags(None) + _torch_flags() + ["-DTORCH_EXTENSION_NAME=dsconv_cuda_emulated"]
    torch_sources = [
        CSRC / "register.cpp",
        CSRC / "cuda" / "cuda_plan_query.cpp",
        HERE / "no_cpu_kernels.cpp",
        CSRC / "cuda" / "op_cuda.cu",
        CSRC / "cuda" / "op_cuda_norm.cu",
    ]
    jobs = [(source, flags) for source in torch_sources]
    jobs += [(source, [*_kernel_flags(None), *ALIGNMENT]) for source in kernel_sources()]
    jobs += [(source, _engine_flags(None)) for source in ENGINE_SOURCES]
    return _build(Path(build_dir), "dsconv_cuda_emulated.so", jobs, ["-shared", *_torch_libraries()])


def build_driver(build_dir: Path | str, sanitizer: str | None = None) -> Path:
    """The program driver.cpp, which runs the launchers over a matrix of configurations without torch."""
    jobs = [(source, _kernel_flags(sanitizer)) for source in (HERE / "driver.cpp", *kernel_sources())]
    return _build_program(Path(build_dir), "driver", jobs, sanitizer)


def build_engine_cases(build_dir: Path | str, sanitizer: str | None = None, *, ucontext: bool = False) -> Path:
    """The program engine_cases.cpp: kernels with a planted bug, each beside itself without it."""
    flags = _kernel_flags(sanitizer) + ([] if sanitizer else [*ALIGNMENT])
    jobs = [(HERE / "engine_cases.cpp", flags)]
    return _build_program(Path(build_dir), "engine_cases", jobs, sanitizer, ucontext=ucontext)


def build_traffic(build_dir: Path | str) -> Path:
    """The program traffic.cpp, which counts the memory accesses of the kernels (counters.h)."""
    jobs = [(source, _counted_flags()) for source in kernel_sources()]
    jobs += [(HERE / "traffic.cpp", [*_kernel_flags(None), COUNT])]
    return _build_counting(Path(build_dir), "traffic", jobs)


def build_counter_cases(build_dir: Path | str) -> Path:
    """The program counter_cases.cpp: small kernels whose accesses were counted by hand."""
    jobs = [(HERE / "counter_kernels.cpp", _counted_flags())]
    jobs += [(HERE / "counter_cases.cpp", [*_kernel_flags(None), COUNT])]
    return _build_counting(Path(build_dir), "counter_cases", jobs)


def kernel_sources() -> list[Path]:
    """The torch-free .cu files, but for the one that only nvcc can answer (what nvcc was told)."""
    return sorted(path for path in (CSRC / "cuda").glob("cuda_*.cu") if path.name != "cuda_build_info.cu")


def _build_counting(build_dir: Path, name: str, jobs) -> Path:
    engine_flags = [*_engine_flags(None), COUNT]
    jobs = jobs + [(source, engine_flags) for source in (*ENGINE_SOURCES, HERE / "counters.cpp")]
    return _build(build_dir, name, jobs, ["-rdynamic", "-ldl"])  # the symbols of kernels are looked up


def _build_program(build_dir, name, jobs, sanitizer, *, ucontext=False) -> Path:
    engine_flags = _engine_flags(sanitizer) + (["-DCUDA_HOST_UCONTEXT"] if ucontext else [])
    jobs = jobs + [(source, engine_flags) for source in ENGINE_SOURCES]
    return _build(build_dir, name, jobs, _sanitizer_flags(sanitizer))


# --- flags -----------------------------------------------------------------------------------------------------------


def _sanitizer_flags(sanitizer: str | None) -> list[str]:
    if sanitizer is None:
        return []
    if sanitizer not in SANITIZERS:
        raise ValueError(f"sanitizer must be None or one of {SANITIZERS}, got {sanitizer!r}")
    return [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def _kernel_flags(sanitizer: str | None) -> list[str]:
    # fmaf as one instruction, and no contraction that the source does not ask for. Kernels reinterpret shared memory as
    # vectors, which nvcc allows.
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", *_machine_flags()]
    flags += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DDSCONV_EMULATED", f"-I{HERE}"]
    return flags + _sanitizer_flags(sanitizer)


def _counted_flags() -> list[str]:
    """Kernels that call a function for every access and every basic block; counters.cpp defines these. Accesses stay as
    the source has them: no vectors made or taken apart, no block moved behind the loop it belongs to."""
    flags = [*_kernel_flags(None), "-O1", "-fno-tree-sra", "-fno-reorder-blocks", COUNT]
    return [*flags, "-fsanitize=thread", "-fsanitize-coverage=trace-pc"]


def _engine_flags(sanitizer: str | None) -> list[str]:
    """The engine itself is not instrumented: it only tells the sanitizer of fibers and of what orders memory."""
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", "-fno-tree-loop-distribute-patterns"]
    if sanitizer == "thread":
        flags.append("-DCUDA_HOST_TSAN")
    elif sanitizer is not None:
        flags.append("-DCUDA_HOST_ASAN")
    return flags


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        features = Path("/proc/cpuinfo").read_text().split()
        if "fma" in features and "avx2" in features:
            return ("-mavx2", "-mfma")
    return ()


def _torch_flags() -> list[str]:
    import pybind11
    from torch.utils import cpp_extension

    folders = [*cpp_extension.include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
    return [option for folder in folders for option in ("-isystem", folder)]


def _torch_libraries() -> list[str]:
    from torch.utils import cpp_extension

    paths = cpp_extension.library_paths()
    return [f"-L{path}" for path in paths] + [f"-Wl,-rpath,{path}" for path in paths] + ["-ltorch_cpu", "-ltorch"]


# --- compiling -------------------------------------------------------------------------------------------------------


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([*_compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _headers_hash() -> str:
    """Of every header that a source here may include; torch is known by its path and version."""
    paths = [path for pattern in ("*.h", "cpu/*.h", "cuda/*.h", "cuda/*.cuh") for path in CSRC.glob(pattern)]
    return _hash(*(path.read_bytes() for path in sorted([*paths, *HERE.glob("*.h")])))


def _torch_version(flags: Sequence[str]) -> str:
    if "-isystem" not in flags:
        return ""
    import torch

    return torch.__version__


@contextlib.contextmanager
def _locked(build_dir: Path) -> Iterator[None]:
    build_dir.mkdir(parents=True, exist_ok=True)
    with open(build_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def _compile(build_dir: Path, source: Path, flags: Sequence[str], headers: str) -> Path:
    key = _hash(_compiler_version(), source.read_bytes(), str(source), headers, _torch_version(flags), *flags)
    target = build_dir / "objects" / f"{source.stem}-{key}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".tmp")
        language = ["-x", "c++"]  # .cu as well
        _run([*_compiler(), *flags, *language, "-c", str(source), "-o", str(unfinished)])
        unfinished.rename(target)
    return target


def _build(build_dir: Path, name: str, jobs: Sequence[tuple[Path, Sequence[str]]], link_flags: Sequence[str]) -> Path:
    build_dir = build_dir.resolve()
    headers = _headers_hash()
    with _locked(build_dir), ThreadPoolExecutor(PARALLEL_COMPILES) as pool:
        objects = list(pool.map(lambda job: _compile(build_dir, *job, headers), jobs))
        stem, suffix = os.path.splitext(name)
        key = _hash(_compiler_version(), *(path.name for path in objects), *link_flags)
        target = build_dir / f"{stem}-{key}{suffix}"
        if not target.exists():
            unfinished = target.with_suffix(".tmp")
            _run([*_compiler(), *map(str, objects), "-o", str(unfinished), *link_flags])
            unfinished.rename(target)
    return target
