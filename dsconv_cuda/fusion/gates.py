"""Modules that multiply their input by numbers that follow from its means, as squeeze-excite (arXiv:1709.01507) does:

    forward(x) = x * f(mean of x over the pixels)

What they compute is read off their graph, whatever their class. f is the same code with the means, an image of one
pixel, in the place of x, up to the product: a mean over one pixel is the pixel. So their children are called as they
are, with their hooks and whatever else is done to them.

A graph does not show everything: what code in Python reads, of attributes for one, is a constant of it, and a
derivative may be somebody's own. So a module is taken only if its own code calls nothing but what is known here
(_CALLS), if it has no tensors of its own and no attributes that could change unnoticed, and if a copy of it gives the
same numbers and gradients both ways. What it follows from is looked at again at each call (Gate.holds).
"""

import copy
import itertools
import operator
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsconv_cuda.children import clear_hooks, has_hooks

_MOST_MODULES = 16  # in one of them

_POOLS = (
    (nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d),
    (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d),
    (nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d),
)
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
_MEANS = (torch.mean, "mean")

# What the code of a gate may call beside its children: it has no state, draws no random numbers, and PyTorch
# differentiates it.
_CALLS = frozenset(
    (
        *_PRODUCTS, *_MEANS, *(function for _, function in _POOLS),
        operator.add, operator.sub, operator.truediv, operator.neg, operator.getitem, torch.add, torch.sub, torch.div,
        "add", "sub", "div", getattr, "size", "expand_as", "expand", "view", "reshape", "flatten", "squeeze",
        "unsqueeze", "transpose", "permute", "contiguous", "to", "float", "type_as",
        torch.flatten, torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute, torch.reshape,
        F.relu, F.relu6, F.leaky_relu, F.silu, F.hardswish, F.hardsigmoid, F.gelu, F.sigmoid, F.tanh, F.softmax,
        torch.relu, torch.sigmoid, torch.tanh, torch.softmax, torch.clamp,
        "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "softmax", "clamp",
    )
)  # fmt: skip

# What their code, as torch.fx writes it, may name.
_NAMES = {"torch": torch, "operator": operator, "inf": float("inf"), "nan": float("nan"), "device": torch.device}

_OF_MODULES = frozenset(vars(nn.Module()))
_SIMPLE = (bool, int, float, str, type(None))


class Gate:
    """f of a module."""

    def __init__(self, module: nn.Module, dims: int):
        self.module, self.kind = module, type(module)
        self.pools: list[tuple[nn.Module, str, nn.Module, object]] = []  # parent, name, child, its output_size
        self.attributes = _attributes(module)
        self.sources = {training: self._source(dims, training) for training in (True, False)}
        self._functions = _compiled(self.sources)

    def __call__(self, means: Tensor) -> Tensor:
        return self._functions[self.module.training](self.module, means)

    def holds(self) -> bool:
        """Whether the module computes still what its graph says; its hooks are asked for elsewhere."""
        for parent, name, child, size in self.pools:
            if parent._modules.get(name) is not child or child.output_size != size or has_hooks(child):
                return False
        for name, value in self.attributes.items():
            now = getattr(self.module, name, None)
            if type(now) is not type(value) or now != value:
                return False
        if torch.compiler.is_dynamo_compiling():  # which cannot look into the rest
            return True
        module, kind = self.module, type(self.module)
        if kind is not self.kind and vars(kind).get("_fused_original") is not self.kind:
            return False
        return not module._parameters and not module._buffers and len(_attributes(module)) == len(self.attributes)

    def guard(self, guards) -> None:
        """Adds what holds() looks at to the Guards of a call."""
        module = self.module
        guards.only(vars(module), module._parameters, module._buffers)
        guards.same(vars(module), *self.attributes)
        for parent, name, child, _ in self.pools:
            guards.children(parent, name)
            guards.plain(child)
            guards.setting(child, "output_size")

    def _source(self, dims: int, training: bool) -> str:
        from dsconv_cuda.fusion import find  # which needs this module to read graphs

        module = self.module
        with find.in_mode(module, training):
            graph = find.trace(module, set(module.modules()) - {module}).graph
        self._cut(graph, dims)
        code = graph.python_code("self")
        if not set(code.globals) <= {*_NAMES, "NoneType", "fx_pytree", "pytree"}:
            raise _No
        return code.src

    def _cut(self, graph: fx.Graph, dims: int) -> None:
        """Leaves f of the graph of the module."""
        inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
        if len(inputs) != 1 or any(node.op == "get_attr" for node in graph.nodes):
            raise _No
        (x,), (output,) = inputs, (node for node in graph.nodes if node.op == "output")
        for node in graph.nodes:
            if node.op in ("call_function", "call_method") and node.target not in _CALLS:
                raise _No
            if node.meta["switches"] != x.meta["switches"]:  # of gradients and autocast
                raise _No
        product = output.args[0]
        if not isinstance(product, fx.Node) or product.target not in _PRODUCTS or len(product.args) != 2:
            raise _No
        factors = [arg for arg in product.args if arg is not x]
        in_place = product.target in ("mul_", operator.imul)
        if product.kwargs or len(factors) != 1 or not isinstance(factors[0], fx.Node):
            raise _No
        if in_place and product.args[0] is not x:
            raise _No
        for user in x.users:
            if user is not product and not self._sees_only_means(user, x, product, dims):
                raise _No
        output.args = (factors[0],)
        graph.erase_node(product)
        graph.lint()

    def _sees_only_means(self, node: fx.Node, x: fx.Node, product: fx.Node, dims: int) -> bool:
        """Whether a call that is given x makes the same of the means, an image of one pixel."""
        arguments = [*node.args, *node.kwargs.values()]
        if node.op == "call_module":
            path, _, name = node.target.rpartition(".")
            parent = self.module.get_submodule(path)
            child = parent._modules[name]
            if type(child) is not _POOLS[dims - 1][0] or not _is_one(child.output_size) or arguments != [x]:
                return False
            if has_hooks(child) or "forward" in vars(child):
                return False
            pool = (parent, name, child, child.output_size)
            if pool not in self.pools:  # from the other mode
                self.pools.append(pool)
            return True
        if node.target is _POOLS[dims - 1][1]:
            return len(arguments) == 2 and node.args[:1] == (x,) and _is_one(arguments[1])
        if node.target in _MEANS:
            return node.args[:1] == (x,) and _is_over_pixels(node, dims)
        if node.target == "expand_as":
            return node.args[0] is not x and node.args[1:] == (x,) and list(node.users) == [product]
        if node.target == "size" or (node.target is getattr and node.args[1:] == ("shape",)):
            return _sizes_are_of_channels(node)
        return False

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_functions"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._functions = _compiled(self.sources)


def _compiled(sources: dict[bool, str]) -> dict[bool, Callable]:
    functions = {}
    for training, source in sources.items():
        names = dict(_NAMES)
        exec(source, names)  # what torch.fx has written of calls in _CALLS
        functions[training] = names["forward"]
    return functions


def _attributes(module: nn.Module) -> dict:
    return {name: value for name, value in vars(module).items() if name not in _OF_MODULES and name != "_fused_chain"}


def _is_simple(value) -> bool:
    return type(value) in _SIMPLE or (type(value) is tuple and all(map(_is_simple, value)))


def may_be_gate(module: nn.Module) -> bool:
    """Whether it is worth to look into it."""
    if not module._modules or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    if module._parameters or module._buffers or not all(map(_is_simple, _attributes(module).values())):
        return False
    modules = list(module.modules())
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    found = [m for m in modules if isinstance(m, kinds)]
    return len(modules) <= _MOST_MODULES and bool(found) and all(getattr(m, "groups", 1) == 1 for m in found)


def is_gate(module: nn.Module) -> bool:
    """By its graph, for images of some number of dimensions."""
    return any(_by_graph(module, dims) is not None for dims in (2, 3, 1))


def gate_of(module: nn.Module, dims: int, channels: int) -> Gate | None:
    """Its f; None where it computes something else, or may do so."""
    gate = _by_graph(module, dims)
    return gate if gate is not None and _is_right(gate, dims, channels) else None


class _No(Exception):
    """It is another module."""


def _by_graph(module: nn.Module, dims: int) -> Gate | None:
    if not may_be_gate(module):
        return None
    before = random.getstate()
    try:
        gate = Gate(module, dims)
    except Exception:  # whatever its forward raises when it is traced
        return None
    return gate if random.getstate() == before else None


def _is_right(gate: Gate, dims: int, channels: int) -> bool:
    """Whether a copy gives the same numbers and gradients as module and as f, and stays what it is."""
    if any(t.device.type == "meta" for t in (*gate.module.parameters(), *gate.module.buffers())):
        return True  # nothing is known of what it computes yet
    image, axes = (5, 4, 3)[-dims:], tuple(range(2, dims + 2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, *image, generator=generator, dtype=torch.float64)
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    found = []
    try:
        for training, grad, as_module in itertools.product((True, False), repeat=3):
            of = copy.deepcopy(gate)
            module = of.module.to("cpu", torch.float64).train(training)
            for child in module.modules():
                clear_hooks(child)
            parameters = list(module.parameters())
            with torch.random.fork_rng([]), torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=False):
                torch.manual_seed(0)
                given = x.clone().requires_grad_()
                own = given * 1  # which a gate may write to
                if as_module:
                    y = module(own)
                else:
                    y = own * of(own.mean(axes, keepdim=True)).expand(3, channels, *(1,) * dims)
                grads = torch.autograd.grad(y, [given, *parameters], dy, allow_unused=True) if grad else []
            if not of.holds():
                return False
            found.append([y.detach(), *grads, *module.buffers()])
    except Exception:  # in one of the two ways
        return False
    pairs = zip(found[::2], found[1::2], strict=True)
    return all(_equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


def _is_one(size) -> bool:
    sizes = size if isinstance(size, (tuple, list)) else (size,)
    return all(isinstance(s, int) and s == 1 for s in sizes)


def _is_over_pixels(node: fx.Node, dims: int) -> bool:
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    axes = given.pop("dim", given.pop("axis", ()))
    kept = given.pop("keepdim", given.pop("keepdims", False))
    axes = axes if isinstance(axes, (tuple, list)) else (axes,)
    if given or not isinstance(kept, bool) or not all(isinstance(axis, int) for axis in axes):
        return False
    return sorted(axis % (dims + 2) for axis in axes) == list(range(2, dims + 2))


def _sizes_are_of_channels(node: fx.Node) -> bool:
    """Whether of these sizes only those of images and channels are taken."""
    if len(node.args) == 2 and node.target == "size":
        return node.args[1] in (0, 1)
    return all(user.target is operator.getitem and (user.args[1] in (0, 1) or not user.users) for user in node.users)
