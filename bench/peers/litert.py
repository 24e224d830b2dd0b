"""LiteRT, which runs the pair through XNNPACK, in its only layout, NHWC.

A model file has the paddings SAME and VALID only. Where ours is neither, a PAD stands before the convolution, and
XNNPACK takes it into the convolution.
"""

import torch

from . import Call, require

PACKAGES = ("ai_edge_litert", "flatbuffers")
VERSION_OF_SCHEMA = 3


def versions():
    from importlib.metadata import version

    return {"ai-edge-litert": version("ai-edge-litert")}


def prepare(arena, threads):
    from ai_edge_litert.interpreter import Interpreter

    require(arena)
    interpreter = Interpreter(model_content=_model(arena), num_threads=threads)
    interpreter.allocate_tensors()
    interpreter.set_tensor(
        interpreter.get_input_details()[0]["index"], arena.x.permute(0, 2, 3, 1).contiguous().numpy()
    )
    output = interpreter.get_output_details()[0]["index"]
    return {
        "channels_last": Call(
            interpreter.invoke,
            lambda _: (torch.from_numpy(interpreter.get_tensor(output)).permute(0, 3, 1, 2),),
        )
    }


class _Builder:
    """The lists of a model: buffers, tensors and operators refer to one another by index."""

    def __init__(self):
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.model, self.graph = schema.ModelT(), schema.SubGraphT()
        self.model.version = VERSION_OF_SCHEMA
        self.model.subgraphs, self.model.operatorCodes = [self.graph], []
        self.model.buffers = [schema.BufferT()]  # the first one is empty: for what is computed
        self.graph.tensors, self.graph.operators = [], []

    def tensor(self, shape, values=None, kind="FLOAT32"):
        tensor = self.schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = list(shape), getattr(self.schema.TensorType, kind), 0
        tensor.name = f"t{len(self.graph.tensors)}"
        if values is not None:
            buffer = self.schema.BufferT()
            buffer.data = values.contiguous().numpy().view("uint8").reshape(-1)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def constant(self, values, kind="FLOAT32"):
        return self.tensor(values.shape, values, kind)

    def operator(self, name, inputs, output, options_name, **options):
        code = self.schema.OperatorCodeT()
        code.builtinCode = getattr(self.schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version = code.builtinCode, 1
        operator = self.schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = len(self.model.operatorCodes), inputs, [output]
        operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, options_name)
        operator.builtinOptions = getattr(self.schema, f"{options_name}T")()
        for key, value in options.items():
            setattr(operator.builtinOptions, key, value)
        self.model.operatorCodes.append(code)
        self.graph.operators.append(operator)

    def file(self, first, last):
        import flatbuffers

        self.graph.inputs, self.graph.outputs = [first], [last]
        builder = flatbuffers.Builder()
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _model(arena):
    problem, layer, state = arena.problem, arena.problem.layer, arena.state
    build = _Builder()
    padding, activations = build.schema.Padding, build.schema.ActivationFunctionType
    activation = {"identity": activations.NONE, "relu6": activations.RELU6}
    (pad_h, pad_w), (height_out, width_out) = layer.padding, layer.out_size
    middle_channels = state["depthwise.bias"].numel()

    first = x = build.tensor((layer.batch, layer.height, layer.width, layer.channels))
    same = layer.stride == 1 and all(size % 2 for size in layer.kernel)
    if not same and (pad_h or pad_w):
        pads = build.constant(torch.tensor([[0, 0], [pad_h] * 2, [pad_w] * 2, [0, 0]], dtype=torch.int32), "INT32")
        x = build.tensor((layer.batch, layer.height + 2 * pad_h, layer.width + 2 * pad_w, layer.channels))
        build.operator("PAD", [first, pads], x, "PadOptions")
    z = build.tensor((layer.batch, height_out, width_out, middle_channels))
    build.operator(
        "DEPTHWISE_CONV_2D",
        [x, build.constant(state["depthwise.weight"].permute(1, 2, 3, 0)), build.constant(state["depthwise.bias"])],
        z,
        "DepthwiseConv2DOptions",
        padding=padding.SAME if same else padding.VALID,
        strideH=layer.stride,
        strideW=layer.stride,
        dilationHFactor=layer.dilation,
        dilationWFactor=layer.dilation,
        depthMultiplier=middle_channels // layer.channels,
        fusedActivationFunction=activation[problem.activation],
    )
    y = build.tensor((layer.batch, height_out, width_out, layer.out_channels))
    build.operator(
        "CONV_2D",
        [z, build.constant(state["pointwise.weight"].permute(0, 2, 3, 1)), build.constant(state["pointwise.bias"])],
        y,
        "Conv2DOptions",
        padding=padding.VALID,
        strideH=1,
        strideW=1,
        dilationHFactor=1,
        dilationWFactor=1,
        fusedActivationFunction=activation[problem.out_activation],
    )
    return build.file(first, y)
