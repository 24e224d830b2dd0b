"""Exports: the decompositions of the ops, ONNX and AOTInductor packages."""

import pytest
import torch
from shapes import Case
from torch import nn

import dsconv_cuda
from dsconv_cuda import DepthwiseSeparableConv2d, _loader, ops
from dsconv_cuda.activations import ACTIVATIONS, derivative_from_output

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


def _arguments(case: Case, device) -> tuple:
    _loader.load_library()
    padding = case.padding if len(case.padding) == 4 else (*case.padding, *case.padding)
    act, out_act = ACTIVATIONS[case.activation].number, ACTIVATIONS[case.out_activation].number
    return (*case.tensors(torch.float64, device), case.stride, padding, case.dilation, act, out_act)


CASES = [
    *(Case(out_activation=name, activation="silu") for name in ACTIVATIONS),
    *(Case(activation=name) for name in ACTIVATIONS),
    Case(multiplier=2, stride=(2, 1), dilation=(1, 2), dw_bias=False),
    Case(kernel=(2, 4), padding=(0, 1, 1, 2), pw_bias=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decompositions_compute_what_the_ops_compute(case, device):
    args = _arguments(case, device)
    table = dsconv_cuda.decomposition_table()
    fwd, fwd_with_pre, bwd = (getattr(torch.ops.dsconv_cuda, n).default for n in ("fwd", "fwd_with_pre", "bwd"))
    assert set(table) == {fwd, fwd_with_pre, bwd}
    torch.testing.assert_close(table[fwd](*args), fwd(*args))
    y, pre = fwd_with_pre(*args)
    torch.testing.assert_close(table[fwd_with_pre](*args), (y, pre))
    saved = None
    if case.out_activation != "identity":
        saved = y if derivative_from_output(args[-1]) else pre
    for mask in (31, ops.GRAD_X | ops.GRAD_PW_BIAS):
        arguments = (torch.randn_like(y), *args[:4], saved, *args[5:], mask)
        torch.testing.assert_close(table[bwd](*arguments), bwd(*arguments))


def _net(device="cpu"):
    layers = (
        DepthwiseSeparableConv2d(3, 8, 3, 2, 1, bias=True, activation="relu6", out_activation="hardswish"),
        DepthwiseSeparableConv2d(8, 4, (2, 4), padding="same", activation="silu"),
    )
    return nn.Sequential(*layers).to(device).eval()


def _targets(program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_without_the_ops(strict, device):
    """Batch and size stay dynamic, and what is left are convolutions."""
    net, x = _net(device), torch.randn(2, 3, 12, 14, device=device)
    sizes = {0: torch.export.Dim("n", max=64), 2: torch.export.Dim("h", min=8, max=99), 3: torch.export.Dim.AUTO}
    program = torch.export.export(net, (x,), dynamic_shapes=(sizes,), strict=strict)
    ours = [target for target in _targets(program) if target.startswith("dsconv_cuda")]
    assert sorted(ours) == ["dsconv_cuda.fwd.default", "dsconv_cuda.fwd_with_pre.default"]
    program = program.run_decompositions(dsconv_cuda.decomposition_table())
    assert not any("dsconv_cuda" in target for target in _targets(program))
    assert sum("conv2d" in target or "convolution" in target for target in _targets(program)) == 4
    for other in (x, torch.randn(5, 3, 31, 16, device=device)):
        torch.testing.assert_close(program.module()(other), net(other), rtol=1e-4, atol=1e-5)


def test_onnx(tmp_path):
    """torch.onnx.export(dynamo=True) of a module needs no table; two Conv nodes for each op."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    net, x = _net(), torch.randn(2, 3, 12, 14)
    path = tmp_path / "net.onnx"
    sizes = {0: torch.export.Dim("n", max=64)}
    torch.onnx.export(net, (x,), path, dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("Conv") == 4
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for other in (x, torch.randn(5, 3, 12, 14)):
        (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), net(other), rtol=1e-4, atol=1e-5)


def test_aot_inductor_package(tmp_path, device):
    """The package keeps the op and runs it from Python."""
    net = DepthwiseSeparableConv2d(3, 8, 3, 2, 1, bias=True, activation="relu6").to(device).eval()
    x = torch.randn(2, 3, 12, 14, device=device)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "net.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # the test's time is the compiler's
        )
        compiled = torch._inductor.aoti_load_package(package)
        for other in (x, torch.randn(5, 3, 12, 14, device=device)):
            torch.testing.assert_close(compiled(other), net(other))
