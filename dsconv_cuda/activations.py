"""The activations of the op: their names, their numbers, and f, f' and f'' as torch functions.

The numbers are those of ``Activation`` in csrc/params.h and part of the op schemas. The kernels have their own f and
f'; the torch functions here serve double backward, forward-mode AD and the reference, and are exact in float64. At
kinks every derivative takes the value PyTorch's own takes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAKY_RELU_SLOPE = 0.01


class Activation(NamedTuple):
    """One activation. ``second`` is None where f'' is zero everywhere (the piecewise linear functions)."""

    number: int
    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor] | None = None
    derivative_from_output: bool = False  # backward reads f' off y; otherwise it needs the value before f


def _indicator(inside: Tensor, like: Tensor) -> Tensor:
    return inside.to(like.dtype)


def _leaky_relu_first(z: Tensor) -> Tensor:
    # torch.where with two Python numbers would make a float32 tensor and round the slope.
    return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, LEAKY_RELU_SLOPE))


def _silu_first(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _silu_second(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


def _hardswish_first(z: Tensor) -> Tensor:
    slope = torch.where(z < 3, z / 3 + 0.5, torch.ones_like(z))
    return torch.where(z > -3, slope, torch.zeros_like(z))


def _hardswish_second(z: Tensor) -> Tensor:
    return _indicator((z > -3) & (z < 3), z) / 3


def _hardsigmoid(z: Tensor) -> Tensor:
    # F.hardsigmoid's value; its backward multiplies by a single precision 1/6, also in float64.
    below = torch.where(z <= -3, torch.zeros_like(z), z / 6 + 0.5)
    return torch.where(z >= 3, torch.ones_like(z), below)


def _hardsigmoid_first(z: Tensor) -> Tensor:
    return _indicator((z > -3) & (z < 3), z) / 6


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def _gelu_first(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * _normal_density(z)


def _gelu_second(z: Tensor) -> Tensor:
    return _normal_density(z) * (2 - z * z)


_TANH_SCALE, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh_inner(z: Tensor) -> tuple[Tensor, Tensor]:
    """t = tanh(u) and u' for u = scale * (z + cubic * z^3)."""
    t = torch.tanh(_TANH_SCALE * (z + _TANH_CUBIC * z * z * z))
    return t, _TANH_SCALE * (1 + 3 * _TANH_CUBIC * z * z)


def _gelu_tanh_first(z: Tensor) -> Tensor:
    t, du = _gelu_tanh_inner(z)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * du


def _gelu_tanh_second(z: Tensor) -> Tensor:
    t, du = _gelu_tanh_inner(z)
    d2u = 6 * _TANH_SCALE * _TANH_CUBIC * z
    return (1 - t * t) * (du + 0.5 * z * (d2u - 2 * t * du * du))


def _sigmoid_first(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _sigmoid_second(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (1 - 2 * s)


def _tanh_first(z: Tensor) -> Tensor:
    t = torch.tanh(z)
    return 1 - t * t


def _tanh_second(z: Tensor) -> Tensor:
    t = torch.tanh(z)
    return -2 * t * (1 - t * t)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(0, lambda z: z, torch.ones_like, None, True),
    "relu": Activation(1, torch.relu, lambda z: _indicator(z > 0, z), None, True),
    "relu6": Activation(2, F.relu6, lambda z: _indicator((z > 0) & (z < 6), z), None, True),
    "leaky_relu": Activation(3, lambda z: F.leaky_relu(z, LEAKY_RELU_SLOPE), _leaky_relu_first, None, True),
    "silu": Activation(4, F.silu, _silu_first, _silu_second),
    "hardswish": Activation(5, F.hardswish, _hardswish_first, _hardswish_second),
    "gelu": Activation(6, F.gelu, _gelu_first, _gelu_second),
    "gelu_tanh": Activation(7, lambda z: F.gelu(z, approximate="tanh"), _gelu_tanh_first, _gelu_tanh_second),
    "sigmoid": Activation(8, torch.sigmoid, _sigmoid_first, _sigmoid_second, True),
    "tanh": Activation(9, torch.tanh, _tanh_first, _tanh_second, True),
    "hardsigmoid": Activation(10, _hardsigmoid, _hardsigmoid_first),
}

BY_NUMBER: tuple[Activation, ...] = tuple(ACTIVATIONS.values())

_ALIASES: dict[str | None, str] = {None: "identity", "none": "identity"}

_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Hardsigmoid: "hardsigmoid",
}

# What the public functions accept and what it means; everything else goes through _resolve.
_NAMES: dict[str | None, str] = {name: name for name in ACTIVATIONS} | _ALIASES


def derivative_from_output(number: int) -> bool:
    """Whether backward tells the activation's derivative from its output (params.h's function of the same name)."""
    return BY_NUMBER[number].derivative_from_output


def activation_name(activation: "str | nn.Module | None", argument: str = "activation", op: str = "activation") -> str:
    """The canonical name of an activation given by name, as None or as an instance of the matching nn.Module.

    Raises:
        TypeError: `activation` is neither a string, None nor a module (a module class, for example).
        ValueError: there is no such activation, or the module's parameters are not the ones the kernels implement.
    """
    if activation is None or type(activation) is str:
        name = _NAMES.get(activation)
        if name is not None:
            return name
        raise ValueError(f"{op}: {argument} must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    if not isinstance(activation, nn.Module):
        raise TypeError(
            f"{op}: {argument} must be a name ({', '.join(ACTIVATIONS)}), None or an instance of the matching "
            f"torch.nn module, got {activation!r}"
        )
    # Exact types: a subclass may compute something else.
    name = _MODULES.get(type(activation))
    if name is None:
        raise ValueError(
            f"{op}: {argument} has no counterpart in the kernels: {activation!r}; "
            f"use one of {', '.join(ACTIVATIONS)}, or apply the module outside"
        )
    if name == "leaky_relu" and activation.negative_slope != LEAKY_RELU_SLOPE:
        raise ValueError(
            f"{op}: {argument} must be LeakyReLU with negative_slope {LEAKY_RELU_SLOPE}, the one the kernels "
            f"implement, got {activation!r}"
        )
    if name == "gelu" and activation.approximate == "tanh":
        return "gelu_tanh"
    return name


def activation_number(
    activation: "str | nn.Module | None", argument: str = "activation", op: str = "activation"
) -> int:
    """The number that the op schemas take; see :func:`activation_name`."""
    return ACTIVATIONS[activation_name(activation, argument, op)].number
