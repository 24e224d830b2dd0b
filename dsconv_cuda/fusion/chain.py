"""A fused chain at run time: the modules of a model that one call of the op stands for.

The modules stay where they are, with their parameters, buffers and names; so the state_dict, optimisers, EMA and
everything else that walks over a model sees what it saw before. What changes is their class:

    depthwise  ->  FusedConv2d           its forward computes the whole chain
    the others ->  AbsorbedBatchNorm2d,  ... their forward hands on what it is given
                   AbsorbedReLU6,

Each new class is a subclass of the old one. The first asks the chain how much of it is one operation now, and the
others get its answer for what it has made. What is not that tensor, or has been written to since, they never hand on
as if it were the result: where forward does something in between that its trace did not show, or begins within the
chain, they raise. Only in backward, where checkpointing runs a part of a model again, they are given copies; then they
ask the chain anew, whose answer depends on the state of the modules alone:

    ALL     everything
    PAIR    up to the pointwise convolution; the BatchNorm after that and what follows run their old forward
    NONE    every module runs its old forward: where a hook or a parametrization was added, a hook also to what only a
            part of the chain is in, a module or its forward was exchanged, padding_mode or the slope of an activation
            is another one, or the device has no kernels

A BatchNorm before the depthwise convolution, and the activation between them, are made by the chain's kernels as they
read their input, in training and in evaluation without gradients; so two tensors less are written:

    BatchNorm before      ->  DeferredBatchNorm2d  its forward returns a Deferred (deferred.py)
    activation after it   ->  DeferredReLU6        the same with the activation

Whoever else is given a Deferred finds the value that it stands for; where there are hooks on what holds a part of these
modules, which may do anything with what they see, the norm runs its old forward. In graphs of torch.compile, which know
no such tensors, the BatchNorm before computes the whole chain, and the others hand that on.

A gate between the activation and the pointwise convolution, squeeze-excite (gates.py), is part of the chain in eager
mode on the CPU, and in graphs of torch.compile without gradients: the kernels make the means that it sees, and take
what it makes of them. Elsewhere (CUDA, torch.func, forward-mode AD, graphs that train, exports, norms that share
statistics) the modules of such a chain run one by one.

A BatchNorm that takes statistics of the batch goes the way of batchnorm.py. Where that is closed (a device without
kernels for it, torch.func), it runs by itself: PAIR, or NONE if it is the one between.

BatchNorm in evaluation folds into the weights of the convolution before it, in float32 or better:

    s = gamma / sqrt(var + eps)        weight' = weight * s        bias' = (bias - mean) * s + beta

with gradients by autograd where one is asked for, otherwise once, and again when something that goes into it has
changed (folded.py).
"""

import functools
import weakref
from dataclasses import dataclass, field
from threading import get_ident

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from dsconv_cuda import _checks, _loader, batchnorm_training, compiled_folding, gated, symbolic
from dsconv_cuda.activations import ACTIVATIONS, activation_number
from dsconv_cuda.autograd import transformed
from dsconv_cuda.batchnorm import Unnormalised, block_of_chain, norm_before
from dsconv_cuda.children import has_hooks
from dsconv_cuda.deferred import Deferred, break_graphs
from dsconv_cuda.folded import Folded, fold, given_vectors, wants_gradients
from dsconv_cuda.functional import (
    autocast_dtype,
    depthwise_separable_conv1d,
    depthwise_separable_conv2d,
    depthwise_separable_conv3d,
)
from dsconv_cuda.fusion.gates import Gate
from dsconv_cuda.guards import Guards
from dsconv_cuda.norms import BatchNormArguments, arguments_of

# Bytes from which on one pass saves more than deferring it takes, some 60 us: on layers of EfficientNet-B0 25 to 50 us
# on maps of 7x7 to 28x28, 110 and 300 us on 56x56 and 112x112.
_LEAST_DEFERRED = 1 << 20
NONE, PAIR, ALL = 0, 1, 2  # see Chain.extent()

# By the dimensions of an image.
_FUNCTIONS = {1: depthwise_separable_conv1d, 2: depthwise_separable_conv2d, 3: depthwise_separable_conv3d}


Place = tuple[nn.Module, str, nn.Module]  # (parent, name of the child, child)


@dataclass(eq=False)
class NormBefore:
    """norm -> activation, in front of a depthwise convolution that alone takes what comes of it."""

    norm: nn.Module
    activation: str
    places: list[Place]
    within: nn.Module | None  # the activation, where it is part of the norm's forward
    # Modules that some of these and of the depthwise convolution are part of: what goes in or out there is the value.
    containers: list[nn.Module] = field(default_factory=list)
    settings: list[tuple[nn.Module, str, object]] = field(default_factory=list)  # as of a Chain
    everywhere: bool = False  # all that calls them is known, and the depthwise convolution always follows

    @property
    def number(self) -> int:
        return activation_number(self.activation)


@dataclass(eq=False)
class Chain:
    """[before] -> depthwise -> [bn1] -> activation -> [gate] -> pointwise -> [bn2] -> out_activation"""

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
    gate: Gate | None = None
    # Modules that some of the chain's are part of, and others not.
    containers: list[nn.Module] = field(default_factory=list)
    settings: list[tuple[nn.Module, str, object]] = field(default_factory=list)  # attributes that it has to have
    _folded: dict[tuple[int, bool], Folded] = field(default_factory=dict, repr=False)
    # The last result, its extent and version; and the same of each thread.
    _made: "tuple[weakref.ref, int, int | None] | None" = field(default=None, repr=False)
    _made_by: dict[int, tuple] = field(default_factory=dict, repr=False)
    _made_in_graph: Tensor | None = field(
        default=None, repr=False
    )  # and while a graph is traced, up to the last module
    _made_by_norm: bool = False  # in a graph: the norm before has computed the chain

    @property
    def dims(self) -> int:
        return len(self.depthwise.kernel_size)

    def all_places(self) -> list[Place]:
        return [*(self.before.places if self.before is not None else ()), *self.places]

    def way(self) -> tuple:
        """What is computed, in order."""
        return self.activation, self.out_activation, *(child for _, _, child in self.places)

    def start(self, x: Tensor) -> Tensor | None:
        """What the chain makes of the depthwise convolution's input; None where nothing of it is one operation."""
        if self._made_by_norm:
            self._made_by_norm = False
            noted = self._made_in_graph
            if noted is not None and noted is not x and not _in_subgraph():
                raise RuntimeError(self._unknown(self.depthwise))
            return x
        traced = torch.compiler.is_dynamo_compiling()
        y, extent = None if traced else self.again(x), ALL
        if y is None:
            extent = self.extent()
            if extent == NONE:
                return None
            if type(x) is Deferred and not self._takes(x, extent):
                x = x.value()
            y = self.compute(x, extent)
        if traced:
            self._note_in_graph(y)
        else:
            version = None if y.is_inference() else y._version
            self._made = self._made_by[get_ident()] = weakref.ref(y), extent, version
        return y

    def again(self, x: Tensor) -> Tensor | None:
        """All of the chain in evaluation as in an earlier call, where its guards hold; else None."""
        if type(x) is not Deferred:
            folded = self._folded.get((ALL, False))
            return None if folded is None else folded.again(x)
        folded = self._folded.get((ALL, True))
        if folded is None or x.owner is not self or x.is_made() or x.act != self.before.number:
            return None
        x.check_sources()
        return folded.again(x.y)

    def defer(self, x: Tensor) -> Tensor | None:
        """What the norm before makes of its input, as the chain takes it; None where it runs by itself."""
        before, norm = self.before, self.before.norm
        self._made_by_norm = False
        if torch.compiler.is_dynamo_compiling():
            if not (self._defers(x) and self._alone_in_graph()):
                return None
            self._made_by_norm = True
            if norm.training:
                y = self._train(norm_before(self.dims, x, _of_batch(norm), before.activation, self))
            else:
                y = self._evaluate(x, ALL, before)
            self._note_in_graph(y)
            return y
        if self._too_small_to_defer(x):
            return None
        folded = self._folded.get((ALL, True))
        if folded is None or not folded.takes_again(x):
            if torch._C._get_tracing_state() is not None or type(x) not in (Tensor, nn.Parameter):
                return None
            if not self._defers(x):
                return None
        if x.numel() == x.shape[1] and not isinstance(norm, nn.SyncBatchNorm):  # PyTorch says what is wrong
            return None
        activation = before.activation if before.within else "identity"
        if norm.training:
            return norm_before(self.dims, x, _of_batch(norm), activation, self)
        vectors = functools.partial(given_vectors, norm)
        return Deferred(x, vectors, activation_number(activation), self, norm)

    def _too_small_to_defer(self, x: Tensor) -> bool:
        """In front of a gate what is deferred is one pass over x in evaluation, instead of two by its modules."""
        return self.gate is not None and not self.before.norm.training and x.numel() * x.itemsize < _LEAST_DEFERRED

    def compute_with_norm(self, x: Tensor) -> Tensor:
        """What the norm before and the whole chain make of `x`, which defer() takes."""
        deferred, number = self.defer(x), self.before.number
        return self.compute(deferred if deferred.act == number else deferred.followed_by(number), ALL)

    def takes_norm(self, x: Tensor) -> bool:
        """Whether the norm before, given `x`, defers what it makes, and the chain takes that."""
        if self.before is None or self._too_small_to_defer(x):
            return False
        return self._defers(x) and self.extent() == ALL

    def _defers(self, x: Tensor) -> bool:
        norm, trains = self.before.norm, self._trains()
        # A graph does as well with what is before a gate.
        if self.gate is not None and (torch.compiler.is_compiling() or not self._gates()):
            return False
        if x.device.type == "meta" or x.dim() != self.dims + 2 or norm.training != trains:
            return False
        if not trains and torch.is_grad_enabled():
            return False
        if not (
            "weight" in norm._parameters
            and "bias" in norm._parameters
            and norm._buffers.get("running_mean") is not None
        ):
            return False
        wide = _checks.wide_dtype(x.dtype)
        of_norm = (norm._parameters["weight"], norm._buffers["running_mean"])
        if x.dtype != self._operand_dtype(x) or any(t is not None and t.dtype not in (x.dtype, wide) for t in of_norm):
            return False
        places, within = self.before.places, self.before.within
        if within is not None and (norm._modules.get("act") is not within or has_hooks(within)):
            return False
        for parent, name, child in places:
            if parent._modules.get(name) is not child or has_hooks(child) or "forward" in child.__dict__:
                return False
        for container in self.before.containers:
            if has_hooks(container):
                return False
        for module, name, value in self.before.settings:
            if getattr(module, name) != value:
                return False
        return forward_ad._current_level < 0 and self._trains_as_one()

    def _alone_in_graph(self) -> bool:
        """Whether nothing but the chain gets what the norm before makes, in a graph that cannot hold a Deferred."""
        return self.before.everywhere and not torch.compiler.is_exporting() and self.extent() == ALL

    def _takes(self, x: Deferred, extent: int) -> bool:
        """Whether the kernels can make what `x` stands for as they read it."""
        x.check_sources()
        if (
            x.is_made()
            or x.owner is not self
            or extent != ALL
            or x.act != self.before.number
            or torch.compiler.is_compiling()
        ):
            return False
        y = x.y  # a plain tensor, quicker to ask
        if not self._trains() and (torch.is_grad_enabled() or torch.is_autocast_enabled(y.device.type)):
            return False
        return y.dtype == self._operand_dtype(y) and self._trains_as_one()

    def _trains(self) -> bool:
        return any(bn is not None and bn.training for bn in (self.bn1, self.bn2))

    def _operand_dtype(self, x: Tensor) -> torch.dtype:
        """What the convolution takes x as."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        weight = self.depthwise._parameters.get("weight")
        return x.dtype if weight is None else weight.dtype

    def extent_at(self, x: Tensor, module: nn.Module, passed_on: int) -> int:
        """extent() for `module`, one after the depthwise one, which is given `x`, and hands that on from `passed_on`
        on."""
        if torch.compiler.is_dynamo_compiling():
            extent = self.extent()
            noted = self._made_in_graph
            if extent >= passed_on and noted is not None and not _in_subgraph():
                if noted is not x:
                    raise RuntimeError(self._unknown(module))
                if module is self.places[-1][2]:
                    self._made_in_graph = None
            return extent
        made = self._made
        if made is not None and made[0]() is x and (made[2] is None or made[2] == x._version):  # most calls
            return made[1]
        return self._extent_at_another(x, module, passed_on)

    def _note_in_graph(self, y: Tensor) -> None:
        if not _in_subgraph():
            self._made_in_graph = y

    def _extent_at_another(self, x: Tensor, module: nn.Module, passed_on: int) -> int:
        """Where `x` is not what the chain has made last."""
        made = self._made_by.get(get_ident())
        if made is not None and _is_still(x, made):
            return made[1]
        extent = self.extent()
        if extent < passed_on:
            return extent
        if x is self._made_in_graph:  # the graph ended within the chain
            if module is self.places[-1][2]:
                self._made_in_graph = None
            return extent
        if torch._C._current_graph_task_id() == -1:  # not in backward
            raise RuntimeError(self._unknown(module))
        return extent

    def _unknown(self, module: nn.Module) -> str:
        kind = module._fused_original.__name__
        return (
            f"fuse: a {kind} is part of a fused chain, whose first module computes all of it, and was given something "
            f"else than the result of that: the model does more between the two than when it was fused (an optional "
            f"argument, an attribute, another method), or begins within the chain. Take the fused operations out of it "
            f"with dsconv_cuda.unfuse, or fuse only parts of the model"
        )

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
        if self.gate is not None and not self._gates():
            return NONE
        for parent, name, child in self.places:
            if parent._modules.get(name) is not child or has_hooks(child) or "forward" in child.__dict__:
                return NONE
        for container in self.containers:
            if has_hooks(container):
                return NONE
        for module, name, value in self.settings:
            if getattr(module, name) != value:
                return NONE
        weight = self.depthwise._parameters["weight"]
        if not torch.compiler.is_dynamo_compiling() and (
            weight.device.type not in _checks.DEVICES or weight.dtype not in _checks.DTYPES
        ):
            return NONE
        return extent

    def _trains_as_one(self) -> bool:
        weight = self.depthwise._parameters.get("weight")
        if weight is None:  # parametrized or pruned
            return False
        device_type = weight.device.type
        if torch.compiler.is_dynamo_compiling():
            return _batch_norm_kernels(device_type)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        return forward_ad._current_level < 0 and _batch_norm_kernels(device_type)

    def _gates(self) -> bool:
        """Whether the gate is what it was, and there are kernels for it where this is called."""
        if not self.gate.holds():
            return False
        if gated.refused_in_graph() or (torch.compiler.is_compiling() and self._trains()):
            return False
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return False
        if any(isinstance(bn, nn.SyncBatchNorm) and bn.training for bn in (self.bn1, self.bn2)):
            return False
        return self.depthwise._parameters["weight"].device.type in ("cpu", "meta") and gated.kernels_loaded()

    def compute(self, x: Tensor, extent: int) -> Tensor:
        if extent == ALL and self._trains():
            return self._train(x)
        return self._evaluate(x, extent, self.before if type(x) is Deferred else None)

    def _evaluate(self, x: Tensor, extent: int, before: NormBefore | None) -> Tensor:
        """With given statistics in both norms, and in the one before where that is there: then x is its input, or what
        it has deferred."""
        if type(x) is Deferred:
            x = x.y
        bn1, bn2 = self.bn1, self.bn2 if extent == ALL else None
        normed = [bn for bn in (before and before.norm, bn1, bn2) if bn is not None]
        if normed and x.dim() != self.dims + 2:
            # nn.BatchNorm1d takes an unbatched [C, L] for L channels of C images.
            raise ValueError(f"expected {self.dims + 2}D input, a batch, before BatchNorm (got {x.dim()}D input)")
        # Weights are others than the modules' own where norms fold into them, and where autocast casts them.
        others = bool(normed) or autocast_dtype(x) is not None
        in_graph = others and wants_gradients((self.depthwise, self.pointwise, *normed))
        out_activation = self.out_activation if extent == ALL else "identity"
        if torch.compiler.is_dynamo_compiling():
            first = None if before is None else before.norm
            convolutions = self.depthwise, self.pointwise
            if self.gate is not None:  # the norm behind y joins what the graph does to that
                y = self._unkept(x, None, "identity")
                return ACTIVATIONS[out_activation].value(y if bn2 is None else _evaluated(bn2, y))
            if normed and not in_graph and compiled_folding.pays(x, *convolutions, first is not None):
                norms = (bn and arguments_of(bn, synchronised=False) for bn in (bn1, bn2, first))
                activations = self.activation, out_activation, "identity" if before is None else before.activation
                return compiled_folding.apply(x, *convolutions, *norms, *activations)
            return self._unkept(x, bn2, out_activation, before)
        # A gate runs under autocast itself.
        checked = self.gate is not None and (autocast_dtype(x) is not None or x.dim() != self.dims + 2)
        if in_graph or checked or transformed():
            return self._unkept(x, bn2, out_activation, before)
        folded = self._folded.get((extent, before is not None))
        if folded is None:
            modules = self.depthwise, bn1, self.activation, self.pointwise, bn2, out_activation
            folded = self._folded[extent, before is not None] = Folded(*modules, before, gate=self.gate)
        unkept = functools.partial(self._unkept, bn2=bn2, out_activation=out_activation, before=before)
        return folded(x, unkept, functools.partial(self._guards, before) if extent == ALL else None)

    def _guards(self, before: NormBefore | None) -> Guards:
        """Of the calls that _evaluate() takes of the whole chain, and of what defer() gives it to take."""
        guards = Guards()
        for norm in (before and before.norm, self.bn1, self.bn2):
            if norm is not None:
                guards.norm(norm)
        guards.convolution(self.depthwise)
        guards.convolution(self.pointwise)
        if before is not None and before.within is not None:
            guards.children(before.norm, "act")
            guards.no_hooks(before.within)
        for part in (self,) if before is None else (self, before):
            for parent, name, child in part.places:
                guards.children(parent, name)
                guards.plain(child)
            for container in part.containers:
                guards.no_hooks(container)
            for module, name, _ in part.settings:
                guards.setting(module, name)
        if self.gate is not None:
            self.gate.guard(guards)
        return guards

    def _train(self, x: Tensor | Deferred | Unnormalised) -> Tensor:
        """With statistics of the batch in one or both norms."""
        if type(x) is Deferred:
            x = Unnormalised(x.y, x.vectors, x.act, x)
        norms = (self.bn1, self.bn2)
        conv = self.depthwise
        plain = None not in norms and self.gate is None and not any(isinstance(bn, nn.SyncBatchNorm) for bn in norms)
        if plain and not torch.compiler.is_compiling():
            y = batchnorm_training.step(
                x, conv, self.bn1, self.pointwise, self.bn2, self.activation, self.out_activation
            )
            if y is not None:
                return y
        arguments = [bn and _of_batch(bn) for bn in norms]
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
            gate=self.gate,
        )

    def _unkept(
        self, x: Tensor, bn2: nn.Module | None, out_activation: str, before: NormBefore | None = None
    ) -> Tensor:
        """With the norms folded for this call."""
        conv = self.depthwise
        if before is not None:
            x = torch.ops.dsconv_cuda.norm_act(x, given_vectors(before.norm), before.number)
        dw_weight, dw_bias = fold(conv, self.bn1)
        pw_weight, pw_bias = fold(self.pointwise, bn2)
        operands = (dw_weight, pw_weight, dw_bias, pw_bias)
        if self.gate is not None:
            if x.dim() == self.dims + 1:  # without norms, which take none, an image that is no batch
                return self._unkept(x.unsqueeze(0), bn2, out_activation).squeeze(0)
            geometry = (conv.stride, conv.padding, conv.dilation)
            activations = (self.activation, out_activation)
            return block_of_chain(self.dims, x, *operands, None, None, *geometry, *activations, gate=self.gate)
        return _FUNCTIONS[self.dims](
            x, *operands, conv.stride, conv.padding, conv.dilation, self.activation, out_activation
        )

    def __getstate__(self):
        made = {"_made": None, "_made_by": {}, "_made_in_graph": None, "_made_by_norm": False}
        return {**self.__dict__, "_folded": {}, **made}


def _is_still(x: Tensor, made: tuple) -> bool:
    """Whether `x` is what was made, or an alias of it, as reentrant checkpointing gives of what a segment hands on."""
    y, version = made[0](), made[2]
    if x is y:
        return version is None or version == x._version
    if y is None or version is None or not x._is_view() or x._base is not (y._base if y._is_view() else y):
        return False
    if x._version != version or y._version != version:
        return False
    return (x.shape, x.stride(), x.storage_offset()) == (y.shape, y.stride(), y.storage_offset())


def _evaluated(norm: nn.Module, y: Tensor) -> Tensor:
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def _of_batch(norm: nn.Module) -> BatchNormArguments:
    return arguments_of(norm, isinstance(norm, nn.SyncBatchNorm))


def _in_subgraph() -> bool:
    """Whether torch.compile traces the body of a higher-order operation, of checkpointing for one, which must not note
    anything outside of it. The answer is a constant of the graph."""
    try:
        tracer = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.current_tracer
        return tracer.parent is not None
    except AttributeError:  # another version of PyTorch
        return True


_in_subgraph._dynamo_marked_constant = True  # as functional._load


def _batch_norm_kernels(device_type: str) -> bool:
    _loader.load_library()
    return device_type == "meta" or _loader.batch_norm_kernels_loaded(device_type)


_batch_norm_kernels._dynamo_marked_constant = True  # as functional._load


# ---- the classes of the modules of a chain --------------------------------------------------------------------------


class Copied:
    """Of a class that class_for() makes: copies and pickles make it again."""

    def __reduce_ex__(self, protocol):
        return (_new, (self._fused_kind, self._fused_original), *super().__reduce_ex__(protocol)[2:])


class _DeferredNorm(Copied):
    """The BatchNorm before the depthwise convolution."""

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            return symbolic.call(self, x)
        deferred = self._fused_chain.defer(x)
        return super().forward(x) if deferred is None else deferred


class _DeferredActivation(Copied):
    """What is between the two."""

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            return symbolic.call(self, x)
        chain = self._fused_chain
        if chain._made_by_norm:
            return x
        deferred = None
        if type(x) is Deferred and x.owner is chain and not has_hooks(self):
            deferred = x if self._fused_original is nn.Identity else x.followed_by(chain.before.number)
        return super().forward(x) if deferred is None else deferred


class _Fused(Copied):
    """The depthwise convolution of a chain."""

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            return symbolic.call(self, x)
        y = self._fused_chain.start(x)
        return super().forward(x) if y is None else y

    def extra_repr(self) -> str:
        chain = self._fused_chain
        steps = [
            "bn" if chain.bn1 is not None else None,
            chain.activation if chain.activation != "identity" else None,
            "gate" if chain.gate is not None else None,
            f"1x1 to {chain.pointwise.out_channels}",
            "bn" if chain.bn2 is not None else None,
            chain.out_activation if chain.out_activation != "identity" else None,
        ]
        return f"{super().extra_repr()} -> {' -> '.join(step for step in steps if step)}"


class _Absorbed(Copied):
    """What comes after it, up to the pointwise convolution."""

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            return symbolic.call(self, x)
        return super().forward(x) if self._fused_chain.extent_at(x, self, PAIR) == NONE else x


class _AbsorbedAfter(Copied):
    """What comes after the pointwise convolution."""

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            return symbolic.call(self, x)
        return x if self._fused_chain.extent_at(x, self, ALL) == ALL else super().forward(x)


MIXINS = {
    "norm before": _DeferredNorm,
    "before depthwise": _DeferredActivation,
    "depthwise": _Fused,
    "up to pointwise": _Absorbed,
    "after pointwise": _AbsorbedAfter,
}


_NAMES = {"norm before": "Deferred", "before depthwise": "Deferred", "depthwise": "Fused"}


@functools.cache
def class_for(kind: str, original: type) -> type:
    name = _NAMES.get(kind, "Absorbed") + original.__name__
    namespace = {"__module__": __name__, "__doc__": MIXINS[kind].__doc__}
    namespace |= {"_fused_original": original, "_fused_kind": kind}
    mixin = MIXINS[kind]
    if hasattr(mixin, "forward_like"):
        namespace["forward"] = mixin.forward_like(original.forward)
    return type(name, (mixin, original), namespace)


def _new(kind: str, original: type):
    if kind == "norm before":
        break_graphs()
    cls = class_for(kind, original)
    return cls.__new__(cls)


def install(chain: Chain) -> None:
    """Gives the modules of a chain their new classes."""
    if chain.before is not None:
        break_graphs()
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
