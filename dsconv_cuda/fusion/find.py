"""Finds the chains of a model, and says of each depthwise convolution why it is part of one or not.

What follows what is read off a graph of torch.fx. The whole model is traced where that works; otherwise each largest
part of it that can be traced on its own (an nn.Sequential always can). BatchNorm layers and convolutions are leaves of
the graph, classes derived from them too.

The graph is taken in training and in evaluation, since a model may take other ways there; where a convolution is
reached in both, it has to be in the same chain.
"""

import contextlib
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from dsconv_cuda import activations
from dsconv_cuda.batchnorm_module import DepthwiseSeparableConvBN
from dsconv_cuda.children import clear_hooks, has_hooks
from dsconv_cuda.fusion.chain import NONE, Chain, NormBefore, chain_of
from dsconv_cuda.fusion.gates import Gate, gate_of, is_gate
from dsconv_cuda.fusion.untouched import untouched
from dsconv_cuda.modules import DepthwiseSeparableConv1d, DepthwiseSeparableConv2d, DepthwiseSeparableConv3d

FUSED_MODULES = (
    DepthwiseSeparableConv1d,
    DepthwiseSeparableConv2d,
    DepthwiseSeparableConv3d,
    DepthwiseSeparableConvBN,
)
_BATCH_NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_CONVOLUTIONS = tuple(_BATCH_NORMS)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass
class Finding:
    """What becomes of one depthwise convolution."""

    name: str
    taken: bool
    reason: str
    members: tuple[str, ...] = ()  # the names of the modules of its chain
    chain: Chain | None = field(default=None, repr=False)
    gain: float | None = None  # time of the modules over that of the one operation, where that was measured

    def __str__(self):
        gain = f" ({self.gain:.2f} x as fast)" if self.gain is not None else ""
        return f"{'taken' if self.taken else 'left '}  {self.name}: {self.reason}{gain}"


class _No(Exception):
    """Why there is no chain."""


def find(model: nn.Module, *, forget_times: bool = False) -> list[Finding]:
    """forget_times: finds also what fuse() left because it was slower."""
    names = {module: name for name, module in model.named_modules()}
    places = {child: (parent, name, child) for parent in names for name, child in parent._modules.items() if child}
    inside_fused = {c for m in names if isinstance(m, FUSED_MODULES) for c in m.modules() if c is not m}
    inside = {m: set(m.modules()) for m in names}
    candidates = [m for m in names if is_depthwise(m) and m not in inside_fused]
    findings = []
    modes = None
    for module in candidates:
        if chain_of(module) is not None:
            findings.append(_fused_already(module, names))
            continue
        if "_fusion_slower" in vars(module) and not forget_times:
            findings.append(Finding(names[module], False, vars(module)["_fusion_slower"]))
            continue
        try:
            _check_convolution(module)
            if modes is None:
                modes = [_trace_all(model, training) for training in (True, False)]
            chain = _chain_in_every_mode(module, modes, names, places)
            _see_norm_before(chain, modes)
            _see_containers(chain, inside)
            _see_settings(chain)
        except _No as no:
            findings.append(Finding(names[module], False, str(no)))
        else:
            findings.append(Finding(names[module], True, "", (), chain))
    _leave_norms_to_their_chains([finding.chain for finding in findings if finding.chain is not None])
    for finding in findings:
        if finding.chain is not None:
            finding.reason = _describe(finding.chain)
            finding.members = tuple(names[child] for _, _, child in finding.chain.all_places())
    findings += [
        Finding(name, True, "a fused module by itself", (name,))
        for module, name in names.items()
        if isinstance(module, FUSED_MODULES)
    ]
    order = list(names.values())
    return sorted(findings, key=lambda finding: order.index(finding.name))


def _see_containers(chain: Chain, inside: dict[nn.Module, set]) -> None:
    """Which modules hold a part of the chain; `inside` are the modules of each."""

    def partly(members: list[nn.Module]) -> list[nn.Module]:
        group = set(members)
        return [m for m, modules in inside.items() if m not in group and 0 < len(group & modules) < len(group)]

    chain.containers = partly([child for _, _, child in chain.places])
    for container in chain.containers:
        if has_hooks(container):
            raise _No(f"hooks are attached to the {type(container).__name__} around a part of the chain")
    if chain.before is not None:
        chain.before.containers = partly([*(child for _, _, child in chain.before.places), chain.depthwise])


# What can be set later and is not read at each call, by class.
_SETTINGS = {nn.LeakyReLU: "negative_slope", nn.GELU: "approximate", **dict.fromkeys(_DROPOUTS, "p")}


def _see_settings(chain: Chain) -> None:
    def settings(places: list) -> list[tuple[nn.Module, str, object]]:
        return [setting for _, _, module in places for setting in _settings(module)]

    chain.settings = [(chain.depthwise, "padding_mode", "zeros"), *settings(chain.places)]
    if chain.before is not None:
        chain.before.settings = settings(chain.before.places)


def _settings(module: nn.Module) -> list[tuple[nn.Module, str, object]]:
    name = _SETTINGS.get(type(module))
    if name is not None:
        return [(module, name, getattr(module, name))]
    if _own_activation(module) is None:
        return []
    simple = (bool, int, float, str)  # whatever its forward may look at
    return [(module, n, v) for n, v in vars(module).items() if type(v) in simple and n[0] != "_" and n != "training"]


def _see_norm_before(chain: Chain, modes: "list[_Mode]") -> None:
    """Whether all calls of the norm before are known."""
    before = chain.before
    if before is None:
        return
    calls = [
        [node for graph in mode.graphs for m in (before.norm, chain.depthwise) for node in graph.calls.get(m, ())]
        for mode in modes
    ]
    before.everywhere = not any(mode.failures for mode in modes) and all(len(found) in (0, 2) for found in calls)


def _leave_norms_to_their_chains(chains: list[Chain]) -> None:
    """A norm that ends one chain is not the norm before the next."""
    members = {child for chain in chains for _, _, child in chain.places}
    for chain in chains:
        if chain.before is not None and any(child in members for _, _, child in chain.before.places):
            chain.before = None


def is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, _CONVOLUTIONS)
        and module.groups == module.in_channels > 1
        and module.out_channels % module.in_channels == 0
    )


def _fused_already(module: nn.Module, names: dict) -> Finding:
    chain = chain_of(module)
    members = tuple(names[child] for _, _, child in chain.all_places() if child in names)
    reason = _describe(chain)
    if chain.extent() == NONE:
        reason = (
            "fused, but its modules run one by one: one was changed since or hooks are attached, or BatchNorm trains "
            "without kernels"
        )
    return Finding(names[module], True, reason, members)


def _describe(chain: Chain) -> str:
    before = ["BatchNorm", _named(chain.before.activation)] if chain.before is not None else []
    steps = [*before, "depthwise", "BatchNorm" if chain.bn1 is not None else None, _named(chain.activation)]
    steps += ["squeeze-excite" if chain.gate is not None else None, "pointwise"]
    steps += ["BatchNorm" if chain.bn2 is not None else None, _named(chain.out_activation)]
    text = " -> ".join(step for step in steps if step)
    if chain.needs_rewriting:
        text += f", by another forward of {type(chain.rewritten).__name__}"
    return text


def _named(activation: str) -> str | None:
    return None if activation == "identity" else activation


# ---- conditions on single modules -----------------------------------------------------------------------------------


def _check_convolution(conv: nn.Module) -> None:
    _check_parameters(conv)
    if type(conv) not in _CONVOLUTIONS:
        stock = next(kind.__name__ for kind in _CONVOLUTIONS if isinstance(conv, kind))
        raise _No(f"{type(conv).__name__} may compute something else than nn.{stock}")
    if conv.padding_mode != "zeros":
        raise _No(f"padding_mode {conv.padding_mode!r}")
    dtype, device = conv.weight.dtype, conv.weight.device
    if dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise _No(f"its dtype is {dtype}")
    if device.type not in ("cpu", "cuda", "meta"):
        raise _No(f"it is on {device}, which has no kernels")


def _check_parameters(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        raise _No(f"the {_kind(module)} is parametrized")
    _check_hooks(module)
    if not isinstance(module._parameters.get("weight"), nn.Parameter) and getattr(module, "weight", None) is not None:
        raise _No(f"the weight of the {_kind(module)} is no parameter but computed")


def _kind(module: nn.Module) -> str:
    if isinstance(module, _CONVOLUTIONS):
        return "depthwise convolution" if is_depthwise(module) else "convolution"
    return type(module).__name__


def _check_batch_norm(module: nn.Module) -> None:
    _check_parameters(module)
    if module.running_mean is None or not module.track_running_stats:
        raise _No("BatchNorm without running statistics")


def _is_batch_norm(module: nn.Module, of: nn.Module) -> bool:
    """For images of the convolution `of`."""
    norm = _BATCH_NORMS[type(of)]
    return type(module) in (norm, nn.SyncBatchNorm) or (norm is nn.BatchNorm2d and _has_activation(module))


def _has_activation(module: nn.Module) -> bool:
    """timm's BatchNorm with an activation in it."""
    return (
        isinstance(module, nn.BatchNorm2d)
        and type(module).__name__ == "BatchNormAct2d"
        and type(module).__module__.startswith("timm.")
        and type(getattr(module, "drop", None)) is nn.Identity
    )


def _check_pointwise(conv: nn.Module, depthwise: nn.Module) -> None:
    _check_parameters(conv)
    if type(conv) is not type(depthwise):
        raise _No(f"the convolution after it is a {type(conv).__name__}")
    if is_depthwise(conv):
        raise _No("another depthwise convolution follows")
    if set(conv.kernel_size) != {1}:
        one = "x".join("1" * len(conv.kernel_size))
        raise _No(f"the convolution after it is {'x'.join(map(str, conv.kernel_size))}, not {one}")
    if conv.groups != 1:
        raise _No(f"the 1x1 convolution after it has {conv.groups} groups")
    if set(conv.stride) != {1}:
        raise _No("the 1x1 convolution after it is strided")
    if conv.padding not in ("valid", "same") and any(conv.padding):
        raise _No("the 1x1 convolution after it pads")


_ACTIVATION_CALLS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    F.gelu: "gelu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    "tanh": "tanh",
    "tanh_": "tanh",
}


_INPLACE_SECOND = ("relu", "relu6", "silu", "hardswish", "hardsigmoid")  # F.relu(x, True)


def _activation_of_call(node: fx.Node, argument: fx.Node) -> str | None:
    """The activation that the call of a function or method is, if it is one of the kernels'."""
    if node.op not in ("call_function", "call_method") or node.target not in _ACTIVATION_CALLS:
        return None
    name, options = _ACTIVATION_CALLS[node.target], dict(node.kwargs)
    options.pop("inplace", None)
    arguments = [*node.args, *([options.pop("input")] if "input" in options else [])]
    if name in _INPLACE_SECOND and len(arguments) == 2 and isinstance(arguments[1], bool):
        arguments.pop()
    if name == "leaky_relu" and len(arguments) == 1:
        slope = options.pop("negative_slope", activations.LEAKY_RELU_SLOPE)
        name = name if slope == activations.LEAKY_RELU_SLOPE else None
    elif name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(options.pop("approximate", "none"))
    return name if arguments == [argument] and not options else None


_ACTIVATION_MODULES = ("torch.nn.modules.activation",)


def _check_hooks(module: nn.Module) -> None:
    if has_hooks(module):
        raise _No(f"hooks are attached to the {_kind(module)}")
    if "forward" in vars(module):
        raise _No(f"the {_kind(module)} has a forward of its own")


def _activation_of_module(module: nn.Module) -> str:
    _check_hooks(module)
    own = _own_activation(module)
    if own is not None:
        return own
    try:
        return activations.activation_name(module)
    except (TypeError, ValueError):
        raise _No(f"{module} is no activation of the kernels") from None


def _own_activation(module: nn.Module) -> str | None:
    """The activation that is all that a module of somebody else's class computes, as ``return F.silu(x)``."""
    theirs = type(module).__module__.startswith("torch.nn.") or isinstance(module, torch.jit.ScriptModule)
    if theirs or any((module._modules, module._parameters, module._buffers)):
        return None
    try:
        with untouched(module):
            nodes = list(fx.Tracer().trace(module, concrete_args=defaults_of(module) or None).nodes)
    except Exception:
        return None
    x, result = nodes[0], nodes[-1].args[0]
    return _activation_of_call(result, x) if isinstance(result, fx.Node) and list(x.users) == [result] else None


# ---- graphs ---------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def __init__(self, opaque: set[nn.Module]):
        super().__init__()
        self.opaque = opaque

    def create_node(self, *args, **kwargs) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["switches"] = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        )
        return node

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        leaf = (*_CONVOLUTIONS, nn.modules.batchnorm._BatchNorm, *FUSED_MODULES)
        return module in self.opaque or isinstance(module, leaf) or super().is_leaf_module(module, qualified_name)


@dataclass
class Graph:
    """The calls of one part of the model."""

    root: nn.Module
    graph: fx.Graph
    modules: dict[fx.Node, nn.Module]  # of the nodes that call one
    calls: dict[nn.Module, list[fx.Node]]


@dataclass
class _Mode:
    """All graphs of the model in training or in evaluation, and what could not be traced."""

    graphs: list[Graph]
    failures: dict[nn.Module, str]


def _trace_all(model: nn.Module, training: bool) -> _Mode:
    with in_mode(model, training):
        try:
            return _Mode([trace(model, set())], {})
        except Exception as error:
            whole = error
        # Which modules cannot be traced even with all that is in them as leaves?
        failures: dict[nn.Module, str] = {}
        for module in model.modules():
            if any(True for _ in module.children()):
                try:
                    trace(module, set(module.modules()) - {module})
                except Exception as error:
                    failures[module] = f"{type(error).__name__}: {error}"
        failures.setdefault(model, f"{type(whole).__name__}: {whole}")
        graphs, pending, seen = [], [model], set()
        while pending:
            module = pending.pop()
            if module in seen:
                continue
            seen.add(module)
            children = [m for m in module.children() if any(True for _ in m.children())]
            if module not in failures:
                try:
                    graphs.append(trace(module, set(failures)))
                    children = [m for m in graphs[-1].calls if m in failures]
                except Exception as error:
                    failures[module] = f"{type(error).__name__}: {error}"
            pending += children
        return _Mode(graphs, failures)


def trace(root: nn.Module, opaque: set[nn.Module], given: dict | None = None) -> Graph:
    """`given`: values of arguments with a default, which else keep that; ``PH`` for one that the graph takes."""
    if isinstance(root, (nn.ModuleList, nn.ModuleDict)):
        raise NotImplementedError(f"{type(root).__name__} has no forward")
    whole = {module for module in root.modules() if module not in opaque and module is not root and _is_whole(module)}
    tracer = _Tracer(opaque | whole)
    values = defaults_of(root) | (given or {})  # most are switches
    with untouched(root):
        for module in root.modules():
            # They are somebody's, and not made for a tracer; where there are any, chains look after them themselves.
            if has_hooks(module) and not isinstance(module, LazyModuleMixin):
                clear_hooks(module)
        graph = tracer.trace(root, concrete_args={n: v for n, v in values.items() if v is not fx.PH} or None)
    modules, calls = {}, {}
    for node in graph.nodes:
        if node.op == "call_module":
            module = root.get_submodule(node.target)
            modules[node] = module
            calls.setdefault(module, []).append(node)
    return Graph(root, graph, modules, calls)


def _is_whole(module: nn.Module) -> bool:
    """Whether it is known what it computes, whatever is in it."""
    return _own_activation(module) is not None or is_gate(module)


def trace_around(root: nn.Module, members: set[nn.Module], given: dict | None = None) -> Graph:
    """With nothing in it but the code of `root`, and of the modules between it and `members`."""
    beside = {m for m in root.modules() if m is not root and members.isdisjoint(m.modules())}
    return trace(root, beside | members, given)


def defaults_of(root: nn.Module) -> dict:
    parameters = inspect.signature(root.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


# ---- chains ---------------------------------------------------------------------------------------------------------


def _chain_in_every_mode(conv: nn.Module, modes: list[_Mode], names: dict, places: dict) -> Chain:
    chains = [chain for mode in modes if (chain := _chain_in(conv, mode, names, places)) is not None]
    if not chains:
        raise _No("forward does not call it")
    if len({chain.way() for chain in chains}) > 1:
        raise _No("training and evaluation take different ways")
    ways = {None if chain.before is None else (chain.before.norm, chain.before.activation) for chain in chains}
    if len(ways) > 1:
        chains[0].before = None
    return chains[0]


def _chain_in(conv: nn.Module, mode: _Mode, names: dict, places: dict) -> Chain | None:
    nodes = [(graph, node) for graph in mode.graphs for node in graph.calls.get(conv, ())]
    if len(nodes) > 1:
        raise _No(f"it is called {len(nodes)} times")
    if not nodes:
        for module, failure in mode.failures.items():
            if conv in module.modules():
                line = failure.splitlines()[0]
                raise _No(f"forward of {names[module] or type(module).__name__} cannot be traced: {line}")
        return None
    graph, node = nodes[0]
    if len(node.args) + len(node.kwargs) != 1:
        raise _No("it is called with more than one argument")
    chain = Walk(graph, node).chain(conv, places)
    if chain.needs_rewriting:
        chain.rewritten = _checked_for_rewriting(_common_parent(chain, names), chain, names)
    else:
        _check_arguments(_common_parent(chain, names), chain, names)
        chain.before = _norm_before(graph, node, places)
    return chain


def _norm_before(graph: Graph, conv: fx.Node, places: dict) -> NormBefore | None:
    """What stands in front of a depthwise convolution in 2-D or 3-D, where that alone takes its result."""
    if isinstance(graph.modules[conv], nn.Conv1d):
        return None
    members: list[nn.Module] = []
    node, activation = conv, None
    while True:
        (node,) = (*node.args, *node.kwargs.values())
        module = graph.modules.get(node) if isinstance(node, fx.Node) else None
        if module is None or len(node.users) != 1 or len(graph.calls[module]) != 1 or has_hooks(module):
            return None
        if len(node.args) + len(node.kwargs) != 1 or node.meta["switches"] != conv.meta["switches"]:
            return None
        members.insert(0, module)
        try:
            if _is_batch_norm(module, graph.modules[conv]):
                _check_batch_norm(module)
                within = module.act if _has_activation(module) else None
                if within is not None and activation is not None:
                    return None
                if any(_writes(user, graph.modules.get(user)) for user in node.args[0].users):
                    return None  # to the input of the norm, which is read after that
                activation = activation if within is None else _activation_of_module(within)
                return NormBefore(module, activation or "identity", [places[m] for m in members], within)
            if type(module) is nn.Identity:
                continue
            if activation is not None or not _is_activation(module):
                return None
            activation = _activation_of_module(module)
        except _No:
            return None


def _writes(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a call writes to what it is given."""
    if module is not None:
        return getattr(module, "inplace", False)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or bool(node.kwargs.get("inplace")) or node.target in _IN_PLACE_OPERATORS


_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


def _common_parent(chain: Chain, names: dict) -> nn.Module:
    """The smallest module that holds the whole chain."""
    paths = [names[child].split(".")[:-1] for _, _, child in chain.places]
    depth = 0
    while all(len(path) > depth for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    by_name = {name: module for module, name in names.items()}
    return by_name[".".join(paths[0][:depth])]


def _checked_for_rewriting(parent: nn.Module, chain: Chain, names: dict) -> nn.Module:
    from dsconv_cuda.fusion import rewrite  # which needs this module to read graphs

    try:
        rewrite.check(parent, chain)
    except Exception as error:
        name = names[parent] or type(parent).__name__
        line = str(error).splitlines()[0]
        raise _No(f"an activation is no module of its own, and forward of {name} cannot be rewritten: {line}") from None
    return parent


# What an argument is given beside its default, to see whether that changes the way through a chain.
_OTHER_VALUES = {None: fx.PH, False: True, True: False}


def _check_arguments(parent: nn.Module, chain: Chain, names: dict) -> None:
    """That the chain is the same whether or not an optional argument is given to the module that holds it.

    As far as forward can be traced so; what it does otherwise is noticed when it happens (chain.py).
    """
    children = {child: (above, name, child) for above, name, child in chain.places}
    for argument, default in defaults_of(parent).items():
        if not (default is None or isinstance(default, bool)):
            continue
        try:
            graph = trace_around(parent, set(children), {argument: _OTHER_VALUES[default]})
        except Exception:
            continue
        for node in graph.calls.get(chain.depthwise, ()):
            try:
                again = Walk(graph, node).chain(chain.depthwise, children)
                reason = "another way is taken" if chain.way() != again.way() else None
            except _No as no:
                reason = str(no)
            except KeyError:  # a module that is not in the chain
                reason = "another way is taken"
            if reason is not None:
                name = names[parent] or type(parent).__name__
                raise _No(f"{reason}, where forward of {name} is given {argument!r}")


class Walk:
    """From a depthwise convolution along its result."""

    def __init__(self, graph: Graph, node: fx.Node):
        self.graph = graph
        self.nodes = [node]  # that belong to the chain
        self.members: list[nn.Module] = [graph.modules[node]]
        self.needs_rewriting = False  # an activation is called as a function, or its module elsewhere too
        self.gate: Gate | None = None

    @property
    def node(self) -> fx.Node:
        return self.nodes[-1]

    def chain(self, conv: nn.Module, places: dict) -> Chain:
        bn1, activation = self._norm_and_activation(required=True)
        pointwise = self._pointwise()
        bn2, out_activation = self._norm_and_activation(required=False)
        members = [places[m] for m in self.members]
        steps = (conv, bn1, activation, pointwise, bn2, out_activation)
        return Chain(*steps, members, self.needs_rewriting, gate=self.gate)

    def _norm_and_activation(self, required: bool) -> tuple[nn.Module | None, str]:
        """Walks over a BatchNorm and an activation as far as there are any, and behind the depthwise convolution over a
        gate.

        After the depthwise convolution all has to fit, up to the pointwise one; after that the chain may end anywhere.
        """
        norm, activation = None, None
        while True:
            try:
                node, module = self._next()
                if (
                    module is not None
                    and _is_batch_norm(module, self.members[0])
                    and norm is None
                    and activation is None
                ):
                    _check_batch_norm(module)
                    self._check_single(module)
                    within = _activation_of_module(module.act) if _has_activation(module) else None
                    norm, activation = module, within if within != "identity" else None
                    self.members.append(module)
                elif type(module) is nn.Identity or (type(module) in _DROPOUTS and module.p == 0):
                    self._check_single(module)
                    _check_hooks(module)
                    self.members.append(module)
                elif required and module is not None and self.gate is None and self._is_gate(module):
                    self._check_single(module)
                    _check_hooks(module)
                    activation = activation or "identity"  # and no other
                    self.members.append(module)
                elif module is not None and _is_activation(module) and activation is None:
                    activation = _activation_of_module(module)
                    if len(self.graph.calls[module]) == 1:
                        self.members.append(module)
                    else:
                        self._needs_rewriting(required)
                elif module is None and (name := _activation_of_call(node, self.node)) and activation is None:
                    activation = name
                    self._needs_rewriting(required)
                elif required and not isinstance(module, _CONVOLUTIONS):
                    raise _No(self._between(node, module))
                else:
                    return norm, activation or "identity"
            except _No:
                if required:
                    raise
                return norm, activation or "identity"
            self.nodes.append(node)

    def _is_gate(self, module: nn.Module) -> bool:
        conv = self.members[0]
        self.gate = gate_of(module, len(conv.kernel_size), conv.out_channels)
        return self.gate is not None

    def _needs_rewriting(self, required: bool) -> None:
        """Behind the pointwise convolution such an activation can also stay outside."""
        if not required and not self.needs_rewriting:
            raise _No("an activation that is called as a function or more than once")
        self.needs_rewriting = True

    def _pointwise(self) -> nn.Module:
        node, module = self._next()
        _check_pointwise(module, self.members[0])
        self._check_single(module)
        self.members.append(module)
        self.nodes.append(node)
        return module

    def _next(self) -> tuple[fx.Node, nn.Module | None]:
        """The only user of the last node, and the module that it calls, if any."""
        users = list(self.node.users)
        if len(users) != 1:
            raise _No(self._several(users))
        (node,) = users
        if node.op == "output":
            raise _No("nothing follows it in the part of the model that can be traced")
        if node.meta["switches"] != self.node.meta["switches"]:
            raise _No("gradients or autocast are switched after it")
        module = self.graph.modules.get(node)
        if module is not None and (node.args != (self.node,) or node.kwargs):
            raise _No(f"{type(module).__name__} takes more than its result")
        return node, module

    def _check_single(self, module: nn.Module) -> None:
        calls = len(self.graph.calls[module])
        if calls > 1:
            raise _No(f"the {type(module).__name__} after it is called {calls} times")

    def _several(self, users: list[fx.Node]) -> str:
        pooled = any(self._is_pooling(user) for user in users)
        if pooled and any(user.target in ("mul", "mul_", operator.mul, torch.mul) for user in users):
            return "squeeze-excite between it and the 1x1 convolution"
        return f"its result is used {len(users)} times" if users else "its result is not used"

    def _is_pooling(self, node: fx.Node) -> bool:
        module = self.graph.modules.get(node)
        pools = (F.adaptive_avg_pool2d, torch.mean, "mean")
        return isinstance(module, nn.AdaptiveAvgPool2d) or (module is None and node.target in pools)

    def _between(self, node: fx.Node, module: nn.Module | None) -> str:
        """What stands where a 1x1 convolution should, seen through changes of the layout."""
        while (module is None and node.target in ("permute", "transpose", torch.permute)) or _is_permute(module):
            if len(node.users) != 1 or next(iter(node.users)).op == "output":
                break
            (node,) = node.users
            module = self.graph.modules.get(node)
        if module is None:
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
            if "layer_norm" in str(target):
                return "LayerNorm between it and the 1x1 convolution"
            return f"{target}() between it and the 1x1 convolution"
        if "LayerNorm" in type(module).__name__:
            return "LayerNorm between it and the 1x1 convolution"
        if any(word in type(module).__name__ for word in ("Squeeze", "SEModule", "SELayer")):
            return "squeeze-excite between it and the 1x1 convolution"
        return f"{type(module).__name__} between it and the 1x1 convolution"


def _is_permute(module: nn.Module | None) -> bool:
    return module is not None and type(module).__name__ == "Permute"


def _is_activation(module: nn.Module) -> bool:
    ours = type(module).__module__ in _ACTIVATION_MODULES or "activation" in type(module).__module__
    return ours or _own_activation(module) is not None
