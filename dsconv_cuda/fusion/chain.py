"""A fused chain at run time: the modules of a model that one call of the op stands for.

The modules stay where they are, with their parameters, buffers and names; so the state_dict, optimisers, EMA and
everything else that walks over a model sees what it saw before. What changes is their class:

    depthwise  ->  FusedConv2d           its forward computes the whole chain
    the others ->  AbsorbedBatchNorm2d,  ... their forward hands on what it is given
                   AbsorbedReLU6,

A BatchNorm before the depthwise convolution, and the activation between them, belong to the chain in training and in
evaluation without gradients: its kernels take their input through both as they read it, so that two tensors less are
written. Then the chain starts there:

    BatchNorm before  ->  FusedBatchNorm2d  its forward computes the whole chain, its own activation included

Each new class is a subclass of the old one. The first asks the chain how much of it is one operation now, and the
others get its answer for what it has made; whoever is called with anything else asks anew. That depends on the state of
the modules alone, so that all get the same answer:

    WITH_NORM  everything, from the BatchNorm before the depthwise convolution on
    ALL        everything from the depthwise convolution on
    PAIR       up to the pointwise convolution; the BatchNorm after that and what follows run their old forward
    NONE       every module runs its old forward: where a hook or a parametrization was added, a module was exchanged,
               or the device has no kernels

A BatchNorm that takes statistics of the batch goes the way of batchnorm.py. Where that is closed (a device without
kernels for it, torch.func), it runs by itself: PAIR, or NONE if it is the one between.

BatchNorm in evaluation folds into the weights of the convolution before it, in float32 or better:

    s = gamma / sqrt(var + eps)        weight' = weight * s        bias' = (bias - mean) * s + beta

with gradients by autograd where one is asked for, otherwise once, and again when something that goes into it has
changed. Noticed are other tensors, every write that PyTorch counts (``_version``; BatchNorm's own update of its
statistics counts in num_batches_tracked), and by their effect also writes through ``.data`` or numpy, to anything but a
few elements of the weights: of these the first and the last of each row are compared, and all of the other tensors.
"""

import functools
import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from dsconv_cuda import _checks, _loader, batchnorm_training, compiled_folding
from dsconv_cuda.activations import activation_number
from dsconv_cuda.batchnorm import Unnormalised, block_of_chain, norm_later, norm_vectors, through_norm
from dsconv_cuda.batchnorm_module import arguments_of
from dsconv_cuda.functional import depthwise_separable_conv1d, depthwise_separable_conv2d, depthwise_separable_conv3d
from dsconv_cuda.fusion.folded import Folded, fold
from dsconv_cuda.kept_weights import has_hooks

NONE, PAIR, ALL, WITH_NORM = 0, 1, 2, 3  # see Chain.extent()

# By the dimensions of an image.
_FUNCTIONS = {1: depthwise_separable_conv1d, 2: depthwise_separable_conv2d, 3: depthwise_separable_conv3d}


Place = tuple[nn.Module, str, nn.Module]  # (parent, name of the child, child)


@dataclass(eq=False)
class NormBefore:
    """norm -> activation, in front of a depthwise convolution that alone takes what comes of it."""

    norm: nn.Module
    activation: str
    places: list[Place]


@dataclass(eq=False)
class Chain:
    """[before] -> depthwise -> [bn1] -> activation -> pointwise -> [bn2] -> out_activation"""

    depthwise: nn.Module
    bn1: nn.Module | None
    activation: str
    pointwise: nn.Module
    bn2: nn.Module | None
    out_activation: str
    places: list[Place]  # of every module of the chain, from the depthwise convolution on
    needs_rewriting: bool = False  # an activation is no module of its own: see rewrite.py
    rewritten: nn.Module | None = None  # the module of which the forward is rewritten then
    before: NormBefore | None = None
    _folded: dict[int, Folded] = field(default_factory=dict, repr=False)
    # The last result, its extent, and whether gradients were enabled.
    _made: "tuple[weakref.ref, int, bool] | None" = field(default=None, repr=False)
    # Threads that have begun with the norm before the depthwise convolution, which has not been called yet.
    _begun: set[int] = field(default_factory=set, repr=False)

    @property
    def dims(self) -> int:
        return len(self.depthwise.kernel_size)

    def all_places(self) -> list[Place]:
        return [*(self.before.places if self.before is not None else ()), *self.places]

    def start(self, x: Tensor, extent: int) -> Tensor:
        """What the chain, as far as `extent`, makes of the input of its first module."""
        y = self.compute(x, extent)
        if not torch.compiler.is_dynamo_compiling():
            self._made = weakref.ref(y), extent, torch.is_grad_enabled()
        return y

    def start_with_norm(self, x: Tensor) -> Tensor | None:
        """What the chain makes of the input of the norm before it; None where that runs by itself."""
        whole = self.extent() == WITH_NORM
        if torch.compiler.is_dynamo_compiling():
            return self.start(x, WITH_NORM) if whole else None
        self._begun.discard(threading.get_ident())
        if not whole:
            return None
        y = self.start(x, WITH_NORM)
        self._begun.add(threading.get_ident())
        return y

    def start_with_depthwise(self, x: Tensor) -> Tensor | None:
        """What the chain makes of the depthwise convolution's input, which with a norm before may be made already; None
        where nothing of it is one operation."""
        if self.before is None:
            extent = self.extent()
        else:
            extent = self.extent_at(x)
            self._check_begun(x, extent)
        if extent == NONE:
            return None
        return x if extent == WITH_NORM else self.start(x, extent)

    def _check_begun(self, x: Tensor, extent: int) -> None:
        """That the norm before took the same part of the chain, and not without gradients that are wanted now.

        Reentrant checkpointing switches them off too, and gives its result a gradient of its own.
        """
        if torch.compiler.is_dynamo_compiling():
            return
        begun, me, made = self._begun, threading.get_ident(), self._made
        switched = me in begun and extent != WITH_NORM
        begun.discard(me)
        if extent == WITH_NORM and made is not None and made[0]() is x:
            switched = torch.is_grad_enabled() and not made[2] and not x.requires_grad
        if switched:
            raise RuntimeError(
                "fuse: gradients were switched on or off, or a module changed, between a BatchNorm and the depthwise "
                "convolution after it, which are one operation; switch before the BatchNorm, or unfuse() the model"
            )

    def extent_at(self, x: Tensor) -> int:
        """extent() for a module after the first, which is given `x`."""
        if not torch.compiler.is_dynamo_compiling():
            made = self._made
            if made is not None and made[0]() is x:
                return made[1]
        extent = self.extent()
        if extent == WITH_NORM and (x.dim() < 2 or x.shape[1] != self.pointwise.out_channels):
            return ALL  # the module is called by itself, and the chain starts with it
        return extent

    def extent(self) -> int:
        """How much of the chain one call of the op computes now."""
        bn1, bn2 = self.bn1, self.bn2
        for module in (self.depthwise, bn1, self.pointwise, bn2):
            if module is not None:
                parameters = module._parameters
                # A parametrization takes them out of there, pruning too.
                if not ("weight" in parameters and "bias" in parameters):
                    return NONE
        trains1 = bn1 is not None and (bn1.training or bn1._buffers.get("running_mean") is None)
        trains2 = bn2 is not None and (bn2.training or bn2._buffers.get("running_mean") is None)
        extent = ALL
        if (trains1 or trains2) and not self._trains_as_one():
            if trains1:
                return NONE
            extent = PAIR
        for parent, name, child in self.places:
            if parent._modules.get(name) is not child or has_hooks(child):
                return NONE
        weight = self.depthwise._parameters["weight"]
        if not torch.compiler.is_dynamo_compiling() and (
            weight.device.type not in _checks.DEVICES or weight.dtype not in _checks.DTYPES
        ):
            return NONE
        return WITH_NORM if extent == ALL and self._takes_norm(trains1 or trains2) else extent

    def _takes_norm(self, trains: bool) -> bool:
        """Whether what is in front of the depthwise convolution is part of the operation: where norms of the chain
        train (`trains`) and this one too, or none trains and no gradient is asked for."""
        before = self.before
        if before is None or before.norm.training != trains or torch.compiler.is_exporting():
            return False
        if not trains and (torch.is_grad_enabled() or not self._trains_as_one()):
            return False
        parameters = before.norm._parameters
        return (
            "weight" in parameters
            and "bias" in parameters
            and all(
                parent._modules.get(name) is child and not has_hooks(child) for parent, name, child in before.places
            )
        )

    def _trains_as_one(self) -> bool:
        device_type = self.depthwise._parameters["weight"].device.type
        if torch.compiler.is_dynamo_compiling():
            return _batch_norm_kernels(device_type)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        return forward_ad._current_level < 0 and _batch_norm_kernels(device_type)

    def compute(self, x: Tensor, extent: int) -> Tensor:
        before = self.before if extent == WITH_NORM else None
        if before is not None and before.norm.training:
            norm = arguments_of(before.norm, isinstance(before.norm, nn.SyncBatchNorm))
            return self._train(norm_later(self.dims, x, norm, before.activation))
        if extent == ALL and any(bn is not None and bn.training for bn in (self.bn1, self.bn2)):
            return self._train(x)
        bn1, bn2 = self.bn1, self.bn2 if extent >= ALL else None
        normed = [bn for bn in (before and before.norm, bn1, bn2) if bn is not None]
        if normed and x.dim() != self.dims + 2:
            # nn.BatchNorm1d takes an unbatched [C, L] for L channels of C images.
            raise ValueError(f"expected {self.dims + 2}D input, a batch, before BatchNorm (got {x.dim()}D input)")
        wants_gradients = bool(normed) and self._wants_gradients(normed)
        out_activation = self.out_activation if extent >= ALL else "identity"
        if torch.compiler.is_dynamo_compiling():
            first = None if before is None else before.norm
            convolutions = self.depthwise, self.pointwise
            if normed and not wants_gradients and compiled_folding.pays(x, *convolutions, first is not None):
                norms = (bn and arguments_of(bn, synchronised=False) for bn in (bn1, bn2, first))
                activations = self.activation, out_activation, "identity" if before is None else before.activation
                return compiled_folding.apply(x, *convolutions, *norms, *activations)
            return self._unkept(x, bn2, out_activation, before)
        if wants_gradients or _transformed():
            return self._unkept(x, bn2, out_activation, before)
        folded = self._folded.get(extent)
        if folded is None:
            unkept = functools.partial(self._unkept, bn2=bn2, out_activation=out_activation, before=before)
            folded = self._folded[extent] = Folded(self, before, bn2, out_activation, unkept)
        return folded(x)

    def _train(self, x: Tensor | Unnormalised) -> Tensor:
        """With statistics of the batch in one or both norms."""
        norms = (self.bn1, self.bn2)
        conv = self.depthwise
        plain = None not in norms and not any(isinstance(bn, nn.SyncBatchNorm) for bn in norms)
        if plain and not torch.compiler.is_compiling():
            y = batchnorm_training.step(
                x, conv, self.bn1, self.pointwise, self.bn2, self.activation, self.out_activation
            )
            if y is not None:
                return y
        arguments = [bn and arguments_of(bn, isinstance(bn, nn.SyncBatchNorm)) for bn in norms]
        return block_of_chain(
            self.dims,
            x,
            conv.weight,
            self.pointwise.weight,
            conv.bias,
            self.pointwise.bias,
            *arguments,
            conv.stride,
            conv.padding,
            conv.dilation,
            self.activation,
            self.out_activation,
        )

    def _wants_gradients(self, normed: list) -> bool:
        """Of the parameters: folding has to be part of the graph then."""
        if not torch.is_grad_enabled():
            return False
        modules = (self.depthwise, self.pointwise, *normed)
        return any(p is not None and p.requires_grad for m in modules for p in m._parameters.values())

    def _unkept(
        self, x: Tensor, bn2: nn.Module | None, out_activation: str, before: NormBefore | None = None
    ) -> Tensor:
        """With the norms folded for this call."""
        conv = self.depthwise
        if before is not None:
            vectors = norm_vectors(arguments_of(before.norm, synchronised=False))
            x = through_norm(x, vectors, activation_number(before.activation))
        dw_weight, dw_bias = fold(conv, self.bn1)
        pw_weight, pw_bias = fold(self.pointwise, bn2)
        operands = (dw_weight, pw_weight, dw_bias, pw_bias)
        return _FUNCTIONS[self.dims](
            x, *operands, conv.stride, conv.padding, conv.dilation, self.activation, out_activation
        )

    def __getstate__(self):
        return {**self.__dict__, "_folded": {}, "_made": None, "_begun": set()}


def _batch_norm_kernels(device_type: str) -> bool:
    _loader.load_library()
    return _loader.batch_norm_kernels_loaded(device_type)


_batch_norm_kernels._dynamo_marked_constant = True  # as functional._load


def _transformed() -> bool:
    """Whether parameters may be something else than they look like: under torch.func, modes and tracers."""
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


# ---- the classes of the modules of a chain --------------------------------------------------------------------------


def _call_in_graph(module: nn.Module, x: fx.Proxy) -> fx.Proxy:
    """A call of `module` in what torch.fx traces, which does so for the classes of torch.nn."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


class _FusedNorm:
    """The BatchNorm before the depthwise convolution."""

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            return _call_in_graph(self, x)
        y = self._fused_chain.start_with_norm(x)
        return super().forward(x) if y is None else y

    def __reduce_ex__(self, protocol):
        return reduce(self, super().__reduce_ex__(protocol))


class _AbsorbedBefore:
    """What is between the two."""

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            return _call_in_graph(self, x)
        return x if self._fused_chain.extent_at(x) == WITH_NORM else super().forward(x)

    def __reduce_ex__(self, protocol):
        return reduce(self, super().__reduce_ex__(protocol))


class _Fused:
    """The depthwise convolution of a chain."""

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            return _call_in_graph(self, x)
        y = self._fused_chain.start_with_depthwise(x)
        return super().forward(x) if y is None else y

    def extra_repr(self) -> str:
        chain = self._fused_chain
        steps = [
            "bn" if chain.bn1 is not None else None,
            chain.activation if chain.activation != "identity" else None,
            f"1x1 to {chain.pointwise.out_channels}",
            "bn" if chain.bn2 is not None else None,
            chain.out_activation if chain.out_activation != "identity" else None,
        ]
        return f"{super().extra_repr()} -> {' -> '.join(step for step in steps if step)}"

    def __reduce_ex__(self, protocol):
        return reduce(self, super().__reduce_ex__(protocol))


class _Absorbed:
    """What comes after it, up to the pointwise convolution."""

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            return _call_in_graph(self, x)
        return super().forward(x) if self._fused_chain.extent_at(x) == NONE else x

    def __reduce_ex__(self, protocol):
        return reduce(self, super().__reduce_ex__(protocol))


class _AbsorbedAfter:
    """What comes after the pointwise convolution."""

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            return _call_in_graph(self, x)
        return x if self._fused_chain.extent_at(x) >= ALL else super().forward(x)

    def __reduce_ex__(self, protocol):
        return reduce(self, super().__reduce_ex__(protocol))


MIXINS = {
    "norm before": _FusedNorm,
    "before depthwise": _AbsorbedBefore,
    "depthwise": _Fused,
    "up to pointwise": _Absorbed,
    "after pointwise": _AbsorbedAfter,
}


@functools.cache
def class_for(kind: str, original: type) -> type:
    name = ("Fused" if kind in ("norm before", "depthwise") else "Absorbed") + original.__name__
    namespace = {"__module__": __name__, "__doc__": MIXINS[kind].__doc__}
    namespace |= {"_fused_original": original, "_fused_kind": kind}
    mixin = MIXINS[kind]
    if hasattr(mixin, "forward_like"):
        namespace["forward"] = mixin.forward_like(original.forward)
    return type(name, (mixin, original), namespace)


def _new(kind: str, original: type):
    cls = class_for(kind, original)
    return cls.__new__(cls)


def reduce(module, reduced: tuple) -> tuple:
    """Copies and pickles: the class is made again where the module is."""
    return (_new, (module._fused_kind, module._fused_original), *reduced[2:])


def install(chain: Chain) -> None:
    """Gives the modules of a chain their new classes."""
    kind = "before depthwise"
    for _, _, module in chain.all_places():
        if module is chain.depthwise:
            kind = "depthwise"
        of_this = "norm before" if chain.before is not None and module is chain.before.norm else kind
        module._fused_chain = chain
        module.__class__ = class_for(of_this, type(module))
        if module is chain.depthwise:
            kind = "up to pointwise"
        elif module is chain.pointwise:
            kind = "after pointwise"


def remove(module: nn.Module) -> None:
    """Gives one of them its old class back."""
    del module._fused_chain
    take_class_back(module)


def take_class_back(module: nn.Module) -> None:
    if type(module) is not class_for(module._fused_kind, module._fused_original):
        raise RuntimeError(
            f"unfuse: {type(module).__name__} has been given another class since it was fused, as parametrizations do; "
            f"take that back first"
        )
    module.__class__ = module._fused_original


def chain_of(module: nn.Module) -> Chain | None:
    return module.__dict__.get("_fused_chain")
