"""Packed weights between the calls of a compiled graph, as kept_weights.py has them for modules in eager mode.

A graph holds no module that could keep them. So where torch.compile meets a call without gradients whose weights are
large parameters, on the CPU, the graph holds the op fwd_packed. Its kernel is here, in Python, since only Python sees
the version counters of tensors. It keeps what it packed as long as the pointwise weight lives, one copy for each set of
arguments, and what counts as the same weights is what kept_weights.py says. Exports hold fwd.
"""

import weakref

import torch
from torch import Tensor, nn

# Elements of the pointwise weight from which packing takes longer than finding what is packed.
LEAST_ELEMENTS = 1 << 14

_SCHEMA = (
    "fwd_packed(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[2] stride, int[4] "
    "padding, int[2] dilation, int act, int out_act) -> Tensor"
)

registered = False
_kept: dict[int, tuple[weakref.ref, dict[tuple, Tensor]]] = {}  # by id() of the pointwise weight


def register(fragment: torch.library.Library, fake, vmap) -> None:
    global registered
    fragment.define(_SCHEMA)
    fragment.impl("fwd_packed", _fwd_packed, "CPU")
    torch.library.register_fake("dsconv_cuda::fwd_packed", fake)
    torch.library.register_vmap("dsconv_cuda::fwd_packed", vmap)
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
    _kept.clear()


def _fwd_packed(x, dw_weight, pw_weight, dw_bias, pw_bias, stride, padding, dilation, act, out_act) -> Tensor:
    ops = torch.ops.dsconv_cuda
    operands, arguments = (x, dw_weight, pw_weight, dw_bias, pw_bias), (stride, padding, dilation, act, out_act)
    weights = [t for t in operands[1:] if t is not None]
    if any(t.is_inference() for t in weights):  # have no version counter
        return ops.fwd.default(*operands, *arguments)
    key, name = (*dw_weight.shape, *stride, *padding, *dilation, act, out_act), id(pw_weight)
    entry = _kept.get(name)
    if entry is None or entry[0]() is not pw_weight:
        entry = _kept[name] = (weakref.ref(pw_weight, lambda _: _kept.pop(name, None)), {})
    memory = entry[1].get(key)
    if memory is None:
        memory = entry[1][key] = ops.keep.default(dw_weight, pw_weight, *arguments)
    return ops.fwd_kept.default(*operands, memory, sum(t._version for t in weights))
