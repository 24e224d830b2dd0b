"""What a norm and an activation make of a tensor, not made yet.

    Deferred    act(gamma * yhat + beta), of which there are y and the vectors of the channels

A chain of fuse() takes y, and makes the value as its kernels read it. For everybody else a Deferred is the tensor that
it stands for: what is done with it, but to ask for its shape or for gradients, is done with the value, made at that
moment, whether by a torch function, by C++ (``__torch_dispatch__``) or inside an autograd Function. In a graph it is
the output of the norm, so gradients of the value come to the norm by every way.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dsconv_cuda.ops import IDENTITY

_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "is_cpu", "is_cuda", "is_meta", "requires_grad", "grad_fn"
)  # fmt: skip
_OF_ITSELF = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
        Tensor.dim,
        Tensor.size,
        Tensor.numel,
        Tensor.backward,
        torch.autograd.backward,
        torch.autograd.grad,
    )
)


class Deferred(Tensor):
    """See above. `vectors` are those of ``torch.ops.dsconv_cuda.norm_vectors``, or a function that returns them; `act`
    is the number of the activation. `owner` is whose it is; later: the Function that it is an output of, and the
    arguments before (act, owner)."""

    @staticmethod
    def __new__(cls, y: Tensor, vectors, act: int, owner, later=None):
        return Tensor._make_wrapper_subclass(cls, y.shape, strides=y.stride(), dtype=y.dtype, device=y.device)

    def __init__(self, y: Tensor, vectors: Tensor | Callable[[], Tensor], act: int, owner, later=None):
        self.y, self._vectors, self.act, self.owner, self.later = y, vectors, act, owner, later

    @property
    def vectors(self) -> Tensor:
        if callable(self._vectors):
            self._vectors = self._vectors()
        return self._vectors

    def followed_by(self, act: int) -> "Deferred | None":
        """The same with an activation after it; None where that has to be made of the value."""
        if self.act != IDENTITY:
            return None
        if not self.requires_grad:
            return Deferred(self.y, self._vectors, act, self.owner)
        function, arguments = self.later or (None, ())
        if function is None or type(self.grad_fn) is not function._backward_cls:  # an output of something else by now
            return None
        return function.apply(*arguments, act, self.owner)

    def value(self) -> Tensor:
        return _Made.apply(self)

    def _make(self) -> Tensor:
        return torch.ops.dsconv_cuda.norm_act(self.y, self.vectors, self.act)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _OF_ITSELF:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_value_of, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda t: t._make() if type(t) is Deferred else t, (args, kwargs or {}))
        return func(*args, **kwargs)


def _value_of(t):
    return t.value() if type(t) is Deferred else t


class _Made(torch.autograd.Function):
    """The value of a Deferred."""

    @staticmethod
    def forward(ctx, deferred: Deferred):
        return deferred._make()

    @staticmethod
    def backward(ctx, grad):
        return grad


@functools.cache
def break_graphs() -> None:
    """Has torch.compile leave a graph where a value is made: in it the value would have lost the way back to the norm.

    Not at import, since it imports torch.compile, which takes a second.
    """
    Deferred.value = torch.compiler.disable(Deferred.value)
