"""Compiles the operators from the sources that the package carries, with the flags that setup.py uses."""

import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from . import _loader

DEFAULT_NAME = "dsconv_cuda_jit"


def load(
    name: str | None = None,
    *,
    cuda: bool | None = None,
    verbose: bool = False,
    build_directory: str | os.PathLike | None = None,
    extra_cflags: Sequence[str] = (),
    extra_cuda_cflags: Sequence[str] = (),
) -> ModuleType:
    """Compiles the operators and loads them into this process; to be called before their first use.

    A process holds one library of operators. Where one is loaded that is what this call asks for, it is returned;
    where it is another, RuntimeError says so.

    Args:
        name: of the Python module, and part of the folder's name.
        cuda: True compiles the CUDA kernels, or raises where they cannot be; False leaves them out; None compiles them
            where this process sees a GPU and the CUDA toolkit is there.
        verbose: prints the compiler's output.
        build_directory: where the objects and the library go. The default is a folder under TORCH_EXTENSIONS_DIR, or
            torch's own cache, whose name depends on the sources, the flags and the version of torch.
        extra_cflags, extra_cuda_cflags: added to the flags of the C++ compiler and of nvcc.

    Returns:
        The module: build_info() and what else csrc/register.cpp defines.
    """
    with _loader.lock():
        if _loader.operators_registered():
            return _already_loaded(name, cuda, build_directory, extra_cflags, extra_cuda_cflags)
        module, key = compile_library(
            name,
            cuda=cuda,
            verbose=verbose,
            build_directory=build_directory,
            extra_cflags=extra_cflags,
            extra_cuda_cflags=extra_cuda_cflags,
        )
        _loader.adopt(_loader.Library("compiled by dsconv_cuda.load()", module.__file__, module, key))
        return module


def compile_library(
    name: str | None = None,
    *,
    cuda: bool | None = None,
    verbose: bool = False,
    build_directory: str | os.PathLike | None = None,
    extra_cflags: Sequence[str] = (),
    extra_cuda_cflags: Sequence[str] = (),
) -> tuple[ModuleType, str]:
    """Compiles and loads, and returns the module and the key of what went into it. The caller holds _loader.lock()."""
    from . import _build

    name = name or DEFAULT_NAME
    verbose = verbose or _build.switched_on("DSCONV_VERBOSE")
    csrc = csrc_directory()
    parameters, key = _request(csrc, cuda, extra_cflags, extra_cuda_cflags)
    folder = Path(build_directory or Path(_cache_root(), f"{name}-{key}"))
    folder.mkdir(parents=True, exist_ok=True)
    if verbose:
        print(_build.report(parameters), file=sys.stderr, flush=True)
    if verbose or not (folder / f"{name}.so").exists():
        what = "with the CUDA kernels" if parameters.cuda else "for the CPU only"
        print(
            f"dsconv_cuda: compiling the operators {what} in {folder}, once. If another process that did the same was "
            f"killed and this one waits for it, delete {folder / 'lock'}.",
            file=sys.stderr,
            flush=True,
        )
    with _build.build_environment(parameters):
        # load() joins the flags with blanks into a shell command.
        module = _build.cpp_extension.load(
            name,
            parameters.sources,
            extra_cflags=[shlex.quote(flag) for flag in parameters.cxx_flags],
            extra_cuda_cflags=[shlex.quote(flag) for flag in parameters.nvcc_flags],
            extra_include_paths=parameters.include_dirs,
            build_directory=str(folder),
            with_cuda=parameters.cuda,
            verbose=verbose,
        )
    return module, key


def csrc_directory() -> Path:
    """The sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "register.cpp").exists():
            return folder
    raise ImportError(f"The sources of dsconv_cuda are neither in {package / 'csrc'} nor in {package.parent / 'csrc'}.")


def _request(csrc: Path, cuda: bool | None, extra_cflags: Sequence[str], extra_cuda_cflags: Sequence[str]):
    """The build parameters of a request, and a key that differs wherever the library would."""
    import torch

    from . import _build

    gpus = _build.gpu_architectures()
    # Kernels that no GPU of this process can run are compiled only on demand.
    if cuda is None and not gpus and not _build.switched_on("FORCE_CUDA"):
        cuda = False
    parameters = _build.build_parameters(
        csrc,
        cuda=cuda,
        architectures=gpus,
        extra_cxx_flags=tuple(extra_cflags),
        extra_nvcc_flags=tuple(extra_cuda_cflags),
    )
    digest = hashlib.sha256()
    what = (torch.__version__, sys.version, parameters.cxx_flags, parameters.arch_list, parameters.toolkit)
    digest.update(repr((*what, parameters.nvcc_flags if parameters.cuda else ())).encode())
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return parameters, digest.hexdigest()[:16]


def _cache_root() -> str:
    from . import _build

    return os.environ.get("TORCH_EXTENSIONS_DIR") or _build.cpp_extension.get_default_build_root()


def _already_loaded(name, cuda, build_directory, extra_cflags, extra_cuda_cflags) -> ModuleType:
    library = _loader.load_library()
    module = library.module
    if module is not None:
        anything_goes = name is None and build_directory is None and not extra_cflags and not extra_cuda_cflags
        if anything_goes and cuda in (None, _loader.cuda_kernels_loaded()):
            return module
        same_name = name is None or name == module.__name__
        same_folder = build_directory is None or Path(build_directory).resolve() == Path(library.path).resolve().parent
        if library.key is not None and same_name and same_folder:
            _, key = _request(csrc_directory(), cuda, extra_cflags, extra_cuda_cflags)
            if key == library.key:
                return module
    raise RuntimeError(
        f"dsconv_cuda.load(): this process has the operators already ({library.origin}: "
        f"{library.path or 'path unknown'}), built otherwise than this call asks for, and torch takes them from one "
        "library only. Call dsconv_cuda.load() in a new process, before any operator is used."
    )
