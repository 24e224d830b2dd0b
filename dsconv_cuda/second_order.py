"""Derivatives beyond the first-order backward: forward-mode AD and double backward.

Forward and backward themselves always run the fused kernels. What is here is composed of stock PyTorch convolutions:
these derivatives are asked for rarely (gradient penalties, Hessian products), and as compositions of differentiable
functions they can be differentiated again, to any order, and run under every torch.func transform.

Notation, as in the first-order backward (depthwise weight w1, pointwise weight W, D the depthwise convolution as a
bilinear function, D^T its adjoint in the input and C in the weight: <D(x, w), u> = <x, D^T(u, w)> = <w, C(x, u)>):

    z = D(x, w1) + b1,  a = f(z),  p = W a + b2,  y = o(p)
    g = dy * o'(p),  da = W^T g,  du = da * f'(z)
    grad x = D^T(du, w1),  grad w1 = C(x, du),  grad b1 = sum du,  grad W = g a^T,  grad b2 = sum g

A None among tangents and cotangents stands for zero.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsconv_cuda import graph_ops
from dsconv_cuda.activations import BY_NUMBER

OptionalTensor = Tensor | None


@dataclass
class Config:
    """The non-tensor arguments of the ops. padding is (top, left, bottom, right), in 3-D with front and back.

    No NamedTuple: torch.func would take it apart and expect a gradient for each number.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    act: int
    out_act: int
    fast: bool = False

    def arguments(self) -> tuple:
        """As the op schemas order them."""
        return self.stride, self.padding, self.dilation, self.act, self.out_act

    def precision(self) -> tuple:
        """The last argument of the op schemas, where it is not the default."""
        return (True,) if self.fast else ()

    def row(self) -> list[int]:
        """All of them in a row, as graph_ops.py has it."""
        return graph_ops.row(*self.arguments(), self.fast)


def _without_autocast(derivative):
    """Forward has cast its operands already; backward may be called inside an autocast region or outside of it."""

    @functools.wraps(derivative)
    def run(*args):
        device = args[-3][0].device.type  # every one ends with (primals, directions, config)
        if device == "meta":  # has no autocast
            return derivative(*args)
        with torch.autocast(device, enabled=False):
            return derivative(*args)

    return run


def _add(*terms: OptionalTensor) -> OptionalTensor:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _mul(a: OptionalTensor, b: OptionalTensor) -> OptionalTensor:
    return None if a is None or b is None else a * b


def _sum_pixels(t: OptionalTensor) -> OptionalTensor:
    return None if t is None else t.sum((0, *range(2, t.dim())))


_CONVOLUTIONS = {2: F.conv2d, 3: F.conv3d}


class Depthwise:
    """D, D^T and C for one geometry. Padding that differs between the sides is made with F.pad and undone by a crop."""

    def __init__(self, config: Config, channels: int):
        self.stride, self.dilation, self.groups = list(config.stride), list(config.dilation), channels
        dims = len(self.stride)
        before, after = list(config.padding[:dims]), list(config.padding[dims:])
        self.symmetric = before == after
        self.conv_padding = before if self.symmetric else [0] * dims
        # The last axis first, as F.pad takes them.
        self.border = [number for pair in zip(before[::-1], after[::-1], strict=True) for number in pair]
        self.convolution = _CONVOLUTIONS[dims]

    def _pad(self, x: Tensor) -> Tensor:
        return x if self.symmetric else F.pad(x, self.border)

    def _crop(self, x: Tensor) -> Tensor:
        return x if self.symmetric else F.pad(x, [-b for b in self.border])

    def conv(self, x: OptionalTensor, w: OptionalTensor, bias: OptionalTensor = None) -> OptionalTensor:
        """D(x, w) + bias"""
        if x is None or w is None:
            return None
        return self.convolution(self._pad(x), w, bias, self.stride, self.conv_padding, self.dilation, self.groups)

    def adjoints(
        self, u: OptionalTensor, x: OptionalTensor, w: OptionalTensor, like_x: Tensor, like_w: Tensor
    ) -> tuple[OptionalTensor, OptionalTensor]:
        """D^T(u, w) and C(x, u); one whose operand is None is None."""
        if u is None or (x is None and w is None):
            return None, None
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
            u,
            self._pad(like_x if x is None else x),
            like_w if w is None else w,
            None,
            self.stride,
            self.conv_padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            [w is not None, x is not None, False],
        )
        return (None if grad_x is None else self._crop(grad_x)), grad_w


class Pointwise:
    """W a, W^T g and g a^T in `dims` dimensions, for a weight with two dimensions or with `dims` more."""

    def __init__(self, weight: Tensor, dims: int):
        self.shape = weight.shape
        self.ones = (1,) * dims
        self.convolution = _CONVOLUTIONS[dims]

    def conv(self, w: OptionalTensor, a: OptionalTensor, bias: OptionalTensor = None) -> OptionalTensor:
        if w is None or a is None:
            return None
        return self.convolution(a, w.reshape(*self.shape[:2], *self.ones), bias)

    def transposed(self, w: OptionalTensor, g: OptionalTensor) -> OptionalTensor:
        if w is None or g is None:
            return None
        return self.convolution(g, w.reshape(*self.shape[:2], *self.ones).transpose(0, 1))

    def outer(self, g: OptionalTensor, a: OptionalTensor) -> OptionalTensor:
        if g is None or a is None:
            return None
        pixels = g.shape[0] * math.prod(g.shape[2:])
        g, a = (t.transpose(0, 1).reshape(t.shape[1], pixels) for t in (g, a))
        return (g @ a.t()).reshape(self.shape)


class _Point:
    """The values of one call that the derivatives are taken at, recomputed as they are needed."""

    def __init__(self, x: Tensor, dw_weight: Tensor, pw_weight: Tensor, dw_bias, pw_bias, config: Config):
        self.x, self.w1, self.w = x, dw_weight, pw_weight
        self.f, self.o = BY_NUMBER[config.act], BY_NUMBER[config.out_act]
        self.depthwise = Depthwise(config, x.shape[1])
        self.pointwise = Pointwise(pw_weight, len(config.stride))
        self.z = _add(self.depthwise.conv(x, dw_weight), self._per_channel(dw_bias))
        self.a = self.f.value(self.z)
        self.df = self.f.first(self.z)
        self.linear_out = self.o.number == 0
        if not self.linear_out:
            self.p = _add(self.pointwise.conv(pw_weight, self.a), self._per_channel(pw_bias))
            self.do = self.o.first(self.p)

    def _per_channel(self, bias: OptionalTensor) -> OptionalTensor:
        return None if bias is None else bias.view(1, -1, *self.pointwise.ones)

    def d2f(self) -> OptionalTensor:
        return None if self.f.second is None else self.f.second(self.z)

    def d2o(self) -> OptionalTensor:
        return None if self.o.second is None else self.o.second(self.p)

    def times_do(self, t: OptionalTensor) -> OptionalTensor:
        return t if self.linear_out else _mul(t, self.do)

    def tangents(self, x_t, w1_t, w_t, b1_t, b2_t) -> tuple[OptionalTensor, OptionalTensor, OptionalTensor]:
        """The tangents of z, of a and of p."""
        z_t = _add(self.depthwise.conv(x_t, self.w1), self.depthwise.conv(self.x, w1_t), self._per_channel(b1_t))
        if z_t is not None and b1_t is not None:
            z_t = z_t.expand_as(self.z)  # the bias alone has one pixel
        a_t = _mul(self.df, z_t)
        p_t = _add(self.pointwise.conv(self.w, a_t), self.pointwise.conv(w_t, self.a), self._per_channel(b2_t))
        if p_t is not None and b2_t is not None:
            n, _, *pixels = self.z.shape
            p_t = p_t.expand(n, self.w.shape[0], *pixels)
        return z_t, a_t, p_t


@_without_autocast
def forward_jvp(primals: tuple, tangents: tuple, config: Config) -> tuple[Tensor, Tensor]:
    """The tangents of y and of p: o'(p) * pt and pt = W (f'(z) zt) + Wt a + b2t with zt = D(xt, w1) + D(x, w1t) + b1t.

    `primals` and `tangents` are (x, dw_weight, pw_weight, dw_bias, pw_bias).
    """
    point = _Point(*primals, config)
    _, _, p_t = point.tangents(*tangents)
    return point.times_do(p_t), p_t


@_without_autocast
def backward_jvp(dy: Tensor, dy_t: OptionalTensor, primals: tuple, tangents: tuple, config: Config) -> tuple:
    """The tangents of the five gradients, by the product rule on each line of the backward."""
    point = _Point(*primals, config)
    _, w1_t, w_t, _, _ = tangents
    z_t, a_t, p_t = point.tangents(*tangents)
    g = point.times_do(dy)
    g_t = _add(point.times_do(dy_t), None if point.linear_out else _mul(_mul(dy, point.d2o()), p_t))
    da = point.pointwise.transposed(point.w, g)
    da_t = _add(point.pointwise.transposed(w_t, g), point.pointwise.transposed(point.w, g_t))
    du = da * point.df
    du_t = _add(_mul(da_t, point.df), _mul(_mul(da, point.d2f()), z_t))

    x_t = tangents[0]
    grad_x_t, grad_w1_t = point.depthwise.adjoints(du_t, point.x, point.w1, point.x, point.w1)
    more_x, more_w1 = point.depthwise.adjoints(du, x_t, w1_t, point.x, point.w1)
    return (
        _add(grad_x_t, more_x),
        _add(grad_w1_t, more_w1),
        _add(point.pointwise.outer(g_t, point.a), point.pointwise.outer(g, a_t)),
        _sum_pixels(du_t),
        _sum_pixels(g_t),
    )


@_without_autocast
def backward_vjp(dy: Tensor, primals: tuple, cotangents: tuple, config: Config) -> tuple:
    """The gradients of L = sum of <gradient of backward, its cotangent> in dy and in the five primals.

    With the cotangents (gx, gw1, gW, gb1, gb2) as directions, zt and pt are the tangents of z and p, and L = <g, pt>:

        dL/d dy = o'(p) * pt
        r  = dy * o''(p) * pt                                    what reaches p
        q  = da * f''(z) * zt + f'(z) * (gW^T g + W^T r)         what reaches z
        dL/dx = D^T(q, w1) + D^T(du, gw1)      dL/dw1 = C(x, q) + C(gx, du)      dL/db1 = sum q
        dL/dW = g (f'(z) zt)^T + r a^T         dL/db2 = sum r

    Returns (dL/d dy, dL/dx, dL/dw1, dL/dW, dL/db1, dL/db2).
    """
    point = _Point(*primals, config)
    gx, gw1, gw, _, _ = cotangents
    z_t, a_t, p_t = point.tangents(*cotangents)
    if p_t is None:
        return (None,) * 6
    g = point.times_do(dy)
    da = point.pointwise.transposed(point.w, g)
    du = da * point.df
    r = None if point.linear_out else _mul(_mul(dy, point.d2o()), p_t)
    q = _add(
        _mul(_mul(da, point.d2f()), z_t),
        _mul(point.df, _add(point.pointwise.transposed(gw, g), point.pointwise.transposed(point.w, r))),
    )
    grad_x, grad_w1 = point.depthwise.adjoints(q, point.x, point.w1, point.x, point.w1)
    more_x, more_w1 = point.depthwise.adjoints(du, gx, gw1, point.x, point.w1)
    return (
        point.times_do(p_t),
        _add(grad_x, more_x),
        _add(grad_w1, more_w1),
        _add(point.pointwise.outer(g, a_t), point.pointwise.outer(r, point.a)),
        _sum_pixels(q),
        _sum_pixels(r),
    )
