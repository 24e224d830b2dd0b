"""The tf32 argument of the ops: on CUDA, float32 products of the pointwise part with operands rounded to TF32.

TF32 keeps 10 bits of a float's fraction, so rounding an operand to nearest is off by at most u = 2^-11 of it, and a
product of two of them by 2u + u^2 of it. The depthwise part, activations and sums stay in float32. Element by element,

    |y - exact| <= (2u + u^2) * sum over c of |pw_weight[o][c]| |act(z[c])|  +  the budget of float32 (oracle.py)

and the same holds for the gradients' products. A result within the budget of float32 everywhere would mean that
float32 was used, so some case has to exceed it.
"""

import pytest
import torch
import torch.nn.functional as F
from oracle import budgets
from shapes import ALL, LAYERS, Case, identify, thinned

from dsconv_cuda import _loader
from dsconv_cuda.activations import ACTIVATIONS

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]

PRODUCT_ERROR = 2 * 2.0**-11 + 2.0**-22
STEEPEST = 1.5  # of all activations: hardswish at 3


def padding_of(case: Case) -> list[int]:
    """(top, left, bottom, right)"""
    if case.padding != "same":
        return [*case.padding, *case.padding]
    total = [d * (k - 1) for d, k in zip(case.dilation, case.kernel, strict=True)]
    return [t // 2 for t in total] + [t - t // 2 for t in total]


def depthwise(case: Case, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    top, left, bottom, right = padding_of(case)
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, weight, bias, case.stride, 0, case.dilation, x.shape[1])


def forward(case: Case, tensors: list, tf32: bool) -> torch.Tensor:
    _loader.load_library()
    numbers = [ACTIVATIONS[name].number for name in (case.activation, case.out_activation)]
    return torch.ops.dsconv_cuda.fwd(*tensors, case.stride, padding_of(case), case.dilation, *numbers, tf32)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", [*thinned(ALL, 3), *LAYERS], ids=identify)
def test_forward(case, channels_last, device, isa):
    tensors = case.tensors(torch.float32, device, channels_last)
    y = forward(case, tensors, True)
    if isa not in ("emulated", "cuda"):
        assert torch.equal(y, forward(case, tensors, False))
        return
    oracle, budget = budgets(tensors, case.kwargs, None)
    x, dw_weight, pw_weight, dw_bias, _ = (None if t is None else t.cpu().double() for t in tensors)
    z = depthwise(case, x, dw_weight, dw_bias)
    magnitudes = F.conv2d(ACTIVATIONS[case.activation].value(z).abs(), pw_weight.abs())
    slope = 1.0 if case.out_activation == "identity" else STEEPEST
    error = (y.cpu().double() - oracle["y"]).abs()
    assert torch.all(error <= slope * PRODUCT_ERROR * magnitudes + budget["y"])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "case", [*(c for c in thinned(ALL, 4) if c.out_activation == "identity"), *LAYERS], ids=identify
)
def test_backward(case, channels_last, device, isa):
    """du is off by the product's error times act', grad_x and grad_dw_weight by sums of that.

    They are bounded by the gradients of the same convolutions on absolute values; grad_pw_weight is a product of its
    own, and the biases' gradients are sums in float32, of du and of dy.
    """
    if isa not in ("emulated", "cuda"):
        pytest.skip("the CPU takes no notice of tf32")
    _loader.load_library()
    tensors = case.tensors(torch.float32, device, channels_last)
    dy = torch.randn_like(forward(case, tensors, False))
    numbers = [ACTIVATIONS[name].number for name in (case.activation, case.out_activation)]
    arguments = (case.stride, padding_of(case), case.dilation, *numbers, 31)
    grads = torch.ops.dsconv_cuda.bwd(dy, *tensors[:4], None, *arguments, True)
    oracle, budget = budgets(tensors, case.kwargs, dy)

    x, dw_weight, pw_weight, dw_bias, _ = (None if t is None else t.cpu().double() for t in tensors)
    g = dy.cpu().double()
    a = ACTIVATIONS[case.activation].value(depthwise(case, x, dw_weight, dw_bias))
    absolute = [x.abs().requires_grad_(), dw_weight.abs().requires_grad_()]
    z_absolute = depthwise(case, *absolute, None)
    du = F.conv_transpose2d(g.abs(), pw_weight.abs()) * STEEPEST
    grad_x, grad_dw_weight = torch.autograd.grad(z_absolute, absolute, du)
    bounds = {
        "grad input": grad_x,
        "grad dw_weight": grad_dw_weight,
        "grad pw_weight": torch.einsum("nohw,nchw->oc", g.abs(), a.abs())[:, :, None, None],
        "grad dw_bias": du.sum((0, 2, 3)),
        "grad pw_bias": torch.zeros(case.c_out, dtype=torch.float64),
    }
    for (name, bound), grad in zip(bounds.items(), grads, strict=True):
        if name in oracle:
            error = (grad.cpu().double() - oracle[name]).abs()
            assert torch.all(error <= PRODUCT_ERROR * bound + budget[name]), name


def norm_calls(case: Case, tensors: list):
    """Forward and backward of a block with a norm of the batch, as functions of tf32."""
    ops = torch.ops.dsconv_cuda
    geometry = (case.stride, padding_of(case), case.dilation)
    vectors = ops.norm_vectors(ops.z_moments(*tensors[:4], *geometry), None, None, 1e-5)
    relu = ACTIVATIONS["relu"].number
    dy = torch.randn_like(ops.fwd_norm(*tensors, vectors, *geometry, relu, False)[0])
    none = (None, None, 1.0)
    yield lambda tf32: ops.fwd_norm(*tensors, vectors, *geometry, relu, False, fast=tf32)[0]
    for op in (ops.bwd_norm, ops.bwd_norm_pointwise):
        yield lambda tf32, op=op: op(dy, None, *tensors[:4], vectors, *none, *geometry, relu, 0, 31, fast=tf32)[2]


def test_a_norm_passes_it_on(device, isa):
    _loader.load_library()
    case = LAYERS[0]
    tensors = case.tensors(torch.float32, device)
    for call in norm_calls(case, tensors):
        strict, rounded = call(False).double(), call(True).double()
        off = (strict - rounded).abs().max() / strict.abs().max()
        assert 1e-5 < off < 2e-3 if isa in ("emulated", "cuda") else off == 0


def test_operands_are_rounded(device, isa):
    """Errors of the size of TF32's are there, and only where they are allowed."""
    case = LAYERS[0]
    tensors = case.tensors(torch.float32, device)
    exact = forward(case, [None if t is None else t.double() for t in tensors], False)
    strict, rounded = ((forward(case, tensors, tf32).double() - exact).abs().max() for tf32 in (False, True))
    assert rounded > 50 * strict if isa in ("emulated", "cuda") else rounded == strict
