"""A model's own forward is run, to trace or to measure it, and leaves nothing behind in the model.

Restored are the attributes of every module, what is in those that are plain lists, dicts, sets and deques, and every
tensor that is written to in place. Objects of other classes are as forward leaves them.
"""

import collections
import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._python_dispatch import TorchDispatchMode

_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_SEQUENCES = (list, collections.deque)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """For code that runs the model's forward on proxies or on meta tensors."""
    writes = _Writes()
    with attributes_restored(model), torch.random.fork_rng(devices=[]):
        try:
            with writes:
                yield
        finally:
            writes.undo()


@contextlib.contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """All but the values of tensors."""
    saved: dict[int, tuple] = {}
    for module in model.modules():
        if not isinstance(module, LazyModuleMixin):  # that becomes another module for good
            _save(vars(module), saved)
    try:
        yield
    finally:
        for container, content in saved.values():
            _restore(container, content)


def _save(value, saved: dict[int, tuple]) -> None:
    """Notes what is in a container, and in those in it."""
    if id(value) in saved:
        return
    if type(value) in _MAPPINGS:
        content, inside = list(value.items()), value.values()
    elif type(value) in _SEQUENCES:
        content = inside = list(value)
    elif type(value) is set:
        content, inside = list(value), ()
    else:
        return
    saved[id(value)] = value, content
    for child in inside:
        _save(child, saved)


def _restore(container, content: list) -> None:
    """Writes only where something has changed: other threads may be reading."""
    if type(container) in _MAPPINGS:
        now = container.items()
        same = len(now) == len(content) and all(
            key is old_key and value is old for (key, value), (old_key, old) in zip(now, content, strict=True)
        )
    elif type(container) is set:
        same = container == set(content)
    else:
        same = len(container) == len(content) and all(map(lambda a, b: a is b, container, content))
    if same:
        return
    container.clear()
    if type(container) in _SEQUENCES:
        container.extend(content)
    elif type(container) is set:
        container.update(content)
    else:
        for key, value in content:
            container[key] = value


class _Writes(TorchDispatchMode):
    """Keeps what stood in the tensors that operators write to."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.saved: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = getattr(function, "_schema", None)
        if schema is not None and schema.is_mutable:
            for i, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[i] if i < len(args) else kwargs.get(argument.name)
                    tensors = value if isinstance(value, (list, tuple)) else (value,)
                    self.saved += [(t, t.clone()) for t in tensors if isinstance(t, Tensor)]
        return function(*args, **kwargs)

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, before in reversed(self.saved):
                if tensor.shape == before.shape:  # not where it was resized
                    tensor.copy_(before)
