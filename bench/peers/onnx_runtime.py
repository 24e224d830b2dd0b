"""ONNX Runtime, CPU provider. The input and the output are bound to memory of ours.

It computes in blocks of channels and reorders at a graph's ends. "nchw" is the graph as one writes it; for "blocked"
the graph that it optimised is taken without these reorders, so that blocks go in and come out.
"""

import tempfile
from pathlib import Path

import torch

from . import BLOCKED, Call, from_blocks, require, to_blocks

PACKAGES = ("onnxruntime", "onnx")
QUIET = 3  # errors only


def versions():
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__}


def prepare(arena, threads):
    import onnx
    import onnxruntime

    require(arena)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        options = _options(threads)
        options.optimized_model_filepath = str(file)
        session = onnxruntime.InferenceSession(_model(arena).SerializeToString(), options, ["CPUExecutionProvider"])
        optimized = onnx.load(str(file))
    y_shape = arena.dy.shape
    calls = {"nchw": _bound(session, arena.x.contiguous(), y_shape, lambda y: y)}
    x, block_out = _without_reorders(optimized, arena)
    if x is not None:
        session = onnxruntime.InferenceSession(
            optimized.SerializeToString(), _options(threads), ["CPUExecutionProvider"]
        )
        channels = y_shape[1]
        padded = (y_shape[0], -(-channels // block_out) * block_out, *y_shape[2:])
        calls[BLOCKED] = _bound(session, x, padded, lambda y: from_blocks(y, block_out, channels))
    return calls


def _options(threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = QUIET
    return options


def _model(arena):
    from onnx import TensorProto, helper, numpy_helper

    layer, problem = arena.problem.layer, arena.problem
    constants = {name: values.numpy() for name, values in arena.state.items()}
    constants["low"], constants["high"] = torch.tensor(0.0).numpy(), torch.tensor(6.0).numpy()
    nodes = [
        helper.make_node(
            "Conv",
            ["x", "depthwise.weight", "depthwise.bias"],
            ["z"],
            group=layer.channels,
            pads=[*layer.padding, *layer.padding],
            strides=[layer.stride] * 2,
            dilations=[layer.dilation] * 2,
        )
    ]
    middle = "z"
    if problem.activation == "relu6":
        nodes.append(helper.make_node("Clip", ["z", "low", "high"], ["a"]))
        middle = "a"
    last = "y" if problem.out_activation == "identity" else "w"
    nodes.append(helper.make_node("Conv", [middle, "pointwise.weight", "pointwise.bias"], [last]))
    if problem.out_activation == "relu6":
        nodes.append(helper.make_node("Clip", ["w", "low", "high"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(arena.x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(arena.dy.shape))],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _without_reorders(model, arena):
    """Takes them off the ends of the graph, in place; returns (the input in blocks, the block), None where they are
    not at the ends."""
    from onnx import TensorProto, helper

    graph = model.graph
    first, last = graph.node[0], graph.node[-1]
    if first.op_type != "ReorderInput" or last.op_type != "ReorderOutput":
        return None, None
    if sum(node.op_type.startswith("Reorder") for node in graph.node) != 2:
        return None, None
    weight = next(node for node in graph.node if node.op_type == "Conv" and node.output[0] == last.input[0]).input[1]
    padded_out = next(constant.dims[0] for constant in graph.initializer if constant.name == weight)
    # The block is that of the machine's vectors; the pointwise weight is padded to it.
    block = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    if padded_out % block:
        return None, None
    x = to_blocks(arena.x, block)
    x_name, y_name = first.output[0], last.input[0]
    y_shape = [arena.dy.shape[0], padded_out, *arena.dy.shape[2:]]
    graph.node.remove(first)
    graph.node.remove(last)
    del graph.input[:], graph.output[:], graph.value_info[:]
    graph.input.append(helper.make_tensor_value_info(x_name, TensorProto.FLOAT, list(x.shape)))
    graph.output.append(helper.make_tensor_value_info(y_name, TensorProto.FLOAT, y_shape))
    return x, block


def _bound(session, x, y_shape, view):
    y = torch.empty(y_shape)
    binding = session.io_binding()
    for bind, name, tensor in (
        (binding.bind_input, session.get_inputs()[0].name, x),
        (binding.bind_output, session.get_outputs()[0].name, y),
    ):
        bind(name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr())

    def run():
        session.run_with_iobinding(binding)
        return x, y  # x is held, the binding knows its address only

    return Call(run, lambda tensors: (view(tensors[1]),))
