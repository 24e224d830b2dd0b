"""Has torch.compile's caches on disk tell builds of this package apart.

Their keys know what a model calls, not what the ops it calls dissolve into: a graph that another build made, with other
ops or other arguments, would be taken for this one's, and fail or compute something else. So a digest of the ops joins
``torch.compiler.config.cache_key_tag``, which is part of every key, behind what the user may have put there.
"""

import hashlib

import torch

_NAMESPACE = "dsconv_cuda"


def digest(ops: list[tuple[str, str]]) -> str:
    """Of the schemas and the dispatch keys that have kernels."""
    return hashlib.sha256(repr(sorted(ops)).encode()).hexdigest()[:12]


def registered_ops() -> list[tuple[str, str]]:
    ops = []
    for qualified in torch._C._dispatch_get_all_op_names():
        name, _, overload = qualified.partition(".")
        if not name.startswith(f"{_NAMESPACE}::"):
            continue
        keys = (key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key))
        ops.append((str(torch._C._get_schema(name, overload)), " ".join(keys)))
    return ops


def mark() -> None:
    """To be called when all ops are registered, before anything is compiled with them."""
    config, tag = torch.compiler.config, f"{_NAMESPACE} {digest(registered_ops())}"
    if tag not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag} {tag}".strip()
