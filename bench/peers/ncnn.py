"""ncnn. It packs 4, 8 or 16 channels together; "blocked" is that packing at both ends. Images go one by one: it has no
batch."""

import functools
import tempfile
from pathlib import Path

import torch

from . import BLOCKED, Call, require

PACKAGES = ("ncnn",)
MAGIC = 7767517  # the first line of a .param file
FLOAT32_TAG = b"\0\0\0\0"  # before each weight of a .bin file
CLIP = "9=3 -23310=2,0.0,6.0"
KEEP_PACKING = 1


def versions():
    import ncnn

    return {"ncnn": ncnn.__version__}


def prepare(arena, threads):
    import ncnn

    require(arena)
    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    net.opt.blob_allocator, net.opt.workspace_allocator = _pools()
    with tempfile.TemporaryDirectory() as folder:
        description, weights = Path(folder) / "pair.param", Path(folder) / "pair.bin"
        description.write_text(_description(arena))
        weights.write_bytes(_weights(arena))
        if net.load_param(str(description)) or net.load_model(str(weights)):
            raise RuntimeError("ncnn does not load the pair")
    channels = arena.problem.layer.channels
    packing = next(size for size in (_widest_packing(), 8, 4, 1) if channels % size == 0)
    images = [ncnn.convert_packing(ncnn.Mat(image.numpy()), packing) for image in arena.x.contiguous()]

    def run():
        results = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input("x", image)
            status, y = extractor.extract("y", KEEP_PACKING)
            if status:
                raise RuntimeError("ncnn does not compute the pair")
            results.append(y)
        return results

    def unpacked(results):
        return (torch.stack([torch.from_numpy(ncnn.convert_packing(y, 1).numpy().copy()) for y in results]),)

    return {BLOCKED: Call(run, unpacked)}


@functools.cache
def _pools():
    """ncnn's reuse of freed memory; a pool has to outlive every net and blob that took of it."""
    import ncnn

    return ncnn.PoolAllocator(), ncnn.PoolAllocator()


def _widest_packing():
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def _description(arena):
    problem, layer, state = arena.problem, arena.problem.layer, arena.state
    depthwise, pointwise = state["depthwise.weight"], state["pointwise.weight"]
    (kernel_h, kernel_w), (pad_h, pad_w) = layer.kernel, layer.padding
    middle, end = (CLIP if act == "relu6" else "" for act in (problem.activation, problem.out_activation))
    return (
        f"{MAGIC}\n3 3\n"
        "Input x 0 1 x\n"
        f"ConvolutionDepthWise dw 1 1 x a 0={depthwise.shape[0]} 1={kernel_w} 11={kernel_h} 2={layer.dilation} "
        f"3={layer.stride} 4={pad_w} 14={pad_h} 5=1 6={depthwise.numel()} 7={layer.channels} {middle}\n"
        f"Convolution pw 1 1 a y 0={layer.out_channels} 1=1 5=1 6={pointwise.numel()} {end}\n"
    )


def _weights(arena):
    return b"".join(
        (FLOAT32_TAG if name.endswith("weight") else b"") + values.numpy().tobytes()
        for name, values in arena.state.items()
    )
