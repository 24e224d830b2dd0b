"""Who is measured: the fused op, PyTorch's convolutions in eager mode, and the same compiled, each in either layout;
and the peers of bench/peers.

All of them hold the same values and are checked against stock convolutions in fp64 before any clock runs.
"""

import functools
from dataclasses import dataclass

import torch
import torch._inductor.config as inductor_config

from dsconv_cuda import DepthwiseSeparableConv2d, DepthwiseSeparableConv3d, DepthwiseSeparableConvBN2d

from .plain import LAYOUTS, LAYOUTS_3D, PlainSeparableConv2d, PlainSeparableConv3d, PlainSeparableConvBN2d
from .problem import TRAINING_BN

FUSED, EAGER, COMPILED = "fused", "eager", "compile"
PYTORCH = (EAGER, COMPILED)
PEER_ERROR = 1e-5


@dataclass(frozen=True, order=True)
class Form:
    """One way to compute a problem."""

    method: str  # FUSED, EAGER, COMPILED or the name of a peer
    layout: str  # of the input, the output and their gradients

    @property
    def is_peer(self):
        return self.method != FUSED and self.method not in PYTORCH

    def __str__(self):
        return f"{self.method} {self.layout}"


class WrongResult(RuntimeError):
    """A competitor is further from the fp64 result than its budget."""


class Arena:
    """A problem's tensors, and the calls that compute it."""

    def __init__(self, problem, seed=0, device="cpu"):
        self.problem = problem
        self.device = torch.device(device)
        layer = problem.layer
        generator = torch.Generator().manual_seed(seed)

        def values(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(self.device, problem.dtype)

        self.deep = len(layer.kernel) == 3
        self.formats = LAYOUTS_3D if self.deep else LAYOUTS
        middle, ones = layer.middle_channels, (1,) * len(layer.kernel)
        self.x = values(layer.batch, layer.channels, *layer.size)
        self.dy = values(layer.batch, layer.out_channels, *layer.out_size)
        self.state = {
            "depthwise.weight": values(middle, 1, *layer.kernel, scale=(2 / layer.taps) ** 0.5),
            "depthwise.bias": values(middle),
            "pointwise.weight": values(layer.out_channels, middle, *ones, scale=(2 / middle) ** 0.5),
            "pointwise.bias": values(layer.out_channels),
        }
        if problem.mode == TRAINING_BN:
            weights = self.state
            self.state = {}
            for convolution, norm, channels in (("depthwise", "bn1", middle), ("pointwise", "bn2", layer.out_channels)):
                self.state[f"{convolution}.weight"] = weights[f"{convolution}.weight"]
                self.state[f"{norm}.weight"] = 1 + values(channels, scale=0.1)
                self.state[f"{norm}.bias"] = values(channels)

    def call(self, form):
        """A function without arguments that computes the problem once and returns its tensors."""
        module = self._module(fused=form.method == FUSED)
        module.to(self.problem.dtype).to(memory_format=self.formats[form.layout])
        if form.method != COMPILED:
            return self._step(module, self.problem.dtype, form.layout)
        inference = not self.problem.trains
        module = torch.compile(module.train(not inference), fullgraph=True, dynamic=False)
        call = self._step(module, self.problem.dtype, form.layout)
        # Compiled at its first call: for inference with the weights as constants, which the compiler may lay out anew.
        with inductor_config.patch(freezing=inference):
            call()
        return call

    def check(self, calls):
        """Raises WrongResult if a call's error exceeds twice PyTorch's own in that dtype plus eps * |expected|.

        Of a peer's, and of what torch.compile makes, it is four times as much and PEER_ERROR * |expected|: some add
        thousands of products in one accumulator, and to leave these out would flatter us.
        """
        for form, call in calls.items():
            for name, result, (want, budget) in zip(self._names(), call(), self._expected, strict=True):
                if form.is_peer or form.method == COMPILED:
                    budget = 4 * budget + PEER_ERROR * self._size(want)
                error = self._size(result.double() - want)
                if not error <= budget:  # also where it is not a number
                    raise WrongResult(
                        f"{self.problem.layer.name}, {self.problem.mode}: {name} of {form} is off by {error:.3g}, "
                        f"which is more than {budget:.3g}"
                    )

    def _size(self, difference):
        """The largest element; with BatchNorm, where one element may be far off (below), the root of all squares."""
        return (difference.norm() if self.problem.mode == TRAINING_BN else difference.abs().max()).item()

    @functools.cached_property
    def _expected(self):
        """For each result what fp64 gives, and how far from it a result may be.

        A value within an error of a corner of ReLU6 has the one derivative or the other, and both are right. So of
        gradients through activations the budget holds too how they change when everything before an activation moves
        by the error that y may have, up or down.
        """
        expected = self._in_fp64(self.state)
        eager = [self.call(Form(EAGER, layout))() for layout in LAYOUTS]
        epsilon = torch.finfo(self.problem.dtype).eps
        budgets = [
            2 * max(self._size(results[index] - want) for results in eager) + epsilon * self._size(want)
            for index, want in enumerate(expected)
        ]
        if self.problem.mode == TRAINING_BN:
            move = 2 * max((results[0] - expected[0]).abs().max().item() for results in eager)
            for sign in (-1, 1):
                moved = {
                    name: v.double() + sign * move * (name in ("bn1.bias", "bn2.bias"))
                    for name, v in self.state.items()
                }
                for index, gradient in enumerate(self._in_fp64(moved)[1:], 1):
                    budgets[index] += 2 * self._size(gradient - expected[index])
        return list(zip(expected, budgets, strict=True))

    def _in_fp64(self, state):
        module = self._module(fused=False).double()
        module.load_state_dict(state, strict=self.problem.mode != TRAINING_BN)
        return self._step(module, torch.float64, "nchw")()

    def _module(self, *, fused):
        layer, norms = self.problem.layer, self.problem.mode == TRAINING_BN
        if norms:
            kind, options = DepthwiseSeparableConvBN2d if fused else PlainSeparableConvBN2d, {}
        else:
            kinds = (
                (DepthwiseSeparableConv3d, PlainSeparableConv3d)
                if self.deep
                else (DepthwiseSeparableConv2d, PlainSeparableConv2d)
            )
            kind, options = kinds[0 if fused else 1], {"bias": True}
        module = kind(
            layer.channels,
            layer.out_channels,
            layer.kernel,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            channel_multiplier=layer.multiplier,
            activation=self.problem.activation,
            out_activation=self.problem.out_activation,
            **options,
        )
        module.load_state_dict(self.state, strict=not norms)  # running statistics stay as they are made
        return module.to(self.device)

    def _step(self, module, dtype, layout):
        x = self.x.to(dtype).contiguous(memory_format=self.formats[layout]).detach()
        if not self.problem.trains:

            def forward():
                with torch.no_grad():
                    return (module(x),)

            return forward

        dy = self.dy.to(dtype).contiguous(memory_format=self.formats[layout])
        x.requires_grad_()
        wanted = (x, *module.parameters())

        def forward_and_backward():
            y = module(x)
            return (y.detach(), *torch.autograd.grad(y, wanted, dy))

        return forward_and_backward

    def _names(self):
        if not self.problem.trains:
            return ["y"]
        return ["y", "grad x", *(f"grad {name}" for name in self.state)]
