"""What the graphs of torch.compile hold: ops without gradients of their own and with few arguments.

By the time a graph is recorded, autograd has done its work. ``fwd`` would be looked for gradients at each call
nevertheless, by a function in Python, and each list among an op's arguments is taken apart by the dispatcher; on a
small layer both take longer than the kernel. So where torch.compile records one of the ops below, its graph gets

    fwd             fwd_in_graph
    fwd_with_pre    fwd_with_pre_in_graph
    bwd             bwd_in_graph

which are the same kernels with what is no tensor in one list, a *row*: (*stride, *padding, *dilation, act, out_act,
fast). Exports and make_fx keep the ops that have gradients and decompositions. On the CPU batchnorm_graph.py puts
``train_fwd_in_graph`` and ``train_bwd_in_graph`` for a block with two norms, compiled_weights.py ``fwd_packed`` and
compiled_folding.py ``fwd_folded`` and ``fwd_after_norm_in_graph``.
"""

import torch
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from dsconv_cuda import _checks

# The tensors in front of the other arguments.
TENSORS = {"fwd": 5, "fwd_with_pre": 5, "bwd": 6}


def row(stride, padding, dilation, act: int, out_act: int, fast: bool = False) -> list[int]:
    return [*stride, *padding, *dilation, act, out_act, int(fast)]


def of_row(arguments: list[int]) -> tuple:
    """(stride, padding, dilation, act, out_act, fast)."""
    axes = (len(arguments) - 3) // 4
    *_, act, out_act, fast = arguments
    return arguments[:axes], arguments[axes : 3 * axes], arguments[3 * axes : 4 * axes], act, out_act, bool(fast)


def recording() -> bool:
    """Whether what is being recorded is a graph of torch.compile."""
    return torch._guards.TracingContext.try_get() is not None and not torch.compiler.is_exporting()


def register(fragment: torch.library.Library, fakes: dict) -> None:
    """fakes: those of the ops that have gradients, by name."""
    for name, tensors in TENSORS.items():
        fragment.impl(f"{name}_in_graph", torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"dsconv_cuda::{name}_in_graph", with_row(fakes[name], tensors))
        rule = _rule(getattr(torch.ops.dsconv_cuda, f"{name}_in_graph").default, tensors, masks=int(name == "bwd"))
        torch.library.register_torch_dispatch(f"dsconv_cuda::{name}", ProxyTorchDispatchMode, rule)
    with_norm_before = with_row(fakes["fwd"], 5)
    fragment.impl("fwd_after_norm_in_graph", torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake("dsconv_cuda::fwd_after_norm_in_graph", lambda *args: with_norm_before(*args[:6]))
    of_block = {"train_fwd": _train_fwd_fake(fakes["fwd"]), "train_bwd": _train_bwd_fake(fakes["bwd"])}
    for name, fake in of_block.items():
        fragment.impl(f"{name}_in_graph", torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"dsconv_cuda::{name}_in_graph", fake)


def _rule(in_graph, tensors: int, masks: int):
    def rule(mode, func, types, args, kwargs):
        if not recording():
            return mode.__torch_dispatch__(func, types, args, kwargs)
        *geometry, act, out_act = args[tensors : tensors + 5]
        rest = args[tensors + 5 :]
        grad_mask, fast = rest[:masks], rest[masks:]  # a default is not among args
        with mode:
            return in_graph(*args[:tensors], row(*geometry, act, out_act, *fast), *grad_mask)

    return rule


def with_row(function, tensors: int):
    """`function` of an op's arguments as one of so many tensors, a row, and what comes between that and `fast`."""

    def of_row_of(*args):
        *arguments, fast = of_row(args[tensors])
        return function(*args[:tensors], *arguments, *args[tensors + 1 :], fast)

    return of_row_of


def _train_fwd_fake(fwd_fake):
    def fake(
        x, dw_weight, pw_weight, dw_bias, pw_bias, weight1, bias1, weight2, bias2, eps1, eps2, arguments, in_vectors,
        in_act, defer,
    ):  # fmt: skip
        y = fwd_fake(x, dw_weight, pw_weight, dw_bias, pw_bias, *of_row(arguments))
        channels = dw_weight.shape[0], pw_weight.shape[0]
        vectors, moments = ([x.new_empty(n, c, dtype=torch.float64) for c in channels] for n in (4, 2))
        return y, x.new_empty(0) if defer else torch.empty_like(y), *vectors, *moments

    return fake


def _train_bwd_fake(bwd_fake):
    def fake(
        grad, y, x, dw_weight, pw_weight, dw_bias, pw_bias, vectors1, vectors2, arguments, grad_mask, in_vectors, in_act
    ):
        *geometry, act, out_act, fast = of_row(arguments)
        grads = bwd_fake(grad, x, dw_weight, pw_weight, dw_bias, None, *geometry, act, out_act, grad_mask, fast)
        dtype, affine = _checks.wide_dtype(x.dtype), []
        for weight in (dw_weight, pw_weight):
            for _ in range(2):
                asked = grad_mask >> len((*grads, *affine)) & 1
                affine.append(x.new_empty(weight.shape[0] if asked else 0, dtype=dtype))
        return *grads, *affine

    return fake
