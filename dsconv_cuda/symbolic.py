"""What torch.fx records of the package's modules: one call each, as its Tracer does for those of torch.nn."""

from torch import fx, nn


def call(module: nn.Module, x: fx.Proxy) -> fx.Proxy:
    """A call of `module` with `x`, which torch.fx traces."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


def record(module: nn.Module, kind: type[nn.Module], x: fx.Proxy) -> fx.Proxy:
    """call(), where the forward of `module` is that of `kind`.

    The module that is traced itself, and a subclass whose forward calls this one, cannot be one call within: of those
    the children are recorded, by module.one_by_one().
    """
    inside = x.tracer.root is module or type(module).forward is not kind.forward or "forward" in vars(module)
    return module.one_by_one(x) if inside else call(module, x)
