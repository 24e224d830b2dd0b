"""BatchNorm in evaluation folded into the weights of a chain between the calls of a compiled graph.

What folded.py is in eager mode: where torch.compile meets such a chain without gradients, on the CPU, the graph
holds the op fwd_folded, which takes the weights and the norms as they are. Its kernel folds and packs them once, and
again when one of them has changed (a tensor, its version, or what seen.py looks at). Small weights are folded in the
graph, which takes less; where the input goes through a norm it holds fwd_after_norm_in_graph then. Exports hold the
folding itself.

    norm1, norm2    (running_mean, running_var, weight, bias), each but the first two may be missing; [] for no norm
    in_norm         the same of one that x goes through first, and through in_act, as it is read
"""

import weakref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dsconv_cuda import _checks, compiled_weights, graph_ops
from dsconv_cuda.activations import activation_number
from dsconv_cuda.locks import Lock
from dsconv_cuda.norms import BatchNormArguments, fold_norm, norm_vectors
from dsconv_cuda.seen import Seen

# Elements of the pointwise weight from which folding and packing in the graph take longer than finding what is kept.
LEAST_ELEMENTS = 1 << 16

_SCHEMA = (
    "fwd_folded(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, Tensor?[] norm1, "
    "Tensor?[] norm2, float eps1, float eps2, int[2] stride, int[4] padding, int[2] dilation, int act, int out_act, "
    "Tensor?[] in_norm, float in_eps, int in_act) -> Tensor"
)

_lock = Lock()
_kept: dict[int, list["_Kept"]] = {}  # by id() of the depthwise weight
compiled_weights.stores.append(_kept)


class _Kept:
    """Folded weights of one set of tensors and arguments."""

    __slots__ = ("arguments", "folds", "in_norm", "memory", "operands", "seen", "sources", "versions")

    def __init__(self, sources: list, arguments: tuple):
        self.sources = [weakref.ref(t) for t in sources]
        self.arguments = arguments
        self.seen, self.versions, self.folds = Seen(), [], 0

    def is_for(self, sources: list, arguments: tuple) -> bool:
        if len(sources) != len(self.sources) or arguments != self.arguments:
            return False
        for t, source in zip(sources, self.sources, strict=True):  # noqa: SIM110 - as in kept_weights.py
            if source() is not t:
                return False
        return True


def register(fragment: torch.library.Library, fwd_fake) -> None:
    def fake(x, dw_weight, pw_weight, dw_bias, pw_bias, norm1, norm2, eps1, eps2, *arguments):
        x, dw_weight, pw_weight, one_row = _as_images(x, dw_weight, pw_weight)
        y = fwd_fake(x, dw_weight, pw_weight, dw_bias, pw_bias, *arguments[:5])
        return y.squeeze(-2) if one_row else y

    fragment.define(_SCHEMA)
    fragment.impl("fwd_folded", _fwd_folded, "CPU")
    torch.library.register_fake("dsconv_cuda::fwd_folded", fake)
    torch.library.register_vmap("dsconv_cuda::fwd_folded", _vmap)


def pays(x: Tensor, conv: nn.Module, pointwise: nn.Module, norm_before: bool) -> bool:
    """Whether a call that is being traced, and needs no gradients of parameters, should go by apply()."""
    return (
        compiled_weights.registered
        and not torch.compiler.is_exporting()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and x.requires_grad)
        and isinstance(conv.weight, nn.Parameter)
        and isinstance(pointwise.weight, nn.Parameter)
        and x.device.type == conv.weight.device.type == "cpu"
        and x.dtype == conv.weight.dtype == pointwise.weight.dtype
        and x.dim() == conv.weight.dim()
        and x.shape[1] == conv.in_channels
        and (norm_before or pointwise.weight.numel() >= LEAST_ELEMENTS)
    )


def apply(
    x: Tensor,
    conv: nn.Module,
    pointwise: nn.Module,
    bn1: BatchNormArguments | None,
    bn2: BatchNormArguments | None,
    in_bn: BatchNormArguments | None,
    activation: str,
    out_activation: str,
    in_activation: str,
    *,
    causal: bool = False,
) -> Tensor:
    """What `conv`, `pointwise` and the norms make of x; causal is that of Folded."""
    op = "fwd_folded"
    in_act = activation_number(in_activation)
    kernel, dims = tuple(conv.weight.shape[2:]), x.dim() - 2
    stride, dilation = (_checks.per_axis(op, n, getattr(conv, n), 1, dims) for n in ("stride", "dilation"))
    padding = _checks.padding(op, "causal" if causal else conv.padding, kernel, stride, dilation)
    if dims == 1:
        stride, dilation = (1, *stride), (1, *dilation)
        padding = (0, padding[0], 0, padding[1])
    numbers = stride, padding, dilation, activation_number(activation), activation_number(out_activation)
    bns = (bn1, bn2, in_bn)
    *norms, in_norm = ([] if bn is None else [bn.running_mean, bn.running_var, bn.weight, bn.bias] for bn in bns)
    *eps, in_eps = (0.0 if bn is None else bn.eps for bn in bns)
    weights = conv.weight, pointwise.weight, conv.bias, pointwise.bias
    if pointwise.weight.numel() >= LEAST_ELEMENTS:
        return torch.ops.dsconv_cuda.fwd_folded(x, *weights, *norms, *eps, *numbers, in_norm, in_eps, in_act)
    dw_weight, pw_weight, *biases = _folded(*weights, *norms, *eps)
    x, dw_weight, pw_weight, one_row = _as_images(x, dw_weight, pw_weight)
    y = torch.ops.dsconv_cuda.fwd_after_norm_in_graph(
        x, dw_weight, pw_weight, *biases, graph_ops.row(*numbers), *_in_norm(in_norm, in_eps, in_act)
    )
    return y.squeeze(-2) if one_row else y


def _as_images(x: Tensor, dw_weight: Tensor, pw_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Those of one dimension as images with one row, and whether they are such."""
    if dw_weight.dim() != 3:
        return x, dw_weight, pw_weight, False
    return x.unsqueeze(-2), dw_weight.unsqueeze(-2), pw_weight.unsqueeze(-1), True


def _folded(dw_weight, pw_weight, dw_bias, pw_bias, norm1, norm2, eps1, eps2) -> tuple:
    """The operands (dw_weight, pw_weight, dw_bias, pw_bias) with the norms in them."""
    if norm1:
        dw_weight, dw_bias = fold_norm(dw_weight, dw_bias, BatchNormArguments(*norm1, eps=eps1))
    if norm2:
        pw_weight, pw_bias = fold_norm(pw_weight, pw_bias, BatchNormArguments(*norm2, eps=eps2))
    return dw_weight, pw_weight, dw_bias, pw_bias


def _in_norm(norm: list, eps: float, act: int) -> tuple[Tensor, int] | None:
    """The vectors of the norm before, and the activation after it."""
    return (norm_vectors(BatchNormArguments(*norm, eps=eps)), act) if norm else None


def _unkept(x, *rest) -> Tensor:
    (dw_weight, pw_weight, *biases), arguments, in_norm = _folded(*rest[:8]), rest[8:13], _in_norm(*rest[13:])
    x, dw_weight, pw_weight, one_row = _as_images(x, dw_weight, pw_weight)
    if in_norm is not None:
        x = torch.ops.dsconv_cuda.norm_act.default(x, *in_norm)
    y = torch.ops.dsconv_cuda.fwd.default(x, dw_weight, pw_weight, *biases, *arguments)
    return y.squeeze(-2) if one_row else y


def _fwd_folded(x, *rest) -> Tensor:
    dw_weight, pw_weight, dw_bias, pw_bias, norm1, norm2 = rest[:6]
    sources = [t for t in (dw_weight, pw_weight, dw_bias, pw_bias, *norm1, *norm2, *rest[13]) if t is not None]
    try:
        versions = [t._version for t in sources]
    except RuntimeError:  # inference tensors have none
        return _unkept(x, *rest)
    with _lock:  # else another thread would take for folded what this one is folding
        kept = _find(dw_weight, sources, (*rest[6:13], *rest[14:]))
        same = kept.seen.again([t for t in sources if t.dim() == 1], sources[:2])
        if not same or versions != kept.versions:
            *weights, dw_bias, pw_bias = _folded(*rest[:8])
            _, *weights, _ = _as_images(x, *weights)
            if kept.folds == 0:
                kept.memory = torch.ops.dsconv_cuda.keep.default(*weights, *rest[8:13])
            kept.operands, kept.versions = (*weights, dw_bias, pw_bias), versions
            kept.in_norm = _in_norm(*rest[13:])
            kept.folds += 1
        in_norm, call = kept.in_norm, (*kept.operands, kept.memory, kept.folds)
    one_row = dw_weight.dim() == 3
    x = x.unsqueeze(-2) if one_row else x
    ops = torch.ops.dsconv_cuda
    y = ops.fwd_kept.default(x, *call) if in_norm is None else ops.fwd_after_norm_kept.default(x, *call, *in_norm)
    return y.squeeze(-2) if one_row else y


def _find(dw_weight: Tensor, sources: list, arguments: tuple) -> _Kept:
    name = id(dw_weight)
    entries = _kept.get(name)
    if entries is None or entries[0].sources[0]() is not dw_weight:
        entries = _kept[name] = []
        weakref.finalize(dw_weight, _kept.pop, name, None)
    for kept in entries:
        if kept.is_for(sources, arguments):
            return kept
    entries[:] = [kept for kept in entries if all(source() is not None for source in kept.sources)]
    entries.append(_Kept(sources, arguments))
    return entries[-1]


def _vmap(info, in_dims, *args):
    if in_dims[0] is not None and not any(isinstance(d, int) for d in tree_leaves(in_dims[1:])):
        x = args[0].movedim(in_dims[0], 0)  # images are independent of one another
        y = torch.ops.dsconv_cuda.fwd_folded.default(x.flatten(0, 1), *args[1:])
        return y.unflatten(0, x.shape[:2]), 0

    def element(argument, dim, i: int):
        if isinstance(argument, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [element(a, d, i) for a, d in zip(argument, dim, strict=True)]
        return argument.select(dim, i) if isinstance(dim, int) else argument

    calls = ([element(a, d, i) for a, d in zip(args, in_dims, strict=True)] for i in range(info.batch_size))
    return torch.stack([_unkept(*call) for call in calls]), 0
