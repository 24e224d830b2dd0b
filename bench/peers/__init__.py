"""Other libraries that compute the same pair: each in the layouts that suit it best, with weights prepared once.

A module here is a peer, under its own name without the underscore. It has

    PACKAGES                   what has to be importable
    available()                where that is not enough: whether it is installed
    versions()                 {package: version}, for the header
    prepare(arena, threads)    {layout: Call} for one problem, or CannotDo with the reason

A peer's own layout ("blocked") is that of its inner tensors: what the next layer of a network would read. Inputs are in
place, and outputs go to the same memory again, wherever the interface allows it; nothing is converted while the clock
runs.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

MODULES = ("onednn", "onnx_runtime", "openvino", "ncnn", "litert", "jax")
NAMES = tuple(module.replace("_", "") for module in MODULES)  # in tables and on the command line
BLOCKED = "blocked"


class CannotDo(Exception):
    """What this peer has no way to compute; the text is the reason."""


@dataclass(frozen=True)
class Call:
    """`run()` is what the clock sees; `results(what run returned)` are the tensors in their usual order of sizes."""

    run: Callable[[], object]
    results: Callable[[object], tuple[torch.Tensor, ...]]


def find_peers(names=None):
    """({name: module}, names of the missing) of these peers, or of all."""
    present, missing = {}, []
    for module_name, name in zip(MODULES, NAMES, strict=True):
        if names is not None and name not in names:
            continue
        module = importlib.import_module(f".{module_name}", __name__)
        importable = all(importlib.util.find_spec(package) for package in module.PACKAGES)
        if importable and (not hasattr(module, "available") or module.available()):
            present[name] = module
        else:
            missing.append(name)
    return present, missing


def require(arena, modes=("forward",), dtypes=(torch.float32,)):
    """Raises CannotDo for another mode or dtype than these."""
    if arena.problem.mode not in modes:
        raise CannotDo(f"no {arena.problem.mode}")
    if arena.problem.dtype not in dtypes:
        raise CannotDo(f"no {str(arena.problem.dtype).removeprefix('torch.')}")


def to_blocks(x, block):
    """[N, C, H, W] -> the same sizes with C rounded up, holding [N, C / block, H, W, block]."""
    n, c, h, w = x.shape
    blocks = -(-c // block)
    padded = torch.zeros(n, blocks * block, h, w, dtype=x.dtype)
    padded[:, :c] = x
    return padded.view(n, blocks, block, h, w).permute(0, 1, 3, 4, 2).contiguous().view(n, blocks * block, h, w)


def from_blocks(x, block, channels):
    """The inverse of to_blocks."""
    n, c, h, w = x.shape
    return x.view(n, c // block, h, w, block).permute(0, 1, 4, 2, 3).reshape(n, c, h, w)[:, :channels]
