"""Packed weights between the calls of a compiled graph, as kept_weights.py has them for modules in eager mode.

A graph holds no module that could keep them. So where torch.compile meets a call without gradients whose weights are
parameters, on the CPU, the graph holds the op fwd_packed. Its kernel is here, in Python, since only Python sees the
version counters of tensors; small weights are packed at each call, which takes less. It keeps what it packed as long
as the pointwise weight lives, one copy for each set of arguments, and what counts as the same weights is what
kept_weights.py says. Exports hold fwd.
"""

import functools
import weakref

import torch
from torch import Tensor, nn

from dsconv_cuda import graph_ops

_SCHEMA = (
    "fwd_packed(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[] arguments) -> "
    "Tensor"
)

# Elements of the pointwise weight from which packing it takes longer than finding what is kept.
LEAST_ELEMENTS = 1 << 15

registered = False
# By id() of the pointwise weight: the arguments, and what is packed for them.
_kept: dict[int, tuple[weakref.ref, list[tuple[tuple, Tensor]]]] = {}
stores: list[dict] = [_kept]  # of everything that is kept between calls of compiled graphs


def register(fragment: torch.library.Library, fwd_fake) -> None:
    global registered
    fragment.define(_SCHEMA)
    fragment.impl("fwd_packed", _fwd_packed, "CPU")
    torch.library.register_fake("dsconv_cuda::fwd_packed", graph_ops.with_row(fwd_fake, 5))
    registered = True


def pay(x: Tensor, dw_weight: Tensor, pw_weight: Tensor) -> bool:
    """Whether a call that is being traced, and needs no gradients, should become fwd_packed."""
    return (
        registered
        and torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and isinstance(dw_weight, nn.Parameter)
        and isinstance(pw_weight, nn.Parameter)
        and x.device.type == "cpu"
        and pw_weight.numel() >= LEAST_ELEMENTS
    )


def clear() -> None:
    for store in stores:
        store.clear()


def _fwd_packed(x, dw_weight, pw_weight, dw_bias, pw_bias, arguments) -> Tensor:
    # In as little Python as can be: after a layer of some megabytes each line of it comes from memory again.
    try:
        version = dw_weight._version + pw_weight._version
        if dw_bias is not None:
            version += dw_bias._version
        if pw_bias is not None:
            version += pw_bias._version
    except RuntimeError:  # inference tensors have no version counter
        return torch.ops.dsconv_cuda.fwd_in_graph.default(x, dw_weight, pw_weight, dw_bias, pw_bias, arguments)
    key = (dw_weight.shape, *arguments)
    entry = _kept.get(id(pw_weight))
    if entry is not None and entry[0]() is pw_weight:
        for packed_for, memory in entry[1]:
            if packed_for == key:
                return _fwd_kept()(x, dw_weight, pw_weight, dw_bias, pw_bias, memory, version)
    return _fwd_kept()(x, dw_weight, pw_weight, dw_bias, pw_bias, _new_memory(dw_weight, pw_weight, key), version)


def _new_memory(dw_weight: Tensor, pw_weight: Tensor, key: tuple) -> Tensor:
    name = id(pw_weight)
    entry = _kept.get(name)
    if entry is None or entry[0]() is not pw_weight:
        entry = _kept[name] = (weakref.ref(pw_weight, lambda _: _kept.pop(name, None)), [])
    memory = torch.ops.dsconv_cuda.keep.default(dw_weight, pw_weight, *graph_ops.of_row(key[1:])[:5])
    entry[1].append((key, memory))
    return memory


@functools.cache
def _fwd_kept():
    return torch.ops.dsconv_cuda.fwd_kept.default
