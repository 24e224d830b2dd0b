"""The passes over a tensor behind which a norm and an activation stand, against F.batch_norm in float64: by tiles of
pixels and by planes of channels, around the ends of vectors. The budget is that of oracle.py."""

import pytest
import torch
import torch.nn.functional as F

from dsconv_cuda import _loader
from dsconv_cuda.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("isa", "inputs_at_pages")

# (n, channels, h, w): planes of fewer pixels than a vector's worth of them, of whole vectors, of a block and one more
SIZES = [(3, 5, 1, 31), (1, 37, 1, 32), (3, 13, 5, 7), (2, 16, 16, 16), (1, 3, 1, 257), (2, 5, 23, 45)]
# channels_last whose pixels, joined, fill vectors: 2, 4, 8, 16 at a time; 2, which do not divide them; too many
JOINED = [(4, 24, 7, 9), (8, 58, 3, 15), (2, 20, 9, 8), (16, 13, 3, 3), (1, 40, 5, 7), (2, 1025, 2, 4), (3, 6, 2, 2, 4)]
LAYOUTS = ["nchw", "channels_last", "rows apart", "grad channels_last"]


def _laid_out(v, grad, layout):
    if layout == "rows apart":
        return torch.stack((v, v), -1).flatten(-2)[..., : v.shape[-1]].copy_(v), grad
    last = torch.channels_last if v.dim() == 4 else torch.channels_last_3d
    formats = [last if layout in ("channels_last", of) else torch.contiguous_format for of in ("v", "")]
    if layout == "grad channels_last":
        formats = torch.contiguous_format, torch.channels_last
    return v.contiguous(memory_format=formats[0]), grad.contiguous(memory_format=formats[1])


def _stock(v, grad, gamma, beta, activation):
    """Output and sums of the gradient, of it times vhat, and the gradient of v."""
    v, gamma, beta = (t.detach().requires_grad_() for t in (v, gamma, beta))
    out = activation(F.batch_norm(v, None, None, gamma, beta, training=True, eps=1e-5))
    grad_v, grad_gamma, grad_beta = torch.autograd.grad(out, (v, gamma, beta), grad)
    return {"out": out.detach(), "sums": torch.stack((grad_beta, grad_gamma)).detach(), "grad": grad_v}


def _fused(v, grad, gamma, beta, number):
    ops = torch.ops.dsconv_cuda
    vectors = ops.norm_vectors(ops.moments(v), gamma, beta, 1e-5)
    sums = ops.norm_act_sums(grad, v, vectors, number)
    count = float(v.numel() // v.shape[1])
    return {
        "out": ops.norm_act(v, vectors, number),
        "sums": sums,
        "grad": ops.norm_act_grad(grad, v, vectors, sums, count, number),
    }


def _check(size, dtype, layout, name, device):
    _loader.load_library()
    v, grad = (3 * torch.randn(size) + 1).to(dtype), torch.randn(size).to(dtype)
    # PyTorch takes parameters in float32 beside 16-bit values.
    affine = [
        t.to(torch.promote_types(dtype, torch.float32)) for t in (torch.rand(size[1]) + 0.5, torch.randn(size[1]))
    ]
    activation = ACTIVATIONS[name].value
    oracle = _stock(v.double(), grad.double(), *(t.double() for t in affine), activation)
    own = dict.fromkeys(oracle, 0.0)
    measured = [dtype] if dtype != torch.float64 else [torch.float32, torch.float64]
    for as_type in measured:
        scale = torch.finfo(dtype).eps / torch.finfo(as_type).eps
        arguments = (
            [t.to(as_type) for t in (v, grad)],
            [t.to(torch.promote_types(as_type, torch.float32)) for t in affine],
        )
        for axes in ((), (3,), (0, 2)):
            stock = _stock(*(t.flip(axes) for t in arguments[0]), *arguments[1], activation)
            for what, value in stock.items():
                value = value if what == "sums" else value.flip(axes)
                own[what] = max(own[what], scale * (value.double() - oracle[what]).abs().max().item())
    given = [t.to(device) for t in (*_laid_out(v, grad, layout), *affine)]
    for what, value in _fused(*given, ACTIVATIONS[name].number).items():
        budget = 2 * own[what] + torch.finfo(dtype).eps * oracle[what].abs().max().item()
        difference = (value.cpu().double() - oracle[what]).abs().max().item()
        assert difference <= budget, f"{what} is off by {difference:.3g}, allowed is {budget:.3g}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size, layout, device):
    _check(size, torch.float32, layout, "tanh", device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", JOINED, ids=str)
def test_pixels_that_join(size, dtype, device):
    _check(size, dtype, "channels_last", "silu", device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["relu6", "silu"])
def test_dtypes_and_activations(name, dtype, device):
    _check((2, 5, 7, 9), dtype, "nchw", name, device)


@pytest.mark.parametrize("size", [(1, 8, 512, 520), (1, 9, 511, 517)], ids=str)
def test_more_than_the_caches_hold(size, device, isa):
    """Whole cache lines are stored past the caches, others are not."""
    if "avx" not in isa:
        pytest.skip("of the CPU kernels")
    _check(size, torch.float32, "nchw", "relu", device)
