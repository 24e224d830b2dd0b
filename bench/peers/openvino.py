"""OpenVINO, CPU plugin, with tensors of ours as NCHW and as NHWC; it chooses its inner layouts itself."""

import torch

from . import Call, require

PACKAGES = ("openvino",)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def versions():
    import openvino

    return {"openvino": openvino.__version__.split("-")[0]}


def prepare(arena, threads):
    require(arena, dtypes=(torch.float32, torch.bfloat16))
    return {layout: _call(arena, threads, layout) for layout in LAYOUTS}


def _call(arena, threads, layout):
    import openvino

    bf16 = arena.problem.dtype == torch.bfloat16
    compiled = openvino.Core().compile_model(
        _model(arena, layout),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "ENABLE_CPU_PINNING": False,  # the system places everybody's threads
        },
    )
    x = arena.x.contiguous(memory_format=LAYOUTS[layout])
    y = torch.empty_like(arena.dy, memory_format=LAYOUTS[layout])
    request = compiled.create_infer_request()
    request.set_input_tensor(_shared(x, layout))
    request.set_output_tensor(_shared(y, layout))

    def run():
        request.start_async()
        request.wait()
        return x, y

    return Call(run, lambda tensors: (tensors[1],))


def _shared(tensor, layout):
    """A tensor of OpenVINO on the same memory."""
    import openvino

    in_memory = tensor.permute(0, 2, 3, 1) if layout == "channels_last" else tensor
    if tensor.dtype == torch.bfloat16:
        array = in_memory.view(torch.int16).numpy()
        return openvino.Tensor(array, openvino.Shape(array.shape), openvino.Type.bf16)
    return openvino.Tensor(in_memory.numpy(), shared_memory=True)


def _model(arena, layout):
    import openvino
    from openvino import opset13 as ops
    from openvino.preprocess import PrePostProcessor

    problem, layer, state = arena.problem, arena.problem.layer, arena.state
    element = openvino.Type.bf16 if problem.dtype == torch.bfloat16 else openvino.Type.f32

    def constant(values):
        node = ops.constant(values.float().numpy())
        return ops.convert(node, "bf16") if problem.dtype == torch.bfloat16 else node

    def biased(node, values, activation):
        node = ops.add(node, constant(values.reshape(1, -1, 1, 1)))
        return ops.clamp(node, 0.0, 6.0) if activation == "relu6" else node

    parameter = ops.parameter(list(arena.x.shape), element, name="x")
    filters = state["depthwise.weight"].unflatten(0, (layer.channels, -1))
    depthwise = ops.group_convolution(
        parameter, constant(filters), [layer.stride] * 2, [*layer.padding], [*layer.padding], [layer.dilation] * 2
    )
    middle = biased(depthwise, state["depthwise.bias"], problem.activation)
    pointwise = ops.convolution(middle, constant(state["pointwise.weight"]), [1, 1], [0, 0], [0, 0], [1, 1])
    y = biased(pointwise, state["pointwise.bias"], problem.out_activation)
    model = openvino.Model([y], [parameter], "pair")
    if layout == "channels_last":
        converter = PrePostProcessor(model)
        for end in (converter.input(), converter.output()):
            end.tensor().set_layout(openvino.Layout("NHWC"))
            end.model().set_layout(openvino.Layout("NCHW"))
        model = converter.build()
    return model
