"""Whether a chain is quicker as one operation: both ways are timed where the model runs, on the input it has there.

One run of the model with the example shows the shape, layout and dtype that each depthwise convolution is given. Then
each chain is computed both ways on random numbers of that form, in turns, so that a change of the machine's load meets
both: in evaluation the forward without gradients, in training forward and backward. Chains alike in everything that
takes time are measured once. A chain is slower if (as one)/(module by module) is more than ``SLOWER`` both in the
median over the rounds and in the quickest rounds, or ``MUCH_SLOWER`` in the quickest alone; so other processes do not
decide, and where the two are equal the chain is taken, as it needs less memory.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsconv_cuda.activations import ACTIVATIONS
from dsconv_cuda.fusion.chain import ALL, NONE, Chain
from dsconv_cuda.fusion.untouched import attributes_restored

SLOWER, MUCH_SLOWER = 1.03, 1 / 0.95
_ROUNDS, _LEAST_SECONDS, _WARM_UP_CALLS = 15, 1e-3, 3


@dataclass(frozen=True)
class Input:
    """All that the time depends on of a tensor that a convolution is given."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, x: Tensor) -> "Input":
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad)

    def tensor(self) -> Tensor:
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.normal_().requires_grad_(self.requires_grad)

    def __str__(self):
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Verdict:
    """What compare() measured of a chain, module by module and as one operation."""

    one_by_one: float  # seconds of the quickest round
    fused: float
    median_ratio: float  # of fused to one_by_one, over the rounds
    where: str

    @property
    def slower(self) -> bool:
        quickest = self.fused / self.one_by_one
        return quickest > MUCH_SLOWER or min(self.median_ratio, quickest) > SLOWER

    @property
    def gain(self) -> float:
        return self.one_by_one / self.fused

    def __str__(self):
        kind = "slower" if self.slower else "not slower"
        fused, one_by_one = 1e3 * self.fused, 1e3 * self.one_by_one
        return f"{kind} as one operation: {fused:.3g} ms, module by module {one_by_one:.3g} ms, {self.where}"


def judge(model: nn.Module, example, chains: list[Chain]) -> dict[Chain, Verdict]:
    """Of those chains that a run of `model` on `example` calls, as the model is now: in training or in evaluation."""
    verdicts, measured = {}, {}
    with _untouched(model):
        inputs = _inputs(model, example, [chain.depthwise for chain in chains])
        for chain in chains:
            given = inputs.get(chain.depthwise)
            extent = NONE if given is None or given.device.type == "meta" else chain.extent()
            if extent == NONE:  # then fusing changes nothing
                continue
            key = (given, extent, *_kind(chain))
            if key not in measured:
                calls = _calls(chain, given.tensor(), extent, model.training)
                mode = "in training" if model.training else "in evaluation"
                measured[key] = Verdict(*compare(*calls, given.device), f"{mode}, input {given}")
            verdicts[chain] = measured[key]
            chain._folded.clear()
    return verdicts


def compare(one_by_one: Callable, fused: Callable, device: torch.device) -> tuple[float, float, float]:
    """The least seconds of each over the rounds, and the median ratio of the second to the first."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def seconds(call: Callable, repeats: int) -> float:
        call()  # what it reads is where the call before left it
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        return (time.perf_counter() - begin) / repeats

    calls = (one_by_one, fused)
    once = [min(seconds(call, 1) for _ in range(_WARM_UP_CALLS)) for call in calls]
    repeats = [max(1, math.ceil(_LEAST_SECONDS / s)) for s in once]
    rounds = [[seconds(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(_ROUNDS)]
    least = [min(column) for column in zip(*rounds, strict=True)]
    return *least, statistics.median(second / first for first, second in rounds)


def _kind(chain: Chain) -> tuple:
    """What the time of a chain depends on beside its input."""
    convolutions = (chain.depthwise, chain.pointwise)
    norms = [bn and (type(bn), bn.training, bn.affine) for bn in (chain.bn1, chain.bn2)]
    weights = [
        (conv.weight.shape, conv.weight.stride(), conv.bias is not None, conv.weight.requires_grad)
        for conv in convolutions
    ]
    conv, before = chain.depthwise, chain.before
    geometry = (conv.stride, conv.padding, conv.dilation)
    if before is not None:
        norms.append((type(before.norm), before.norm.training, before.norm.affine, before.activation))
    gate = chain.gate and (type(chain.gate.module), *(p.shape for p in chain.gate.module.parameters()))
    return (*geometry, *weights, *norms, chain.activation, gate, chain.out_activation, chain.needs_rewriting)


def _calls(chain: Chain, x: Tensor, extent: int, training: bool) -> tuple[Callable, Callable]:
    with torch.set_grad_enabled(training):
        with_norm = chain.takes_norm(x)
    steps = _modules(chain, extent, with_norm)
    parameters = [p for _, _, module in chain.all_places() for p in module.parameters() if p.requires_grad]
    wanted = [*parameters, *([x] if x.requires_grad else [])]

    def one_by_one():
        y = x
        for step in steps:
            y = step(y)
        return y

    def fused():
        if with_norm:
            return chain.compute_with_norm(x)
        y = chain.again(x) if extent == ALL else None  # as a call of the model would
        return chain.compute(x, extent) if y is None else y

    differentiated = training and bool(wanted)
    dy = torch.randn_like(one_by_one()) if differentiated else None

    def timed(forward: Callable) -> Callable:
        if not differentiated:

            def call():
                with torch.no_grad():
                    return forward()

        else:

            def call():
                return torch.autograd.grad(forward(), wanted, dy, allow_unused=True)

        return call

    return timed(one_by_one), timed(fused)


def _modules(chain: Chain, extent: int, with_norm: bool) -> list[Callable]:
    """The steps of the chain as the model takes them: up to the pointwise convolution where `extent` is not ALL.

    What is before the depthwise convolution takes and gives a tensor of that one's size.
    """
    if chain.needs_rewriting:
        act, out_act = (ACTIVATIONS[name].value for name in (chain.activation, chain.out_activation))
        gate = chain.gate and chain.gate.module
        steps = [chain.depthwise, chain.bn1, act, gate, chain.pointwise, chain.bn2, out_act]
    else:
        steps = [module for _, _, module in (chain.all_places() if with_norm else chain.places)]
    if extent != ALL:
        steps = steps[: steps.index(chain.pointwise) + 1]
    return [step for step in steps if step is not None]


def _inputs(model: nn.Module, example, convolutions: list[nn.Module]) -> dict[nn.Module, Input]:
    """What each of them is given when `model` is called with `example`, a tensor or a tuple of arguments."""
    inputs: dict[nn.Module, Input] = {}

    def record(conv, args, kwargs):
        (x,) = (*args, *kwargs.values())
        inputs[conv] = Input.of(x)

    hooks = [conv.register_forward_pre_hook(record, with_kwargs=True) for conv in convolutions]
    try:
        with torch.set_grad_enabled(model.training):
            model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Attributes, statistics of BatchNorm and random numbers are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    try:
        with attributes_restored(model), torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
