"""The ops in terms of PyTorch's own, for exports to runtimes that do not have them.

    program = torch.export.export(model, (x,)).run_decompositions(dsconv_cuda.decomposition_table())

leaves two convolutions where the op was. torch.onnx.export(dynamo=True) needs no table: autograd.py calls `fwd` here
while that traces. The table is not put into PyTorch's own (torch._decomp), as fake tensors of symbolic size would take
from there what the op's fake kernel is for.
"""

import torch
from torch import Tensor

from dsconv_cuda.activations import ACTIVATIONS, BY_NUMBER
from dsconv_cuda.ops import GRAD_BITS
from dsconv_cuda.second_order import Config, Depthwise, Pointwise


def _before_out_activation(x, dw_weight, pw_weight, dw_bias, pw_bias, config: Config) -> Tensor:
    z = Depthwise(config, x.shape[1]).conv(x, dw_weight, dw_bias)
    return Pointwise(pw_weight, len(config.stride)).conv(pw_weight, BY_NUMBER[config.act].value(z), pw_bias)


def fwd(x, dw_weight, pw_weight, dw_bias, pw_bias, stride, padding, dilation, act, out_act, fast=False) -> Tensor:
    return fwd_with_pre(x, dw_weight, pw_weight, dw_bias, pw_bias, stride, padding, dilation, act, out_act)[0]


def fwd_with_pre(
    x, dw_weight, pw_weight, dw_bias, pw_bias, stride, padding, dilation, act, out_act, fast=False
) -> tuple:
    config = Config(stride, padding, dilation, act, out_act)
    pre = _before_out_activation(x, dw_weight, pw_weight, dw_bias, pw_bias, config)
    return BY_NUMBER[out_act].value(pre), pre


def bwd(
    dy, x, dw_weight, pw_weight, dw_bias, saved, stride, padding, dilation, act, out_act, grad_mask, fast=False
) -> tuple:
    depthwise = Depthwise(Config(stride, padding, dilation, act, out_act), x.shape[1])
    pointwise = Pointwise(pw_weight, len(stride))
    pixels = (0, *range(2, dy.dim()))
    z = depthwise.conv(x, dw_weight, dw_bias)
    g = dy if saved is None else dy * _out_derivative(saved, out_act)
    du = pointwise.transposed(pw_weight, g) * BY_NUMBER[act].first(z)
    grad_x, grad_dw_weight = depthwise.adjoints(du, x, dw_weight, x, dw_weight)
    grads = (
        grad_x,
        grad_dw_weight,
        pointwise.outer(g, BY_NUMBER[act].value(z)),
        du.sum(pixels),
        g.sum(pixels),
    )
    return tuple(t if grad_mask & bit else x.new_empty(0) for t, bit in zip(grads, GRAD_BITS, strict=True))


_FROM_OUTPUT = {
    ACTIVATIONS["sigmoid"].number: lambda y: y * (1 - y),
    ACTIVATIONS["tanh"].number: lambda y: 1 - y * y,
}


def _out_derivative(saved: Tensor, out_act: int) -> Tensor:
    """`saved` is y where that tells the derivative, otherwise the value before out_act."""
    # The piecewise linear functions have the same pieces on both sides.
    return _FROM_OUTPUT.get(out_act, BY_NUMBER[out_act].first)(saved)


_FUNCTIONS = {"fwd": fwd, "fwd_with_pre": fwd_with_pre, "bwd": bwd}


def decomposition_table() -> dict:
    """{operator: function of the same arguments made of PyTorch's own operators}, of all operators of the package.

    For ``ExportedProgram.run_decompositions``; together with ``torch.export.default_decompositions()`` where PyTorch's
    operators are to be decomposed too. ``torch.onnx.export(dynamo=True)`` of a module needs no table.
    """
    from dsconv_cuda._loader import load_library

    load_library()
    return {getattr(torch.ops.dsconv_cuda, name).default: function for name, function in _FUNCTIONS.items()}
