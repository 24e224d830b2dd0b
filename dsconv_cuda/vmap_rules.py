"""The vmap rules of the ops and of the Functions around them.

A batch of inputs joins their images and is one call, and so is that of the gradients of inputs alone. A batch of
weights, or of gradients of weights, is one call of

    fwd_each, fwd_with_pre_each, bwd_each

which do one element after another (csrc/each_args.h): every element has a pointwise part of its own. PyTorch's rule
makes one grouped convolution of it. In nested transforms, and for the bare ops where a gradient follows, each element
is a call of its own.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsconv_cuda import compiled_weights, graph_ops
from dsconv_cuda.each import needs_gradient
from dsconv_cuda.ops import GRAD_X


def _transforms_active() -> bool:
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def derivatives_may_follow(tensors: tuple) -> bool:
    """Whether a call on `tensors` has to be differentiable."""
    return needs_gradient(tensors) or _transforms_active()


def forward_vmap(forward: Callable, each: Callable):
    """The rule of `forward`, an op or the apply of the Function around it; each(*args) is that of batches, which all
    tensors have in front, or returns None where it cannot be."""

    def rule(info, in_dims, x, *rest):
        if in_dims[0] is None or any(isinstance(d, int) for d in in_dims[1:5]) or info.batch_size == 0:
            return _of_elements(forward, each, 5, info.batch_size, in_dims, (x, *rest))
        # Images are independent of one another: the batch joins them.
        result = forward(_fold(x.movedim(in_dims[0], 0)), *rest)
        if isinstance(result, Tensor):
            return _unfold(result, info.batch_size), 0
        return tuple(_unfold(r, info.batch_size) for r in result), (0, 0)

    return rule


def backward_vmap(backward: Callable, each: Callable, saved_index: int, mask_index: int):
    """The rule of `backward`: dy and x, then weights and biases up to `saved_index`, `saved`, and the mask."""

    def rule(info, in_dims, *args):
        size = info.batch_size
        if any(isinstance(d, int) for d in in_dims[2:saved_index]) or args[mask_index] != GRAD_X or size == 0:
            return _of_elements(backward, each, saved_index + 1, size, in_dims, args)
        args = list(args)
        for i in (0, 1, saved_index):
            args[i] = _fold(_batch_first(args[i], in_dims[i], size))
        grad_x, *not_asked_for = backward(*args)
        return (_unfold(grad_x, size), *not_asked_for), (0, None, None, None, None)

    return rule


def _batch_first(t: Tensor | None, dim: int | None, batch_size: int):
    """`t` with its batch dimension in front; expanded there if it has none."""
    if t is None:
        return None
    return t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def _fold(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(t.shape[0] * t.shape[1], *t.shape[2:])


def _unfold(t: Tensor, batch_size: int) -> Tensor:
    return t.reshape(batch_size, t.shape[0] // batch_size, *t.shape[1:])


def _of_elements(op: Callable, each: Callable, tensors: int, batch_size: int, in_dims, args: tuple):
    results = None
    if batch_size > 0 and not _transforms_active():
        batches = (_batch_first(t, d, batch_size) for t, d in zip(args[:tensors], in_dims, strict=False))
        results = each(*batches, *args[tensors:])
    if results is None:
        return _for_each(op, batch_size, in_dims, args)
    return results, 0 if isinstance(results, Tensor) else (0,) * len(results)


def _for_each(op: Callable, batch_size: int, in_dims, args: tuple):
    """Calls `op` once for each element of the batch and stacks what it returns."""
    # in_dims has a list of None where an argument is a list of ints.
    batched = [isinstance(d, int) for d in in_dims]
    if batch_size == 0:  # one call on zeros tells the shapes
        zeros = [
            a.new_zeros(a.movedim(d, 0).shape[1:]) if b else a for a, d, b in zip(args, in_dims, batched, strict=True)
        ]
        results = op(*zeros)
        if isinstance(results, Tensor):
            return results.new_empty((0, *results.shape)), 0
        return tuple(r.new_empty((0, *r.shape)) for r in results), (0,) * len(results)
    columns = [
        a.unbind(d) if b else itertools.repeat(a, batch_size) for a, d, b in zip(args, in_dims, batched, strict=True)
    ]
    results = [op(*element) for element in zip(*columns, strict=True)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])


# ---- registration ----------------------------------------------------------------------------------------------------


def register(fragment: torch.library.Library, fakes: dict) -> None:
    """fakes: those of the ops that have gradients, by name."""
    ops = torch.ops.dsconv_cuda
    for name, tensors in graph_ops.TENSORS.items():
        fragment.impl(f"{name}_each", torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"dsconv_cuda::{name}_each", _fake(graph_ops.with_row(fakes[name], tensors)))

    def forward_rule(forward, each):
        return forward_vmap(forward, _without_gradient(5, lambda *args: each(*args[:5], graph_ops.row(*args[5:]))))

    @functools.partial(_without_gradient, 6)
    def bwd_each(*args):
        *geometry, act, out_act, grad_mask = args[6:12]
        return ops.bwd_each(*args[:6], graph_ops.row(*geometry, act, out_act, *args[12:]), grad_mask)

    torch.library.register_vmap("dsconv_cuda::fwd", forward_rule(ops.fwd, ops.fwd_each))
    torch.library.register_vmap("dsconv_cuda::fwd_with_pre", forward_rule(ops.fwd_with_pre, ops.fwd_with_pre_each))
    torch.library.register_vmap("dsconv_cuda::bwd", backward_vmap(ops.bwd, bwd_each, 5, 11))
    if compiled_weights.registered:
        rule = forward_vmap(graph_ops.with_row(ops.fwd, 5), _without_gradient(5, ops.fwd_each))
        torch.library.register_vmap("dsconv_cuda::fwd_packed", rule)


def _without_gradient(tensors: int, each: Callable):
    """`each`, which has no gradient, where none is needed."""
    return lambda *args: None if needs_gradient(args[:tensors]) else each(*args)


def _fake(of_element: Callable):
    """The fake kernel of a batch, from that of an element, whose results are dense."""

    def batch_of(size: int, one: Tensor) -> Tensor:
        return one.new_empty_strided((size, *one.shape), (max(one.numel(), 1), *one.stride()))

    def fake(*args):
        size = args[0].shape[0]
        results = of_element(*(a[0] if isinstance(a, Tensor) else a for a in args))
        return batch_of(size, results) if isinstance(results, Tensor) else tuple(batch_of(size, r) for r in results)

    return fake
