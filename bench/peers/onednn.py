"""oneDNN from its C++ interface, by onednn.cpp: the library that PyTorch and OpenVINO compute with, without them.

Its headers and its library have to be where the compiler finds them (Debian: libdnnl-dev).
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from . import BLOCKED, Call, CannotDo, require

PACKAGES = ()
SOURCE = Path(__file__).with_name("onednn.cpp")
FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC", "-fopenmp")
# In the order of onednn.cpp's Sizes.
SIZES = ("n", "c", "h", "w", "c_mid", "c_out", "h_out", "w_out", "kernel_h", "kernel_w", "stride", "dilation")
SIZES += ("pad_h", "pad_w", "bf16", "training", "relu6", "out_relu6")


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in SIZES]


def available():
    return _library() is not None


def versions():
    return {"oneDNN": _library().version().decode()}


def prepare(arena, threads):
    require(arena, modes=("forward", "training"), dtypes=(torch.float32, torch.bfloat16))
    library, problem, layer = _library(), arena.problem, arena.problem.layer
    sizes = Sizes(
        *(layer.batch, layer.channels, layer.height, layer.width, layer.middle_channels, layer.out_channels),
        *(*layer.out_size, *layer.kernel, layer.stride, layer.dilation, *layer.padding),
        *(problem.dtype == torch.bfloat16, problem.mode == "training"),
        *(problem.activation == "relu6", problem.out_activation == "relu6"),
    )
    library.use_threads(threads)
    held = [tensor.float().contiguous() for tensor in (arena.x, *arena.state.values(), arena.dy)]
    pointers = [tensor.data_ptr() for tensor in held]
    pair = library.pair_create(ctypes.byref(sizes), (ctypes.c_void_p * 5)(*pointers[:5]), pointers[5])
    if not pair:
        raise CannotDo(f"{layer.name}, {problem.mode}: {library.pair_error().decode()}")
    owner = _Owner(library, pair, held)
    shapes = [arena.dy.shape]
    if sizes.training:
        shapes += [arena.x.shape, *(values.shape for values in arena.state.values())]
    return {BLOCKED: Call(owner.run, lambda _: tuple(owner.result(i, shape) for i, shape in enumerate(shapes)))}


class _Owner:
    """A pair of onednn.cpp, and what it reads."""

    def __init__(self, library, pair, held):
        self.library, self.pair, self.held = library, pair, held

    def run(self):
        self.library.pair_run(self.pair)

    def result(self, index, shape):
        target = torch.empty(shape)
        self.library.pair_result(self.pair, index, target.data_ptr())
        return target

    def __del__(self):
        self.library.pair_free(self.pair)


@functools.cache
def _library():
    """None where it does not compile, which is where oneDNN is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "onednn.so"
        command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, str(SOURCE), "-ldnnl", "-o", str(target)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        library = ctypes.CDLL(str(target))
    pointer = ctypes.c_void_p
    library.pair_create.restype, library.pair_create.argtypes = pointer, (pointer, pointer, pointer)
    library.pair_error.restype = library.version.restype = ctypes.c_char_p
    library.pair_run.argtypes = library.pair_free.argtypes = (pointer,)
    library.pair_result.argtypes = (pointer, ctypes.c_int, pointer)
    for name in ("pair_run", "pair_result", "pair_free", "use_threads"):
        getattr(library, name).restype = None
    return library
