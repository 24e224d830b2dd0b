"""Modules keep their packed weights between calls that need no gradient, on the CPU.

The kernels read the weights in an order of their own. Packing takes as long as reading them, which for many channels
on a small map is a fifth of the call; so a module that is called again with the same weights packs them once. What is
packed lies in a buffer beside the module: it dies with the module, is not part of state_dict, copies or pickles, and
goes when the module is moved or cast. :func:`clear_weight_cache` frees all of them.

When weights count as the same, and what is noticed:

* noticed always: another Parameter, another .data, another instruction set, and every write that PyTorch counts
  (``_version``): optimisers, load_state_dict, in-place operations under no_grad, init functions;
* noticed by their effect: writes that PyTorch does not count, through ``weight.data``, numpy, shared memory or a raw
  pointer. Each call compares a fingerprint of the weights: of all of a matrix up to 16 KiB, of all depthwise kernels of
  less than 128 bytes a channel, of all biases; of a larger matrix 64 adjacent bytes of every row or more, which move
  from row to row through all the columns. So a write to a whole matrix, row or column is noticed;
* not noticed: such an uncounted write to a few elements of a large matrix. Write under ``torch.no_grad()`` without
  ``.data``, or call :func:`clear_weight_cache` afterwards.

Nothing is kept for calls that need a gradient, under torch.func, autocast, a dispatch or function mode or a tracer, nor
for subclasses of Tensor and Parameter, parametrized weights and inference tensors. Graphs of torch.compile keep theirs
by compiled_weights.py.
"""

import functools
import weakref

import torch
from torch import Tensor, nn

from dsconv_cuda import _checks, compiled_weights
from dsconv_cuda.activations import activation_number
from dsconv_cuda.autograd import KeptFunction, kept_arguments, kept_kernels, transformed
from dsconv_cuda.children import acts
from dsconv_cuda.functional import as_rows, cast_for_autocast

_is_grad_enabled = torch.is_grad_enabled
_autocast_enabled = torch._C._is_any_autocast_enabled

_keepers = weakref.WeakSet()  # of everything that eager calls keep; each has forget()


class Keeper(nn.Module):
    """A module that keeps something made of its weights, in the attribute of this name."""

    _kept_name: str

    def __getstate__(self):
        state = self.__dict__.copy()
        state.pop(self._kept_name, None)
        return state

    def _apply(self, *args, **kwargs):
        # What moves or casts the parameters; what was made of them would only take up memory.
        self.__dict__.pop(self._kept_name, None)
        return super()._apply(*args, **kwargs)


class KeptCall:
    """The calls of one module: its weights and arguments as they were checked, and the memory of packed weights.

    Calls that need a gradient skip the checks too; they pack anew, since training changes the weights at each step, and
    where no other calls are made there is no memory.
    """

    __slots__ = (
        "__weakref__",
        "activation",
        "arguments",
        "causal",
        "channels",
        "depthwise",
        "dilation",
        "dw_bias",
        "dw_weight",
        "memory",
        "op",
        "out_activation",
        "padding",
        "pointwise",
        "pw_bias",
        "pw_padding",
        "pw_stride",
        "pw_weight",
        "rank",
        "stride",
    )

    def __call__(
        self, module: nn.Module, input: Tensor, in_norm: tuple[Tensor, int] | None = None, was_cast: bool = False
    ) -> Tensor | None:
        """What `module` makes of `input`; None where the call is not plain or anything but the input has changed.

        in_norm: the vectors of a norm and the number of an activation that the input goes through first, in calls that
        need no gradient. was_cast: autocast has nothing left to do.
        """
        if type(input) is not Tensor or transformed():
            return None
        autocast = _autocast_enabled() and not was_cast
        dw_weight, dw_bias = self.dw_weight, self.dw_bias
        pw_weight, pw_bias = self.pw_weight, self.pw_bias
        children = module._modules
        depthwise, pointwise = children.get("depthwise"), children.get("pointwise")
        if depthwise is not self.depthwise or pointwise is not self.pointwise:
            return self._drop(module)
        # The attributes of modules, and acts() of both, by the dictionaries: as calls they would take twice as long.
        of_depthwise, of_pointwise = depthwise.__dict__, pointwise.__dict__
        parameters = of_depthwise["_parameters"]
        if parameters.get("weight") is not dw_weight or parameters.get("bias") is not dw_bias:
            return self._drop(module)
        parameters = of_pointwise["_parameters"]
        if parameters.get("weight") is not pw_weight or parameters.get("bias") is not pw_bias:
            return self._drop(module)
        if (
            of_depthwise["stride"] is not self.stride
            or of_depthwise["padding"] is not self.padding
            or of_depthwise["dilation"] is not self.dilation
            or of_depthwise["padding_mode"] != "zeros"
            or of_pointwise["stride"] is not self.pw_stride
            or of_pointwise["padding"] is not self.pw_padding
            or module.activation is not self.activation
            or module.out_activation is not self.out_activation
        ):
            return self._drop(module)
        if (
            of_depthwise["_forward_pre_hooks"]
            or of_depthwise["_forward_hooks"]
            or of_depthwise["_backward_pre_hooks"]
            or of_depthwise["_backward_hooks"]
            or "forward" in of_depthwise
            or of_pointwise["_forward_pre_hooks"]
            or of_pointwise["_forward_hooks"]
            or of_pointwise["_backward_pre_hooks"]
            or of_pointwise["_backward_hooks"]
            or "forward" in of_pointwise
        ):
            return self._drop(module)
        rank, given = self.rank, input.dim()
        if given == rank - 1:
            input = input.unsqueeze(0)
        elif given != rank:
            return None
        if input.size(1) != self.channels:
            return None  # the call with all its checks says what is wrong
        if rank == 3:
            y = self._of_rows(module, input, in_norm, autocast)
        else:
            y = self._of_images(module, input, dw_weight, pw_weight, in_norm, autocast)
        return y if given == rank or y is None else y.squeeze(0)

    def _of_rows(self, module: nn.Module, input: Tensor, in_norm, autocast: bool) -> Tensor | None:
        if module.causal is not self.causal:
            return self._drop(module)
        weights = self.dw_weight.unsqueeze(-2), self.pw_weight.unsqueeze(-1)
        y = self._of_images(module, input.unsqueeze(-2), *weights, in_norm, autocast)
        return None if y is None else y.squeeze(-2)

    def _of_images(
        self, module: nn.Module, input: Tensor, dw_weight: Tensor, pw_weight: Tensor, in_norm, autocast: bool
    ) -> Tensor | None:
        dw_bias, pw_bias = self.dw_bias, self.pw_bias
        try:
            if _is_grad_enabled() and _any_requires_grad(dw_weight, pw_weight, dw_bias, pw_bias, input):
                operands = (input, dw_weight, pw_weight, dw_bias, pw_bias)
                if autocast:
                    operands = cast_for_autocast(operands)
                return KeptFunction.apply(*operands, self.arguments)
            if autocast:  # what would be kept are not the module's own weights
                return None
            version = dw_weight._version + pw_weight._version
            if dw_bias is not None:
                version += dw_bias._version
            if pw_bias is not None:
                version += pw_bias._version
            memory = self.memory
            if memory is None:
                memory = self.memory = self._allocate(dw_weight, pw_weight)
            arguments = (input, dw_weight, pw_weight, dw_bias, pw_bias, memory, version)
            return self.op(*arguments) if in_norm is None else _fwd_after_norm()(*arguments, *in_norm)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            # The call with all its checks says what is wrong, if anything is. Not every Exception: activation
            # checkpointing ends its recomputation by one of its own.
            return self._drop(module)

    def _allocate(self, dw_weight: Tensor, pw_weight: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.ops.dsconv_cuda.keep(dw_weight, pw_weight, *self.arguments.config.arguments())

    def _drop(self, module: nn.Module) -> None:
        module.__dict__.pop("_kept_call", None)

    def forget(self) -> None:
        self.memory = None


def register(keeper) -> None:
    """Has :func:`clear_weight_cache` call forget() of `keeper`, as long as it lives."""
    _keepers.add(keeper)


@functools.cache
def _fwd_after_norm():
    return torch.ops.dsconv_cuda.fwd_after_norm_kept.default


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110 - any() of a generator takes five times as long where the first one says yes
        if t is not None and t.requires_grad:
            return True
    return False


def keep(module: nn.Module, input: Tensor) -> None:
    """Prepares the next calls of `module`, which has just been called with `input`, where they may be KeptCalls."""
    if type(input) is not Tensor or not input.is_cpu or transformed() or not kept_kernels():
        return
    depthwise, pointwise = module._modules.get("depthwise"), module._modules.get("pointwise")
    if type(depthwise) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or type(pointwise) is not type(depthwise):
        return
    if acts(depthwise) or acts(pointwise) or depthwise.padding_mode != "zeros":
        return
    call = KeptCall()
    call.depthwise, call.pointwise = depthwise, pointwise
    call.dw_weight, call.pw_weight = depthwise._parameters.get("weight"), pointwise._parameters.get("weight")
    call.dw_bias, call.pw_bias = depthwise._parameters.get("bias"), pointwise._parameters.get("bias")
    weights = (call.dw_weight, call.pw_weight)
    biases = tuple(b for b in (call.dw_bias, call.pw_bias) if b is not None)
    if any(type(p) is not nn.Parameter or not p.is_cpu or p.is_inference() for p in (*weights, *biases)):
        return
    call.stride, call.padding, call.dilation = depthwise.stride, depthwise.padding, depthwise.dilation
    call.pw_stride, call.pw_padding = pointwise.stride, pointwise.padding
    geometry = (call.stride, call.padding, call.dilation, call.pw_stride, call.pw_padding)
    if any(type(a) not in (tuple, str) for a in geometry):
        return  # could change in place
    call.activation, call.out_activation = module.activation, module.out_activation
    call.rank, call.channels = call.dw_weight.dim(), depthwise.groups
    call.causal = call.rank == 3 and module.causal
    call.arguments = _arguments(call, *weights)
    call.op = torch.ops.dsconv_cuda.fwd_kept.default
    call.memory = None
    module.__dict__["_kept_call"] = call
    register(call)


def _arguments(call: KeptCall, dw_weight: Tensor, pw_weight: Tensor):
    op, activations = "forward", (activation_number(call.activation), activation_number(call.out_activation))
    if call.rank == 3:
        padding = "causal" if call.causal else call.padding
        (_, dw_weight, pw_weight), stride, padding, dilation = as_rows(
            op, (dw_weight, dw_weight, pw_weight), call.stride, padding, call.dilation
        )
    else:
        stride, dilation = (
            _checks.per_axis(op, name, getattr(call, name), 1, call.rank - 2) for name in ("stride", "dilation")
        )
        padding = _checks.padding(op, call.padding, dw_weight.shape[2:], stride, dilation)
    return kept_arguments(dw_weight.shape, pw_weight.shape, stride, padding, dilation, *activations)


def clear_weight_cache() -> None:
    """Drops the packed and the folded weights that modules and compiled graphs keep between calls without gradient; the
    next call makes them anew. Packed ones are freed at once.

    Needed after a write to a few elements of a weight that PyTorch does not count (through ``.data``, numpy or shared
    memory), and of use where the memory matters: what is kept is as large as the weights in float32.
    """
    for keeper in list(_keepers):
        keeper.forget()
    compiled_weights.clear()
