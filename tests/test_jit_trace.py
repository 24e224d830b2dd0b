"""torch.jit.trace: graphs hold the ops themselves, so that they pass PyTorch's check, differentiate, and load again."""

import copy
import io

import pytest
import torch
from torch import nn

import dsconv_cuda

pytestmark = [
    pytest.mark.usefixtures("isa"),
    pytest.mark.one_isa,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def _stack() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 10, 1, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
    )


MODELS = {
    "bare": lambda: dsconv_cuda.DepthwiseSeparableConv2d(6, 10, 3, padding=1, activation="silu", out_activation="silu"),
    "block": lambda: dsconv_cuda.DepthwiseSeparableConvBN2d(6, 10, 3, padding=1, activation="relu6"),
    "fused": lambda: dsconv_cuda.fuse(_stack()),
}


def _gradients(model: nn.Module, x: torch.Tensor) -> list:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", MODELS)
def test_traces_compute_what_the_model_does(kind, train, device):
    for _ in range(2):  # the second model of a process too
        model = MODELS[kind]().to(device).train(train)
        x = torch.randn(2, 6, 9, 8, device=device)
        traced = torch.jit.trace(model, x)
        original = copy.deepcopy(model)
        # Numbers are constants in a trace: the batch's variance without bias is that of the size traced.
        size = x.shape if train else (3, 6, 11, 7)
        other = torch.randn(size, device=device, requires_grad=True)
        for ours, theirs in zip(_gradients(traced, other), _gradients(original, other), strict=True):
            torch.testing.assert_close(ours, theirs)
        for name, buffer in original.named_buffers():
            if not name.endswith("num_batches_tracked"):  # counted in Python, of which no trace is left
                torch.testing.assert_close(traced.get_buffer(name), buffer)


def test_no_python_is_left_in_a_trace(device):
    model = MODELS["fused"]().to(device).train()
    nodes = {
        node.kind() for node in torch.jit.trace(model, torch.randn(2, 6, 9, 8, device=device)).inlined_graph.nodes()
    }
    assert "dsconv_cuda::norm_block" in nodes
    assert "prim::PythonOp" not in nodes


def test_saved_and_loaded(device):
    model = MODELS["fused"]().to(device).eval()
    x = torch.randn(2, 6, 9, 8, device=device)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(file, map_location=device)(x), model(x))
