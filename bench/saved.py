"""How many bytes autograd keeps between a forward and its backward."""

import torch


def saved_bytes(module, forward):
    """Bytes of the distinct storages that `forward()` saves for backward, without the parameters of `module`."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The result is held until the sum is taken, so that no storage is freed and its address counted once for two.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(sizes.values())
    del result
    return total
