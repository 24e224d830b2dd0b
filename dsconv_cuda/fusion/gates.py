"""Modules that multiply their input by numbers that follow from its means, as squeeze-excite (arXiv:1709.01507) does:

    forward(x) = x * f(mean of x over the pixels)

What they compute is read off their graph, whatever their class. f is the same code with the means, an image of one
pixel, in the place of x, up to the product: a mean over one pixel is the pixel. So their children are called as before,
with their hooks and whatever else is done to them.
"""

import copy
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_MOST_MODULES = 16  # in one of them

_POOLS = (
    (nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d),
    (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d),
    (nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d),
)
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")


class Gate:
    """f of a module."""

    def __init__(self, module: nn.Module, dims: int):
        self.module, self.dims = module, dims
        self.functions: dict[bool, Callable] = {}  # by `training`, of the module and the means
        self.function()

    def __call__(self, means: Tensor) -> Tensor:
        return self.function()(self.module, means)

    def function(self) -> Callable:
        function = self.functions.get(self.module.training)
        if function is None:
            function = self.functions[self.module.training] = _function(self.module, self.dims)
        return function

    def __reduce__(self):
        return Gate._again, (self.module, self.dims)  # code is not pickled: it is written again

    @staticmethod
    def _again(module: nn.Module, dims: int) -> "Gate":
        gate = Gate.__new__(Gate)
        gate.module, gate.dims, gate.functions = module, dims, {}
        return gate

    def __deepcopy__(self, memo):
        copied = Gate._again(copy.deepcopy(self.module, memo), self.dims)
        copied.functions.update(self.functions)
        return copied


def may_be_gate(module: nn.Module) -> bool:
    """Whether it is worth to look into it."""
    if next(module.children(), None) is None or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    modules = list(module.modules())
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    found = [m for m in modules if isinstance(m, kinds)]
    return len(modules) <= _MOST_MODULES and bool(found) and all(getattr(m, "groups", 1) == 1 for m in found)


def is_gate(module: nn.Module) -> bool:
    """Of images of some number of dimensions."""
    return any(gate_of(module, dims) is not None for dims in (2, 3, 1))


def gate_of(module: nn.Module, dims: int) -> Gate | None:
    """Its f; None where its graph is another."""
    if not may_be_gate(module):
        return None
    try:
        return Gate(module, dims)
    except Exception:  # whatever its forward raises when it is traced
        return None


class _No(Exception):
    pass


def _function(module: nn.Module, dims: int) -> Callable:
    from dsconv_cuda.fusion import find  # which needs this module to read graphs

    fused = type(module)
    try:
        module.__class__ = getattr(fused, "_fused_original", fused)
        graph = find.trace(module, set(module.modules()) - {module}).graph
    finally:
        module.__class__ = fused
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise _No
    (x,), (output,) = inputs, (node for node in graph.nodes if node.op == "output")
    product = output.args[0]
    if not isinstance(product, fx.Node) or product.target not in _PRODUCTS or len(product.args) != 2 or product.kwargs:
        raise _No
    factors = [arg for arg in product.args if arg is not x]
    in_place = product.target in ("mul_", operator.imul)
    if len(factors) != 1 or not isinstance(factors[0], fx.Node) or (in_place and product.args[0] is not x):
        raise _No
    for user in x.users:
        if user is not product and not _sees_only_means(user, x, product, module, dims):
            raise _No
    output.args = (factors[0],)
    graph.erase_node(product)
    graph.lint()
    return type(fx.GraphModule(module, graph)).forward


def _sees_only_means(node: fx.Node, x: fx.Node, product: fx.Node, module: nn.Module, dims: int) -> bool:
    """Whether a call that is given x makes the same of the means, an image of one pixel."""
    arguments = [*node.args, *node.kwargs.values()]
    if node.op == "call_module":
        child = module.get_submodule(node.target)
        return type(child) is _POOLS[dims - 1][0] and _is_one(child.output_size) and arguments == [x]
    if node.target is _POOLS[dims - 1][1]:
        return len(arguments) == 2 and node.args[:1] == (x,) and _is_one(arguments[1])
    if node.target in (torch.mean, "mean"):
        return node.args[:1] == (x,) and _is_over_pixels(node, dims)
    if node.target == "expand_as":
        return node.args[1:] == (x,) and list(node.users) == [product]
    if node.target == "size" or (node.target is getattr and node.args[1:] == ("shape",)):
        return _sizes_are_of_channels(node)
    return False


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
