"""What is right, and how far from it a result may be.

The oracle is the op in float64, of stock PyTorch convolutions (dsconv_cuda/reference.py). The budget is

    2 * (PyTorch's own error in the same dtype) + eps * max|oracle|

per output and per gradient, in the maximum norm. PyTorch's own error is the largest of the same two stock convolutions
in the dtype at hand, evaluated in several orders of summation: one evaluation of a small shape can be right by luck.

float64 has no more precise oracle here: there the oracle is itself off by PyTorch's own error, which is added. Rounding
errors scale with eps, so that error is the larger one of what the orders of summation differ by and of the error in
float32 (the inputs are values that float32 holds) times eps64/eps32.
"""

import torch
from guarded import before_a_page
from shapes import Case
from torch import Tensor

import dsconv_cuda
from dsconv_cuda import reference

NAMES = ("y", "grad input", "grad dw_weight", "grad pw_weight", "grad dw_bias", "grad pw_bias")


def evaluate(function, tensors: list, kwargs: dict, dy: Tensor | None) -> dict[str, Tensor]:
    """The output of `function`, and with `dy` the gradients of all tensors, by name."""
    if dy is None:
        with torch.no_grad():
            return {"y": function(*tensors, **kwargs)}
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*tensors, **kwargs)
    given = [t for t in tensors if t is not None]
    grads = iter(torch.autograd.grad(y, given, dy))
    results = [y.detach(), *(None if t is None else next(grads) for t in tensors)]
    return {name: value for name, value in zip(NAMES, results, strict=True) if value is not None}


# Along which dimension each result holds the channels between the two convolutions, or the input's, in 2-D and in 3-D.
_CHANNEL_DIM = {
    dims: {"grad input": -1 - dims, "grad dw_weight": 0, "grad pw_weight": 1, "grad dw_bias": 0} for dims in (2, 3)
}
_STOCK = {2: reference.depthwise_separable_conv2d, 3: reference.depthwise_separable_conv3d}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def _dims(tensors: list) -> int:
    return tensors[1].dim() - 2


def _stock_in_several_orders(tensors: list, kwargs: dict, dy: Tensor | None):
    """The same sums with channels, images or pixels in another order, and in the other memory format."""
    dims = _dims(tensors)
    stock, channel_dim = _STOCK[dims], _CHANNEL_DIM[dims]
    x, dw_weight, pw_weight, dw_bias, pw_bias = tensors
    batched = x.dim() == dims + 2
    yield evaluate(stock, tensors, kwargs, dy)

    other_format = torch.contiguous_format if x.stride(1) == 1 and x.size(1) > 1 else _CHANNELS_LAST[dims]
    if batched:
        yield evaluate(stock, [x.contiguous(memory_format=other_format), *tensors[1:]], kwargs, dy)

    channels = [
        x.flip(-1 - dims),
        dw_weight.flip(0),
        pw_weight.flip(1),
        None if dw_bias is None else dw_bias.flip(0),
        pw_bias,
    ]
    results = evaluate(stock, channels, kwargs, dy)
    yield {n: v.flip(channel_dim[n]) if n in channel_dim else v for n, v in results.items()}

    if batched and dy is not None:
        results = evaluate(stock, [x.flip(0), *tensors[1:]], kwargs, dy.flip(0))
        yield {n: v.flip(0) if n in ("y", "grad input") else v for n, v in results.items()}

    turned = {n: (*v[:-2], *v[:-3:-1]) if isinstance(v, tuple) else v for n, v in kwargs.items()}
    tensors = [x.mT, dw_weight.mT, pw_weight, dw_bias, pw_bias]
    results = evaluate(stock, tensors, turned, None if dy is None else dy.mT)
    yield {n: v.mT if n in ("y", "grad input", "grad dw_weight") else v for n, v in results.items()}


def _to(dtype: torch.dtype, tensors: list, device=None) -> list:
    return [None if t is None else t.detach().to(dtype=dtype, device=device) for t in tensors]


def budgets(tensors: list, kwargs: dict, dy: Tensor | None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The oracle's results and the largest difference from each that is allowed."""
    dtype = tensors[0].dtype
    eps = torch.finfo(dtype).eps
    oracle = evaluate(
        _STOCK[_dims(tensors)],
        _to(torch.float64, tensors, "cpu"),
        kwargs,
        _to(torch.float64, [dy], "cpu")[0],
    )
    own = dict.fromkeys(oracle, 0.0)
    for measured in {dtype, torch.float32} if dtype == torch.float64 else {dtype}:
        scale = eps / torch.finfo(measured).eps
        for results in _stock_in_several_orders(_to(measured, tensors), kwargs, *_to(measured, [dy])):
            for name, value in results.items():
                own[name] = max(own[name], scale * largest_difference(value, oracle[name]))
    largest = {name: value.abs().max().item() if value.numel() else 0.0 for name, value in oracle.items()}
    factor = 3 if dtype == torch.float64 else 2
    return oracle, {name: factor * own[name] + eps * largest[name] for name in oracle}


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a.detach().to("cpu", torch.float64) - b).abs().max().item() if a.numel() else 0.0


def _guarded(t: Tensor | None) -> Tensor | None:
    return before_a_page(t) if t is not None and t.device.type == "cpu" else t


def check(tensors: list, kwargs: dict, backward: bool = False, op=dsconv_cuda.depthwise_separable_conv2d) -> dict:
    """Runs the fused op on `tensors`, compares it with the oracle and returns its results. On the CPU, where the
    emulated CUDA kernels run too, behind the end of each tensor is memory that may not be touched."""
    dy = None
    if backward:
        with torch.no_grad():
            shape = op(*tensors, **kwargs).shape
        dy = torch.randn(shape).to(tensors[0].device, tensors[0].dtype)
    actual = evaluate(op, [_guarded(t) for t in tensors], kwargs, _guarded(dy))
    oracle, budget = budgets(tensors, kwargs, dy)
    assert actual.keys() == oracle.keys()
    for name, value in actual.items():
        assert value.dtype == tensors[0].dtype, name
        assert value.shape == oracle[name].shape, name
        difference = largest_difference(value, oracle[name])
        assert difference <= budget[name], f"{name} is off by {difference:.3g}, allowed is {budget[name]:.3g}"
    return actual


def check_case(case: Case, dtype: torch.dtype, device, channels_last: bool, backward: bool = False) -> dict:
    return check(case.tensors(dtype, device, channels_last), case.kwargs, backward)
