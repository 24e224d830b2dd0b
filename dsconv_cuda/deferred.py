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
from torch import Tensor, nn
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
    is the number of the activation. `owner` is whose it is; `norm` the module of which `vectors` will be made, if that
    is to come; later: the Function that it is an output of, and the arguments before (act, owner).

    Once made the value stays: who writes to it in place writes to what everybody gets afterwards. What it is made of
    must not have been written to meanwhile, else it raises: it would be another value than that of the call."""

    @staticmethod
    def __new__(cls, y: Tensor, vectors, act: int, owner, norm=None, later=None, sources=None):
        return Tensor._make_wrapper_subclass(cls, y.shape, strides=y.stride(), dtype=y.dtype, device=y.device)

    def __init__(
        self,
        y: Tensor,
        vectors: Tensor | Callable[[], Tensor],
        act: int,
        owner,
        norm: nn.Module | None = None,
        later: tuple | None = None,
        sources: "_Sources | None" = None,
    ):
        self.y, self._vectors, self.act, self.owner, self.later = y, vectors, act, owner, later
        self._sources = _Sources(y, norm) if sources is None else sources
        self._made: Tensor | None = None
        self._with_gradient: Tensor | None = None  # the same memory

    @property
    def vectors(self) -> Tensor:
        if callable(self._vectors):
            self._vectors = self._vectors()
        return self._vectors

    def is_made(self) -> bool:
        return self._made is not None

    def followed_by(self, act: int) -> "Deferred | None":
        """The same with an activation after it; None where that has to be made of the value."""
        if self.act != IDENTITY or self.is_made():
            return None
        if not self.requires_grad:
            return Deferred(self.y, self._vectors, act, self.owner, sources=self._sources)
        function, arguments = self.later or (None, ())
        if function is None or type(self.grad_fn) is not function._backward_cls:  # an output of something else by now
            return None
        return function.apply(*arguments, act, self.owner)

    def value(self) -> Tensor:
        if self._with_gradient is None and torch.is_grad_enabled() and self.requires_grad:
            self._with_gradient = _Made.apply(self)
        return self._make() if self._with_gradient is None else self._with_gradient

    def check_sources(self) -> None:
        self._sources.check()

    def _make(self) -> Tensor:
        if self._made is None:
            self.check_sources()
            with torch.no_grad():  # gradients go by _Made
                self._made = torch.ops.dsconv_cuda.norm_act(self.y, self.vectors, self.act)
        return self._made

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


class _Sources:
    """What a value is made of, and whether that is still what it was."""

    __slots__ = ("eps", "norm", "tensors", "versions")

    def __init__(self, y: Tensor, norm: nn.Module | None):
        self.norm, self.eps = norm, None
        tensors = [] if y.is_inference() else [y]  # which count no writes
        if norm is not None:
            self.eps = norm.eps
            tensors += norm._parameters.values()
            tensors += norm._buffers.values()
        try:
            self.versions = [t._version for t in tensors]
        except (AttributeError, RuntimeError):  # None, and a norm of inference tensors
            tensors = [t for t in tensors if t is not None and not t.is_inference()]
            self.versions = [t._version for t in tensors]
        self.tensors = tensors

    def check(self) -> None:
        norm = self.norm
        if [t._version for t in self.tensors] == self.versions and (norm is None or norm.eps == self.eps):
            return
        raise RuntimeError(
            "fuse: what a BatchNorm before a depthwise convolution gave had not been computed yet when its input or "
            "the norm was written to in place; ask for it before, for example with .clone(), or take the fused "
            "operations out of the model with dsconv_cuda.unfuse"
        )


def _value_of(t):
    return t.value() if type(t) is Deferred else t


class _Made(torch.autograd.Function):
    """The value of a Deferred."""

    @staticmethod
    def forward(ctx, deferred: Deferred):
        return deferred._make().data  # no view of it, which could not be written to

    @staticmethod
    def backward(ctx, grad):
        return grad


@functools.cache
def break_graphs() -> None:
    """Has torch.compile leave a graph where a value is made: in it the value would have lost the way back to the norm.

    Not at import, since it imports torch.compile, which takes a second.
    """
    Deferred.value = torch.compiler.disable(Deferred.value)
