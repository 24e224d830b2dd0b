"""Fuses the depthwise separable convolutions of a model that was written with stock modules, and takes it back.

find.py         which modules make a chain, and why others do not
gates.py        squeeze-excite between two of them
chain.py        what takes their place
folded.py       BatchNorm folded into their weights, kept between calls
measure.py      where it would be slower
untouched.py    that a model is not changed by being looked at
"""

import copy

import torch
from torch import Tensor, nn

from dsconv_cuda.fusion import chain as _chain
from dsconv_cuda.fusion import find as _find
from dsconv_cuda.fusion import measure as _measure
from dsconv_cuda.fusion import rewrite as _rewrite
from dsconv_cuda.fusion.find import Finding

__all__ = ["Explanation", "Finding", "explain_fusion", "fuse", "unfuse"]


def fuse(model: nn.Module, *, inplace: bool = False, example_input: Tensor | tuple | None = None) -> nn.Module:
    """Makes one fused operation of every depthwise -> [BatchNorm] -> [activation] -> pointwise -> [BatchNorm] ->
    [activation] in `model`; :func:`explain_fusion` lists them.

    The fused model has the same modules under the same names, with the same parameters and buffers: state dicts go both
    ways, and an optimiser, an EMA or a scheduler made before goes on working. The depthwise convolution of each chain
    computes all of it, the other modules hand on their input; so intermediate results of a chain are not to be had: a
    method that calls only a part of one gets the result of all. Activations may be of any class whose forward is a call
    of one of torch's functions.

    A BatchNorm -> [activation] in front of the depthwise convolution, whose result nothing else takes, joins a chain in
    2-D or 3-D where it is in the mode of the norms after it: in training, and in evaluation while gradients are
    disabled. The kernels take their input through both as they read it; the value behind them is neither written nor
    kept for backward, but is there for whoever asks for it (hooks, slices of the model).

    Squeeze-excite (arXiv:1709.01507) between the activation and the pointwise convolution joins a chain too: any module
    that computes ``x * f(x.mean(pixels))``, which is read off its graph. Its layers are called with the means, an image
    of one pixel, as the modules that they are. In eager mode on the CPU, and in graphs of torch.compile without
    gradients; elsewhere the modules of such a chain run one by one. Its second derivative is refused.

    What is added later is seen: where a hook or a parametrization is put on a module of a chain, a hook on one that
    holds a part of it, where a module or its forward is exchanged, padding_mode or the slope of an activation is set,
    or where the model moves to a device without kernels, the modules of that chain run one by one as before.

    A chain is what forward does when it is traced, in training and in evaluation, with arguments that have a default of
    None, True or False given and not. Where it does something else between two modules of a chain later, for another
    argument or attribute, the second of them raises RuntimeError, as it does where it is called without the first. (In
    graphs of torch.compile what is written in place there goes unseen.)

    What is gained is memory traffic; how much differs with layers and machine: ``python -m bench.fuse_models`` measures
    it. With `example_input` each chain is timed both ways where the model runs, and left where it would be slower;
    without it all are taken.

    Args:
        model: is left alone unless `inplace`.
        inplace: changes `model` itself. Otherwise a copy is made that shares parameters and buffers with `model`, so
            that training one of them trains both; ``copy.deepcopy`` of the result shares nothing.
        example_input: what `model` is called with once, a tensor or a tuple of arguments, to see the inputs of its
            chains. Measured is what the model's mode says: in evaluation the forward without gradients, in training
            forward and backward (`measure.py` tells how). Statistics of BatchNorm, gradients and random numbers stay.

    Returns:
        The fused model, of the same class.

    BatchNorm folds into the weights in evaluation; with statistics of the batch it is trained without the intermediate,
    as by :class:`dsconv_cuda.DepthwiseSeparableConvBN2d`, in graphs of torch.compile too. That refuses a second
    derivative; and under torch.func and on devices without kernels for it, the modules around a BatchNorm that trains
    run one by one.
    """
    _check_model("fuse", model)
    if not inplace:
        model = _copy_sharing_tensors(model)
    rewritten: dict[nn.Module, list] = {}
    for finding in _findings("fuse", model, example_input):
        if finding.chain is None:
            continue
        if not finding.taken:
            finding.chain.depthwise._fusion_slower = finding.reason
            continue
        if finding.chain.needs_rewriting:
            rewritten.setdefault(finding.chain.rewritten, []).append(finding.chain)
        else:
            _chain.install(finding.chain)
    for module, chains in rewritten.items():
        _rewrite.install(module, chains)
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Takes :func:`fuse` back: the same model with the modules of every chain run one by one.

    Args, Returns: as of :func:`fuse`.

    Raises:
        RuntimeError: a module of a chain has been given another class meanwhile, as parametrizations do.
    """
    _check_model("unfuse", model)
    if not inplace:
        model = _copy_sharing_tensors(model)
    for module in list(model.modules()):
        if "_fused_forwards" in vars(module):
            _rewrite.remove(module)
    for module in list(model.modules()):
        vars(module).pop("_fusion_slower", None)
        if _chain.chain_of(module) is not None:
            _chain.remove(module)
    return model


class Explanation(list):
    """The list of :class:`Finding` that :func:`explain_fusion` returns; ``str()`` of it is a line for each."""

    @property
    def taken(self) -> list[Finding]:
        return [finding for finding in self if finding.taken]

    @property
    def left(self) -> list[Finding]:
        return [finding for finding in self if not finding.taken]

    def __str__(self):
        lines = [f"{len(self.taken)} of {len(self)} depthwise convolutions are fused with the pointwise one after them"]
        return "\n".join([*lines, *map(str, self)])


def explain_fusion(model: nn.Module, *, example_input: Tensor | tuple | None = None) -> Explanation:
    """What :func:`fuse` does with each depthwise convolution of `model`: taken or left, and why.

    Each :class:`Finding` has ``name`` (of the convolution in the model), ``taken``, ``reason``, ``members``, the names
    of the modules of its chain, and with `example_input`, that of :func:`fuse`, ``gain``, the time of its modules over
    that of the one operation. It may be fused already, and then what :func:`fuse` left because it was slower is said
    with its times.

    `model` is not changed, although its forward runs: attributes, lists, dicts and sets in them, tensors and PyTorch's
    random numbers are afterwards what they were. Hooks are called only with `example_input`.
    """
    _check_model("explain_fusion", model)
    return Explanation(_findings("explain_fusion", model, example_input))


def _check_model(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{function}: the code of a scripted or traced model cannot be changed; fuse before torch.jit")


def _findings(function: str, model: nn.Module, example_input) -> list[Finding]:
    if example_input is None:
        return _find.find(model)
    if not isinstance(example_input, (Tensor, tuple)):
        kind = type(example_input).__name__
        raise TypeError(
            f"{function}: example_input must be a tensor, or a tuple of all that the model is called with, got {kind}"
        )
    findings = _find.find(model, forget_times=True)
    verdicts = _measure.judge(model, example_input, [f.chain for f in findings if f.chain is not None])
    for finding in findings:
        verdict = verdicts.get(finding.chain)
        if verdict is not None:
            finding.gain = verdict.gain
            if verdict.slower:
                finding.taken, finding.reason = False, str(verdict)
    return findings


def _copy_sharing_tensors(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    # Those that pruning and weight norm compute are neither, and cannot be copied at all.
    tensors += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    shared = {id(t): t for t in tensors}
    return copy.deepcopy(model, shared)
