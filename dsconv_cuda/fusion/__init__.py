"""Fuses the depthwise separable convolutions of a model that was written with stock modules, and takes it back.

find.py     which modules make a chain, and why others do not
chain.py    what takes their place
"""

import copy

from torch import Tensor, nn

from dsconv_cuda.fusion import chain as _chain
from dsconv_cuda.fusion import find as _find
from dsconv_cuda.fusion import rewrite as _rewrite
from dsconv_cuda.fusion.find import Finding

__all__ = ["Explanation", "Finding", "explain_fusion", "fuse", "unfuse"]


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Makes one fused operation of every depthwise -> [BatchNorm] -> [activation] -> pointwise -> [BatchNorm] ->
    [activation] in `model`; :func:`explain_fusion` lists them.

    The fused model has the same modules under the same names, with the same parameters and buffers: state dicts go both
    ways, and an optimiser, an EMA or a scheduler made before goes on working. The depthwise convolution of each chain
    computes all of it, the other modules hand on their input; so intermediate results of a chain are not to be had.

    What is added later is seen: where a hook or a parametrization is put on a module of a chain, where one is
    exchanged, or where the model moves to a device without kernels, the modules of that chain run one by one as before.

    What is gained is memory traffic; how much differs with layers and machine: ``python -m bench.fuse_models`` measures
    it. No chain is left because it would be slower.

    Args:
        model: is left alone unless `inplace`.
        inplace: changes `model` itself. Otherwise a copy is made that shares parameters and buffers with `model`, so
            that training one of them trains both; ``copy.deepcopy`` of the result shares nothing.

    Returns:
        The fused model, of the same class.

    BatchNorm folds into the weights in evaluation; with statistics of the batch it is trained without the intermediate,
    as by :class:`dsconv_cuda.DepthwiseSeparableConvBN2d`. That refuses a second derivative; and under torch.func,
    in compiled graphs and on devices without kernels for it, the modules around a BatchNorm that trains run one by one.
    """
    if not inplace:
        model = _copy_sharing_tensors(model)
    rewritten: dict[nn.Module, list] = {}
    for finding in _find.find(model):
        if finding.chain is None:
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
    if not inplace:
        model = _copy_sharing_tensors(model)
    for module in list(model.modules()):
        if "_fused_forwards" in vars(module):
            _rewrite.remove(module)
    for module in list(model.modules()):
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


def explain_fusion(model: nn.Module) -> Explanation:
    """What :func:`fuse` does with each depthwise convolution of `model`: taken or left, and why.

    Each :class:`Finding` has ``name`` (of the convolution in the model), ``taken``, ``reason`` and ``members``, the
    names of the modules of its chain. `model` is not changed; it may be fused already.
    """
    return Explanation(_find.find(model))


def _copy_sharing_tensors(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    # Those that pruning and weight norm compute are neither, and cannot be copied at all.
    tensors += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    shared = {id(t): t for t in tensors}
    return copy.deepcopy(model, shared)
