"""What a call of a module goes by, as it was when an earlier one had looked into all of it.

Whether a block or a chain is one operation hangs on some dozens of things: the classes of its modules, their hooks,
parameters and settings. Asking for each takes longer than a small layer itself; that all of them still are the objects
which they were takes a loop over dictionaries. What is in the tensors is not looked at here (folded.py, seen.py).
"""

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode")
PARAMETERS = ("weight", "bias")  # of a convolution or a BatchNorm
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_MISSING = object()  # None is something else: what is not there may be found elsewhere


class Guards:
    """Everything that is added has to stay as it is when it is added, for :meth:`hold` to say yes.

    Objects are compared by identity: what they are compared with must be of a kind that is not changed in place.
    """

    __slots__ = ("_attributes", "_empty", "_kinds", "_same", "_sizes")

    def __init__(self):
        self._same: list[tuple[dict, str, object]] = []
        self._empty: list[tuple[dict, str]] = []
        self._kinds: list[tuple[nn.Module, type]] = []
        self._attributes: list[tuple[nn.Module, str, object]] = []
        self._sizes: list[tuple[dict, int]] = []

    def same(self, of: dict, *keys: str) -> None:
        """What is there under these keys, if anything."""
        self._same += ((of, key, of.get(key, _MISSING)) for key in keys)

    def only(self, *dicts: dict) -> None:
        """As many keys as there are."""
        self._sizes += ((of, len(of)) for of in dicts)

    def children(self, module: nn.Module, *names: str) -> None:
        self.same(module.__dict__, "_modules")
        self.same(module._modules, *names)

    def setting(self, module: nn.Module, name: str) -> None:
        if name in module.__dict__:
            self.same(module.__dict__, name)
        else:
            self._attributes.append((module, name, getattr(module, name)))

    def no_hooks(self, module: nn.Module) -> None:
        self._empty += ((module.__dict__, key) for key in _HOOKS)

    def plain(self, module: nn.Module) -> None:
        """The class of `module`, of which nothing else takes the place: no hook, no forward of its own."""
        self._kinds.append((module, type(module)))
        self.no_hooks(module)
        self._empty.append((module.__dict__, "forward"))

    def norm(self, norm: nn.Module) -> None:
        """The tensors of a BatchNorm in evaluation."""
        self.same(norm.__dict__, "training", "_parameters", "_buffers")
        self.same(norm._parameters, *PARAMETERS)
        self.same(norm._buffers, *STATISTICS)

    def convolution(self, conv: nn.Module) -> None:
        self.same(conv.__dict__, "_parameters", *_CONVOLUTION)
        self.same(conv._parameters, *PARAMETERS)

    def hold(self) -> bool:
        for of, key, value in self._same:
            if of.get(key, _MISSING) is not value:
                return False
        for of, key in self._empty:
            if of.get(key):
                return False
        for of, size in self._sizes:
            if len(of) != size:
                return False
        for module, kind in self._kinds:
            if type(module) is not kind:
                return False
        return all(getattr(module, name, _MISSING) is value for module, name, value in self._attributes)
