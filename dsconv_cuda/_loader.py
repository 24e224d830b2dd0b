"""Finds the compiled operators, once per process, at first use and not at import.

operators registered already   by dsconv_cuda.load() or by a library of the user's own
-> dsconv_cuda._C              the prebuilt library
-> compile them                where DSCONV_JIT allows it (the default)
-> one ImportError             with each cause and the command that mends it
"""

import dataclasses
import importlib
import os
import sys
import threading
from types import ModuleType

import torch

INSTALL = "pip install --no-build-isolation ."


@dataclasses.dataclass(frozen=True)
class Library:
    """The library that holds the operators of this process."""

    origin: str
    path: str | None = None
    # Has build_info() and the planner queries; None where the operators came from outside of this package.
    module: ModuleType | None = None
    # What dsconv_cuda.load() was asked for: a second load() of the same gets this library.
    key: str | None = None


_lock = threading.RLock()
_library: Library | None = None
_failure: str | None = None
_kernels: set[tuple[str, str]] = set()  # that were asked for and found: asking takes some microseconds


def load_library() -> Library:
    """Makes torch.ops.dsconv_cuda usable and returns where it came from. Costs nothing after the first time."""
    if _library is not None:
        return _library
    with _lock:
        if _library is not None:
            return _library
        if operators_registered():
            return adopt(Library("registered before dsconv_cuda looked for it"))
        if _failure is not None:
            raise ImportError(_failure)
        return adopt(_find())


def loaded() -> Library | None:
    """The library, if there is one by now; never loads."""
    return _library


def adopt(library: Library) -> Library:
    """Makes a library whose operators are registered that of this process, and adds their Python parts."""
    global _library, _failure
    with _lock:
        importlib.import_module(".ops", __package__).register_python_parts()
        _library, _failure = library, None
    return library


def lock() -> threading.RLock:
    """Held while a library is loaded: whoever registers operators must hold it."""
    return _lock


def operators_registered() -> bool:
    return hasattr(torch.ops.dsconv_cuda, "fwd")


def has_kernel(op: str, key: str) -> bool:
    """Whether the loaded library has this operator with a kernel for a dispatch key."""
    if (op, key) in _kernels:
        return True
    found = hasattr(torch.ops.dsconv_cuda, op) and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"dsconv_cuda::{op}", key
    )
    if found:
        _kernels.add((op, key))
    return found


def cuda_kernels_loaded() -> bool:
    """True where the loaded library has the CUDA kernels, with or without a GPU in the machine."""
    return has_kernel("fwd", "CUDA")


def batch_norm_kernels_loaded(device_type: str) -> bool:
    """Whether the loaded library has the kernels of training through BatchNorm on such devices."""
    return has_kernel("z_moments", device_type.upper())


def tracks_in_one_call(device_type: str) -> bool:
    """Whether the loaded library moves running statistics of such devices itself: its CPU kernels do."""
    return device_type == "cpu" and has_kernel("norm_track", "CPU")


def jit_allowed() -> bool:
    return os.environ.get("DSCONV_JIT", "1") != "0"


def _find() -> Library:
    global _failure
    causes = []
    try:
        module = importlib.import_module("._C", __package__)
        return Library("prebuilt", module.__file__, module)
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}._C":
            raise
        causes.append(
            f"1. The prebuilt library dsconv_cuda._C is not there (looked in {os.path.dirname(__file__)}).\n"
            f"   To build it, in the source folder: {INSTALL}"
        )
    except (ImportError, RuntimeError) as error:
        causes.append(
            f"1. The prebuilt library dsconv_cuda._C does not load: {error}\n   {_remedy_of(error)}\n"
            f"   To build it again, in the source folder: {INSTALL}"
        )
    if jit_allowed():
        try:
            from . import jit

            module, key = jit.compile_library()
            return Library("compiled at first use", module.__file__, module, key)
        except Exception as error:
            causes.append(
                f"2. Compiling the operators now failed: {error}\n"
                '   To see all of it: DSCONV_VERBOSE=1 python -c "import dsconv_cuda; dsconv_cuda.load(verbose=True)"'
            )
    else:
        causes.append(
            f"2. Compiling the operators now is switched off: DSCONV_JIT={os.environ['DSCONV_JIT']}.\n"
            "   To allow it: unset DSCONV_JIT"
        )
    _failure = (
        f"The operators of dsconv_cuda cannot be loaded (torch {torch.__version__}, Python "
        f"{sys.version.split()[0]}).\n" + "\n".join(causes) + "\nFor the whole picture: python -m dsconv_cuda.info"
    )
    raise ImportError(_failure)


def _remedy_of(error: Exception) -> str:
    """Names what usually lies behind an import error of an extension that was built elsewhere or earlier."""
    text = str(error)
    if "libtorch_cuda" in text or "libc10_cuda" in text or "libcudart" in text:
        return (
            f"It was built with CUDA kernels, and torch {torch.__version__} has "
            + ("none." if torch.version.cuda is None else f"CUDA {torch.version.cuda}, another version.")
            + " Install the torch it was built for, or build it again."
        )
    if "undefined symbol" in text or "GLIBCXX" in text:
        return f"It was built against another torch or by another compiler than torch {torch.__version__} can serve."
    return "It was built for another environment, or the file is damaged."
