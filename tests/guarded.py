"""Tensors behind whose end the memory may not be touched: a kernel that does dies of it, and pytest names the test."""

import ctypes
import mmap

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_WIDEST_ACCESS = 16  # bytes that the CUDA kernels read at once, where the place of a tensor allows it
_NAN = 0xFF  # in every byte: a NaN of every floating-point type

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def before_a_page(t: torch.Tensor, alignment: int = _WIDEST_ACCESS) -> torch.Tensor:
    """A copy of a tensor on the CPU with the same strides and the same address modulo `alignment`, as close as that
    allows before a page without access. What is before it and up to the page are NaNs."""
    if t.numel() == 0:
        return t
    extent = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    nbytes, page = extent * t.itemsize, mmap.PAGESIZE
    size = -(-(nbytes + alignment) // page) * page
    memory = torch.frombuffer(mmap.mmap(-1, size + page), dtype=torch.uint8)
    if _libc.mprotect(memory.data_ptr() + size, page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    begin = size - nbytes
    begin -= (begin - t.data_ptr()) % alignment
    memory[:size].fill_(_NAN)
    flat = memory[begin : begin + nbytes].view(t.dtype)
    flat.copy_(t.detach().as_strided((extent,), (1,)))
    return flat.as_strided(t.shape, t.stride())


class InputsEndAtPages(TorchDispatchMode):
    """Gives operators of dsconv_cuda such copies of what they read. For calls that no compiler traces."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dsconv_cuda":
            written = (a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
            args = [
                a if w else tree_map_only(torch.Tensor, before_a_page, a) for a, w in zip(args, written, strict=False)
            ]
        return func(*args, **(kwargs or {}))
