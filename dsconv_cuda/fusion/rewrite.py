"""Chains with an activation that is no module of its own: called as a function, or one module for several places.

There nothing can be told to hand on its input, so the smallest module that holds the chain gets another forward: the
code that torch.fx writes of its graph, with a call of the chain in place of its modules. Only that module's own code
and that of the modules between it and the chain is in the graph, all others are called as they are; it is taken for
training and for evaluation, and used while the whole chain can be one operation (Chain.extent() is ALL). Otherwise the
old forward runs; the modules of the chain are what they were.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable

import torch
from torch import fx, nn

from dsconv_cuda.fusion import chain as _chain
from dsconv_cuda.fusion import find
from dsconv_cuda.fusion.chain import ALL, Chain


class Forwards:
    """The new forwards of one module, by `training`. They name the module's parts, so that they serve copies too."""

    def __init__(self, chains: list[Chain]):
        self.chains = chains
        self.functions: dict[bool, Callable] = {}

    def function(self, module: nn.Module) -> Callable | None:
        """None while the chains cannot be one operation each."""
        if any(chain.extent() != ALL for chain in self.chains):
            return None
        function = self.functions.get(module.training)
        if function is None and not torch.compiler.is_dynamo_compiling():
            function = self.functions[module.training] = write(module, self.chains)
        return function

    def __reduce__(self):
        return Forwards, (self.chains,)  # code is not pickled: it is written again

    def __deepcopy__(self, memo):
        copied = Forwards(copy.deepcopy(self.chains, memo))
        copied.functions.update(self.functions)
        return copied


class _Rewritten(_chain.Copied):
    """A module with other code, for a chain in it."""

    @staticmethod
    def forward_like(old: Callable) -> Callable:
        @functools.wraps(old)  # tracers look at the signature
        def forward(self, *args, **kwargs):
            traced = any(isinstance(argument, fx.Proxy) for argument in args)  # a tracer sees the old code
            function = None if traced else self._fused_forwards.function(self)
            return (function or old)(self, *args, **kwargs)

        return forward


_chain.MIXINS["rewritten"] = _Rewritten


def write(module: nn.Module, chains: list[Chain]) -> Callable:
    """The forward of `module` with a call of each of `chains`, as a function of the module and its arguments."""
    members = {child for chain in chains for _, _, child in chain.places}
    traced = find.trace_around(module, members)
    for chain in chains:
        (node,) = traced.calls[chain.depthwise]
        walk = find.Walk(traced, node)
        again = walk.chain(chain.depthwise, {child: (parent, name, child) for parent, name, child in chain.places})
        if again.way() != chain.way():
            raise ValueError("its own graph shows another chain")
        (x,) = (*node.args, *node.kwargs.values())
        with traced.graph.inserting_before(node), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is no module, parameter or buffer that is named here
            itself = traced.graph.get_attr(f"{node.target}._fused_chain")
            call = traced.graph.call_function(Chain.compute, (itself, x, ALL))
        walk.nodes[-1].replace_all_uses_with(call)
        for old in reversed(walk.nodes):
            traced.graph.erase_node(old)
    return type(fx.GraphModule(module, traced.graph)).forward


def check(module: nn.Module, chain: Chain) -> None:
    """Raises where the forward of `module` cannot be rewritten."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        raise ValueError("it takes arguments with defaults")
    chain.depthwise._fused_chain = chain
    try:
        write(module, [chain])
    finally:
        del chain.depthwise._fused_chain


def install(module: nn.Module, chains: list[Chain]) -> None:
    if "_fused_forwards" in vars(module):  # it has another forward already, for others of its chains
        chains = [*module._fused_forwards.chains, *chains]
        remove(module)
    for chain in chains:
        chain.depthwise._fused_chain = chain
    module._fused_forwards = forwards = Forwards(chains)
    for training in (True, False):
        with find.in_mode(module, training):
            forwards.functions[training] = write(module, chains)
    module.__class__ = _chain.class_for("rewritten", type(module))


def remove(module: nn.Module) -> None:
    for chain in module._fused_forwards.chains:
        del chain.depthwise._fused_chain
    del module._fused_forwards
    _chain.take_class_back(module)
