"""BatchNorm in evaluation folded into the weights beside it, and kept from one call without gradients to the next.

For the blocks of batchnorm_module.py and the chains of fusion/. Under autocast the folded weights are kept in its
dtype. In graphs of torch.compile the op of compiled_folding.py does the same.

Weights are folded again when something that goes into them has changed. Noticed are other tensors, every write that
PyTorch counts (``_version``; BatchNorm's own update of its statistics counts in num_batches_tracked), and by their
effect also writes through ``.data`` or numpy, to anything but a few elements of a large matrix (seen.py). On CUDA,
where looking for these would have the host wait, every call folds, with a launch for each norm.
"""

import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsconv_cuda import gated, kept_weights
from dsconv_cuda.autograd import nobody_watches
from dsconv_cuda.batchnorm import block_of_chain
from dsconv_cuda.functional import autocast_dtype
from dsconv_cuda.guards import PARAMETERS, STATISTICS, Guards
from dsconv_cuda.locks import Lock
from dsconv_cuda.modules import DepthwiseSeparableConv1d, DepthwiseSeparableConv2d, DepthwiseSeparableConv3d
from dsconv_cuda.norms import arguments_of, fold_norm, norm_vectors
from dsconv_cuda.seen import Seen

# By the dimensions of an image.
_MODULES = {1: DepthwiseSeparableConv1d, 2: DepthwiseSeparableConv2d, 3: DepthwiseSeparableConv3d}
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def fold(conv: nn.Module, bn: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that computes bn(conv(x)), with bn in evaluation."""
    if bn is None:
        return conv.weight, conv.bias
    return fold_norm(conv.weight, conv.bias, arguments_of(bn, synchronised=False))


def given_vectors(bn: nn.Module) -> Tensor:
    """What the ops take of bn in evaluation."""
    return norm_vectors(arguments_of(bn, synchronised=False))


def wants_gradients(modules) -> bool:
    """Whether parameters of these get gradients: folding has to be part of the graph then."""
    return torch.is_grad_enabled() and any(
        p is not None and p.requires_grad for module in modules for p in module._parameters.values()
    )


class Folded:
    """[before] -> depthwise -> [bn1] -> activation -> [gate] -> pointwise -> [bn2] -> out_activation for calls without
    gradients of these weights: a module of the folded ones, with `before` behind that norm and its activation.
    """

    def __init__(
        self,
        depthwise: nn.Module,
        bn1: nn.Module | None,
        activation: str,
        pointwise: nn.Module,
        bn2: nn.Module | None,
        out_activation: str,
        before=None,  # a NormBefore
        dtype: torch.dtype | None = None,  # of autocast
        *,
        causal: bool = False,  # of one dimension: the padding, whatever `depthwise` has
        gate: gated.Gate | None = None,
    ):
        self.arguments = (depthwise, bn1, activation, pointwise, bn2, out_activation, before)
        self.dtype, self.of_autocast = dtype, {}
        self.gate = gate
        self.depthwise, self.pointwise = depthwise, pointwise
        self.before, self.bn1, self.bn2 = before, bn1, bn2
        self.in_norm: tuple[Tensor, int] | None = None
        sources = (before and before.norm, depthwise, bn1, pointwise, bn2)
        self.sources = [m for m in sources if m is not None]
        self.norms = [m for m in (before and before.norm, bn1, bn2) if m is not None]
        self.tensors: list[Tensor] = []
        self.dtypes: list[torch.dtype] = []
        self.vectors: list[Tensor] = []
        self.matrices: list[Tensor] = []
        self.versions: list[float] = []  # of the tensors, and eps of the norms
        self.seen: Seen | None = None
        self.guards: Guards | None = None  # of what the last call found, all that again() does not look at
        self.made_of: tuple = ()  # for its owner
        self.rank = len(depthwise.kernel_size) + 2
        self.lock = Lock()
        kind = _MODULES[len(depthwise.kernel_size)]
        self.module = module = kind.__new__(kind)
        nn.Module.__init__(module)
        module.causal = causal
        module.activation = activation
        module.out_activation = out_activation
        # Of the plain class, which modules.py asks for.
        module.depthwise, module.pointwise = _shell(depthwise), _shell(pointwise)
        kept_weights.register(self)

    def forget(self) -> None:
        """Has the next call fold again, and with all checks."""
        self.tensors, self.guards = [], None

    def again(self, x: Tensor) -> Tensor | None:
        """The call where nobody has to look into it, since the guards hold; else None."""
        guards = self.guards
        if guards is None or type(x) is not Tensor or x.dim() != self.rank:
            return None
        if not guards.hold() or not nobody_watches() or x.shape[1] != self.depthwise.groups:
            return None
        if torch.is_grad_enabled() and (self.before is not None or wants_gradients(self.sources)):
            return None
        with self.lock:
            if self.guards is not guards:  # another thread has come with others
                return None
            self._fold_what_changed()
            in_norm = self.in_norm
        return self._call(x, in_norm)

    def takes_again(self, x: Tensor) -> bool:
        """Whether again() would take what the norm before makes of `x`, which is not made for it."""
        guards = self.guards
        return (
            guards is not None
            and type(x) is Tensor
            and x.is_cpu
            and x.dim() == self.rank
            and not torch.is_grad_enabled()
            and guards.hold()
            and nobody_watches()
            and x.dtype == self.depthwise._parameters["weight"].dtype
            and [t.dtype for t in self.tensors] == self.dtypes
        )

    def __call__(
        self, x: Tensor, unkept: Callable[[Tensor], Tensor], guards: Callable[[], Guards] | None = None
    ) -> Tensor:
        """`unkept` makes the call with all its checks: where tensors are no plain ones, and before the first call with
        new ones, for what it has to say of them. guards() are of all that has made this the call to make, but the type
        of x and what is in the tensors."""
        conv = self.depthwise
        dtype = autocast_dtype(x) if autocast_dtype(conv.weight) is not None else None
        if dtype is not self.dtype:
            return self._under_autocast(dtype)(x, unkept)
        mine = self.module.depthwise.__dict__
        mine["stride"], mine["padding"], mine["dilation"] = conv.stride, conv.padding, conv.dilation
        tensors = [
            t
            for module in self.sources
            for group, names in ((module._parameters, PARAMETERS), (module._buffers, STATISTICS))
            for t in map(group.get, names)
            if t is not None
        ]
        known = self._knows(tensors)
        if not known:
            y = unkept(x)
            if not all(map(_is_plain, tensors)):
                return y
        with self.lock:  # else another thread would take for folded what this one is folding
            self.guards = None
            if not self._knows(tensors):
                self.tensors, self.seen = tensors, None
                self.dtypes = [t.dtype for t in tensors]
                self.vectors = [t for t in tensors if t.dim() == 1]
                self.matrices = [conv._parameters["weight"], self.pointwise._parameters["weight"]]
            self._fold_what_changed()
            in_norm = self.in_norm
        if dtype is None:
            y = self._call(x, in_norm)
            if guards is not None and x.is_cpu:
                made = guards()
                with self.lock:
                    if self._knows(tensors):
                        self.guards = made
            return y
        call, x = vars(self.module).get("_kept_call"), x.to(dtype)
        if call is not None:  # without the detour of switching autocast off
            y = call(self.module, x, in_norm, True)
            if y is not None:
                return y
        with torch.autocast(x.device.type, enabled=False):
            return self._call(x, in_norm)

    def _knows(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self.tensors) and all(map(operator.is_, tensors, self.tensors))

    def _under_autocast(self, dtype: torch.dtype) -> "Folded":
        """Of weights of its own: calls of several threads may differ in this."""
        with self.lock:
            folded = self.of_autocast.get(dtype)
            if folded is None:
                folded = self.of_autocast[dtype] = Folded(*self.arguments, dtype, causal=self.module.causal)
        return folded

    def _call(self, x: Tensor, in_norm: tuple[Tensor, int] | None) -> Tensor:
        if self.gate is not None:
            return self._call_gated(x if in_norm is None else torch.ops.dsconv_cuda.norm_act(x, *in_norm))
        if in_norm is None:
            return self.module.forward(x)
        if "_kept_call" not in vars(self.module):
            kept_weights.keep(self.module, x)
        call = vars(self.module).get("_kept_call")
        y = None if call is None else call(self.module, x, in_norm)
        return self.module.forward(torch.ops.dsconv_cuda.norm_act(x, *in_norm)) if y is None else y

    def _call_gated(self, x: Tensor) -> Tensor:
        conv, pointwise = self.module.depthwise, self.module.pointwise
        activations = (self.module.activation, self.module.out_activation)
        if self.rank > 3:
            return gated.of_folded(x, conv, pointwise, *activations, self.gate)
        operands = (conv.weight, pointwise.weight, conv.bias, pointwise.bias)
        geometry = (conv.stride, conv.padding, conv.dilation)
        return block_of_chain(1, x, *operands, None, None, *geometry, *activations, gate=self.gate)

    def _changed(self) -> bool:
        """Whether to fold again; remembers what it saw."""
        first = self.seen is None
        if first:
            self.seen = Seen()
        if not self.norms and self.dtype is None:  # nothing folds; modules.py looks after the weights themselves
            return first
        versions = [t._version for t in self.tensors] + [bn.eps for bn in self.norms]
        same = self.seen.again(self.vectors, self.matrices)
        same = same and versions == self.versions
        self.versions = versions
        return not same

    def _fold_what_changed(self) -> None:
        if not self._changed():
            return
        try:
            # In inference mode others would be made, of no use to calls outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._fold()
        except BaseException:
            self.seen = None
            raise

    def _fold(self) -> None:
        if self.before is not None:
            self.in_norm = given_vectors(self.before.norm), self.before.number
        pairs = (
            (self.module.depthwise, self.depthwise, self.bn1),
            (self.module.pointwise, self.pointwise, self.bn2),
        )
        for mine, conv, bn in pairs:
            mine.groups = conv.groups  # as many as its weight has, in what was pruned
            if bn is None and self.dtype is None:
                mine._parameters.update(conv._parameters)
                continue
            folded = (t if t is None or self.dtype is None else t.to(self.dtype) for t in fold(conv, bn))
            mine.weight, mine.bias = (None if t is None else nn.Parameter(t, requires_grad=False) for t in folded)


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.device.type in ("cpu", "cuda") and not t.is_inference()


def _shell(conv: nn.Module) -> nn.Module:
    kind = _CONVOLUTIONS[len(conv.kernel_size)]
    shell = kind.__new__(kind)
    nn.Module.__init__(shell)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        setattr(shell, name, getattr(conv, name))
    shell.register_parameter("weight", None)
    shell.register_parameter("bias", None)
    return shell
