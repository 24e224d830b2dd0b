"""JAX, compiled by XLA, in NHWC: inference with the weights as constants, and training by jax.vjp."""

import os

import torch

from . import Call, require

PACKAGES = ("jax", "jaxlib")
NUMBERS = ("NHWC", "OIHW", "NHWC")


def versions():
    import jax

    return {"jax": jax.__version__}


def prepare(arena, threads):
    _use_threads(threads)
    import jax

    require(arena, modes=("forward", "training"), dtypes=(torch.float32, torch.bfloat16))
    training = arena.problem.mode == "training"
    x, dy = (_to_jax(tensor.permute(0, 2, 3, 1)) for tensor in (arena.x, arena.dy))
    weights = tuple(_to_jax(values) for values in arena.state.values())

    def pair(x, *weights):
        return _pair(arena.problem, x, *weights)

    def step(dy, *inputs):
        y, backward = jax.vjp(pair, *inputs)
        return y, *backward(dy)

    compiled = jax.jit(step) if training else jax.jit(lambda x: (pair(x, *weights),))
    arguments = (dy, x, *weights) if training else (x,)

    def run():
        return jax.block_until_ready(compiled(*arguments))

    def results(arrays):
        images = 2 if training else 1  # y, and the gradient of x
        tensors = [_to_torch(array) for array in arrays]
        return (*(tensor.permute(0, 3, 1, 2) for tensor in tensors[:images]), *tensors[images:])

    return {"channels_last": Call(run, results)}


def _pair(problem, x, dw_weight, dw_bias, pw_weight, pw_bias):
    import jax.numpy as jnp
    from jax import lax

    layer = problem.layer

    def act(values, name):
        return jnp.clip(values, 0, 6) if name == "relu6" else values

    z = lax.conv_general_dilated(
        x,
        dw_weight,
        (layer.stride,) * 2,
        [(pad, pad) for pad in layer.padding],
        rhs_dilation=(layer.dilation,) * 2,
        dimension_numbers=NUMBERS,
        feature_group_count=layer.channels,
    )
    a = act(z + dw_bias, problem.activation)
    y = lax.conv_general_dilated(a, pw_weight, (1, 1), "VALID", dimension_numbers=NUMBERS)
    return act(y + pw_bias, problem.out_activation)


def _to_jax(tensor):
    """By way of float32, which holds every bf16: NumPy knows no bf16."""
    import jax.numpy as jnp

    return jnp.array(tensor.float().numpy(), str(tensor.dtype).removeprefix("torch."))


def _to_torch(array):
    import jax.numpy as jnp
    import numpy

    return torch.from_numpy(numpy.array(array.astype(jnp.float32)))


def _use_threads(threads):
    """XLA sizes its pool when its client is made, by this variable: another number needs another client."""
    if os.environ.get("NPROC") == str(threads):
        return
    os.environ["NPROC"], os.environ["JAX_PLATFORMS"] = str(threads), "cpu"
    import jax
    from jax.extend.backend import clear_backends

    jax.clear_caches()
    clear_backends()
