"""What fused modules ask of their children .depthwise and .pointwise, whose forward they stand for and do not call."""

import torch
from torch import Tensor, nn


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def clear_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        hooks.clear()


def acts(module: nn.Module, stock: type[nn.Module] | None = None) -> bool:
    """Whether a call of `module` does more than its class says, or, of a convolution, than `stock` says: it has to be
    called then."""
    if has_hooks(module) or "forward" in module.__dict__:
        return True
    return stock is not None and type(module) is not stock and not _has_forward_of(type(module), stock)


def _has_forward_of(kind: type[nn.Module], stock: type[nn.Module]) -> bool:
    return (
        getattr(kind, "forward", None) is stock.forward and getattr(kind, "_conv_forward", None) is stock._conv_forward
    )


def only_computes_weights(module: nn.Module, stock: type[nn.Module] | None = None) -> bool:
    """Whether all that acts are hooks of torch.nn.utils: pruning, weight_norm and spectral_norm. They look at no
    input."""
    others = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or "forward" in module.__dict__ or (stock is not None and not _has_forward_of(type(module), stock)):
        return False
    return all(type(hook).__module__.startswith("torch.nn.utils.") for hook in module._forward_pre_hooks.values())


def compute_weights(*modules: nn.Module) -> None:
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            hook(module, None)


def check(of: nn.Module, input: Tensor, depthwise: nn.Module, pointwise: nn.Module) -> None:
    """That the input of the module `of` has the channels of its child `depthwise`, which the op would take for fewer
    with more filters each, and that `pointwise` is what the op computes. All else is left to the checks of the op."""
    dims = len(depthwise.kernel_size)
    if isinstance(input, Tensor):
        shape, channels = input.shape, depthwise.groups
        if dims < len(shape) < dims + 3 and shape[-1 - dims] != channels:
            raise ValueError(
                f"{type(of).__name__}: input must have {channels} channels, as many as .depthwise takes, got "
                f"{shape[-1 - dims]}: shape {list(shape)}"
            )
    if pointwise.stride != _ONES[dims] or pointwise.padding != _ZEROS[dims] or pointwise.groups != 1:
        _check_pointwise(type(of).__name__, pointwise)


_ONES = {dims: (1,) * dims for dims in (1, 2, 3)}
_ZEROS = {dims: (0,) * dims for dims in (1, 2, 3)}


def _check_pointwise(op: str, pointwise: nn.Module) -> None:
    if any(size != 1 for size in pointwise.kernel_size):
        return  # the op says that first of all
    for name, expected, same in (("stride", 1, ()), ("padding", 0, ("same", "valid")), ("groups", 1, ())):
        value = getattr(pointwise, name)
        numbers = value if isinstance(value, (tuple, list, torch.Size)) else (value,)
        if value not in same and any(number != expected for number in numbers):
            raise ValueError(
                f"{op}: .pointwise must have {name} {expected}, got {value!r}; that is no pointwise convolution: use "
                f"the convolutions one after the other"
            )


class SeparableConvolution(nn.Module):
    """The numbers of both convolutions as attributes of the module that has them, under the names of nn.Conv2d."""

    causal = False

    @property
    def in_channels(self) -> int:
        return self.depthwise.in_channels

    @property
    def out_channels(self) -> int:
        return self.pointwise.out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.depthwise.kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        return self.depthwise.stride

    @property
    def padding(self) -> tuple[int, ...] | str:
        return "causal" if self.causal else self.depthwise.padding

    @property
    def dilation(self) -> tuple[int, ...]:
        return self.depthwise.dilation

    @property
    def padding_mode(self) -> str:
        return self.depthwise.padding_mode

    def pad(self, input: Tensor) -> tuple[Tensor, tuple[int, ...] | str | int]:
        """`input` with a border that is not of zeros made around it, and the padding that is left to the op."""
        depthwise, padding = self.depthwise, self.padding
        if depthwise.padding_mode != "zeros":
            input = nn.functional.pad(input, depthwise._reversed_padding_repeated_twice, mode=depthwise.padding_mode)
            padding = padding if self.causal else 0
        return input, padding

    def call_depthwise(self, input: Tensor) -> Tensor:
        """What .depthwise itself makes of the module's input."""
        if self.causal:
            depthwise = self.depthwise
            input = nn.functional.pad(input, (depthwise.dilation[0] * (depthwise.kernel_size[0] - 1), 0))
        return self.depthwise(input)
