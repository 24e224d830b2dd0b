"""Wrong calls: each raises at once and says op, argument, what is expected and what was given; nothing is converted."""

import re

import pytest
import torch
from torch import nn

from dsconv_cuda import DepthwiseSeparableConv2d, depthwise_separable_conv2d
from dsconv_cuda.activations import ACTIVATIONS


def _arguments(**changes) -> dict:
    arguments = {
        "input": torch.zeros(2, 4, 8, 9),
        "dw_weight": torch.zeros(8, 1, 3, 3),
        "pw_weight": torch.zeros(6, 8, 1, 1),
        "dw_bias": torch.zeros(8),
        "pw_bias": torch.zeros(6),
    }
    return arguments | changes


def _every(dtype) -> dict:
    return {name: t.to(dtype) for name, t in _arguments().items()}


TENSORS = ("input", "dw_weight", "pw_weight", "dw_bias", "pw_bias")

WRONG = {
    # types
    "input a list": ({"input": [1.0]}, TypeError, "input must be a Tensor, got list"),
    "input an array": ({"input": torch.zeros(1, 4, 8, 9).numpy()}, TypeError, "input must be a Tensor, got ndarray"),
    "weight None": ({"dw_weight": None}, TypeError, "dw_weight must be a Tensor, got NoneType"),
    "bias a bool": ({"dw_bias": True}, TypeError, "dw_bias must be a Tensor or None, got bool"),
    "bias a number": ({"pw_bias": 0.0}, TypeError, "pw_bias must be a Tensor or None, got float"),
    "stride a float": ({"stride": 1.0}, TypeError, "stride must be an int or a pair of ints, got 1.0 (float)"),
    "stride a bool": ({"stride": True}, TypeError, "stride must be an int or a pair of ints, got True (bool)"),
    "stride None": ({"stride": None}, TypeError, "stride must be an int or a pair of ints, got None (NoneType)"),
    "dilation of floats": (
        {"dilation": (1, 2.5)},
        TypeError,
        "dilation must be an int or a pair of ints, got 2.5 (float)",
    ),
    "padding a float": ({"padding": 0.5}, TypeError, "padding must be an int or a pair of ints, got 0.5 (float)"),
    "activation a function": ({"activation": torch.relu}, TypeError, "activation must be a name (identity, relu, "),
    "activation a class": (
        {"activation": nn.ReLU},
        TypeError,
        "an instance of the matching torch.nn module, got <class",
    ),
    # dtypes and kinds
    "integers": (
        _every(torch.int32),
        TypeError,
        "input must be float64, float32, bfloat16 or float16, got torch.int32",
    ),
    "complex": (_every(torch.complex64), TypeError, "bfloat16 or float16, got torch.complex64"),
    "bools": (_every(torch.bool), TypeError, "bfloat16 or float16, got torch.bool"),
    "float8": (_every(torch.float8_e4m3fn), TypeError, "bfloat16 or float16, got torch.float8_e4m3fn"),
    "an integer weight": ({"pw_weight": torch.zeros(6, 8, dtype=torch.int64)}, TypeError, "pw_weight must be float64,"),
    "mixed dtypes": (
        {"dw_weight": torch.zeros(8, 1, 3, 3, dtype=torch.float64)},
        TypeError,
        "dw_weight must have the dtype of input, torch.float32, got torch.float64",
    ),
    "a bias of another dtype": ({"pw_bias": torch.zeros(6).half()}, TypeError, "pw_bias must have the dtype of input"),
    "sparse": (
        {"input": torch.zeros(2, 4, 8, 9).to_sparse()},
        TypeError,
        "input must be a dense tensor, got a torch.sparse_coo",
    ),
    "sparse weight": (
        {"pw_weight": torch.zeros(6, 8).to_sparse_csr()},
        TypeError,
        "pw_weight must be a dense tensor, got a",
    ),
    "mkldnn": (
        {"input": torch.zeros(2, 4, 8, 9).to_mkldnn()},
        TypeError,
        "input must be a dense tensor, got a torch._mkldnn",
    ),
    "nested": (
        {"input": torch.nested.nested_tensor([torch.zeros(4, 8, 9), torch.zeros(4, 7, 9)])},
        TypeError,
        "input must be a dense tensor, got a nested one",
    ),
    # devices
    "mixed devices": (
        {"pw_weight": torch.zeros(6, 8, 1, 1, device="meta")},
        RuntimeError,
        "pw_weight must be on the device of input, cpu, got meta",
    ),
    # shapes
    "input of rank 2": (
        {"input": torch.zeros(8, 9)},
        ValueError,
        "input must have shape [N, C, H, W] or [C, H, W], got 2",
    ),
    "input of rank 5": (
        {"input": torch.zeros(1, 2, 4, 8, 9)},
        ValueError,
        "or [C, H, W], got 5 dimensions: [1, 2, 4, 8, 9]",
    ),
    "no channels": (
        {"input": torch.zeros(2, 0, 8, 9)},
        ValueError,
        "input must have at least one channel, got shape [2, 0",
    ),
    "dw_weight of rank 3": (
        {"dw_weight": torch.zeros(8, 3, 3)},
        ValueError,
        "dw_weight must have shape [C * m, 1, kh, kw]",
    ),
    "dw_weight not depthwise": ({"dw_weight": torch.zeros(8, 4, 3, 3)}, ValueError, "got [8, 4, 3, 3]"),
    "channels that do not divide": (
        {"dw_weight": torch.zeros(6, 1, 3, 3)},
        ValueError,
        "dw_weight must have shape [C * m, 1, kh, kw] with C=4, the channels of input, and a whole m >= 1, "
        "got [6, 1, 3, 3]",
    ),
    "fewer filters than channels": ({"dw_weight": torch.zeros(2, 1, 3, 3)}, ValueError, "with C=4"),
    "no filters": ({"dw_weight": torch.zeros(0, 1, 3, 3)}, ValueError, "with C=4"),
    "an empty kernel": (
        {"dw_weight": torch.zeros(8, 1, 0, 3)},
        ValueError,
        "dw_weight must have a kernel of at least 1 x 1",
    ),
    "pw_weight 3x3": (
        {"pw_weight": torch.zeros(6, 8, 3, 3)},
        ValueError,
        "pw_weight must be 1x1, of shape [C_out, 8, 1, 1] or [C_out, 8], got [6, 8, 3, 3]",
    ),
    "pw_weight of rank 3": (
        {"pw_weight": torch.zeros(6, 8, 1)},
        ValueError,
        "pw_weight must be 1x1, of shape [C_out, 8, 1, 1]",
    ),
    "pw_weight of other channels": (
        {"pw_weight": torch.zeros(6, 4, 1, 1)},
        ValueError,
        "pw_weight must have 8 input channels",
    ),
    "no output channels": ({"pw_weight": torch.zeros(0, 8, 1, 1)}, ValueError, "at least one output channel"),
    "dw_bias of another size": ({"dw_bias": torch.zeros(4)}, ValueError, "dw_bias must have shape [8], got [4]"),
    "pw_bias of rank 2": ({"pw_bias": torch.zeros(6, 1)}, ValueError, "pw_bias must have shape [6], got [6, 1]"),
    "pw_bias a scalar": ({"pw_bias": torch.zeros(())}, ValueError, "pw_bias must have shape [6], got []"),
    # values
    "stride 0": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride negative": ({"stride": (1, -2)}, ValueError, "stride must be at least 1, got (1, -2)"),
    "stride of three": ({"stride": (1, 1, 1)}, ValueError, "stride must be an int or a pair of ints, got 3 numbers"),
    "stride of none": ({"stride": ()}, ValueError, "stride must be an int or a pair of ints, got 0 numbers"),
    "dilation 0": ({"dilation": (0, 1)}, ValueError, "dilation must be at least 1, got (0, 1)"),
    "padding negative": ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    "padding of four": (
        {"padding": (1, 1, 1, 1)},
        ValueError,
        "padding must be an int or a pair of ints, got 4 numbers",
    ),
    "padding unknown": (
        {"padding": "full"},
        ValueError,
        'padding must be an int or a pair of ints, "same" or "valid", got \'full\'',
    ),
    '"same" with a stride': (
        {"padding": "same", "stride": 2},
        ValueError,
        'padding "same" takes stride 1 only, as in PyTorch',
    ),
    "kernel too tall": (
        {"dw_weight": torch.zeros(8, 1, 11, 3), "padding": 1},
        ValueError,
        "the kernel is larger than the padded input along the height: "
        "dilation * (kernel - 1) + 1 = 11, input + padding = 8 + 2 = 10",
    ),
    "kernel too wide by dilation": (
        {"dilation": (1, 5)},
        ValueError,
        "along the width: dilation * (kernel - 1) + 1 = 11,",
    ),
    "an empty image": ({"input": torch.zeros(2, 4, 0, 9)}, ValueError, "larger than the padded input along the height"),
    "overflowing padding": ({"padding": 2**62}, ValueError, "overflow 64 bits"),
    "overflowing stride": ({"stride": 2**70}, ValueError, "overflow 64 bits"),
    "overflowing dilation": ({"dilation": 2**63}, ValueError, "larger than the padded input"),
    "an overflowing output": ({"padding": 2**40}, ValueError, "the sizes overflow 64 bits"),
    "an overflowing batch": (
        {"input": torch.zeros(1, 4, 8, 9).expand(2**54, 4, 8, 9)},
        ValueError,
        "the sizes overflow 64 bits",
    ),
    "activation unknown": (
        {"activation": "swish"},
        ValueError,
        f"activation must be one of {', '.join(ACTIVATIONS)} or None, got 'swish'",
    ),
    "out_activation unknown": ({"out_activation": "ReLU"}, ValueError, "out_activation must be one of identity, relu"),
    "a module without a counterpart": (
        {"activation": nn.Softplus()},
        ValueError,
        "activation has no counterpart in the kernels",
    ),
    "another slope": ({"activation": nn.LeakyReLU(0.2)}, ValueError, "LeakyReLU with negative_slope 0.01"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_call(name):
    changes, error, text = WRONG[name]
    with pytest.raises(error, match=re.escape(text)) as caught:
        depthwise_separable_conv2d(**_arguments(**changes))
    assert str(caught.value).startswith("depthwise_separable_conv2d: ")


@pytest.mark.parametrize("argument", TENSORS)
def test_quantized(argument):
    t = torch.quantize_per_tensor(_arguments()[argument], 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=rf"{argument} must be a dense tensor, got a quantized one"):
        depthwise_separable_conv2d(**_arguments(**{argument: t}))


def test_no_cuda_in_the_library():
    """What a build without CUDA says to CUDA tensors, told apart before any kernel is looked for."""
    from dsconv_cuda import _checks

    with pytest.raises(
        RuntimeError, match=r"input is on cuda:0, but the loaded library was built without CUDA kernels"
    ):
        _checks.raise_for_no_cuda("depthwise_separable_conv2d", torch.device("cuda:0"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_unsupported_device_kind():
    from dsconv_cuda import _checks

    class OnAnotherDevice:
        layout, dtype, is_nested, is_quantized = torch.strided, torch.float32, False, False
        device = torch.device("xpu:0")

    with pytest.raises(RuntimeError, match="input must be on a CPU or a CUDA device, got xpu:0"):
        _checks.check_operands("op", (OnAnotherDevice(), OnAnotherDevice(), OnAnotherDevice(), None, None))


def test_valid_spellings():
    """What PyTorch's convolution takes is taken: sequences of one, lists, numpy integers; None and "none"."""
    import numpy

    expected = depthwise_separable_conv2d(**_arguments(), stride=2, padding=1)
    for stride, padding in (
        ([2], (1,)),
        ([2, 2], [1, 1]),
        (torch.Size([2, 2]), (1, 1)),
        (numpy.int64(2), numpy.int32(1)),
    ):
        y = depthwise_separable_conv2d(
            **_arguments(), stride=stride, padding=padding, activation=None, out_activation="none"
        )
        assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Identity(), "identity"),
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.SiLU(), "silu"),
        (nn.Hardswish(), "hardswish"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
        (nn.Hardsigmoid(), "hardsigmoid"),
    ],
)
def test_activation_modules(module, name):
    arguments = {n: torch.randn_like(t) for n, t in _arguments().items()}
    by_module = depthwise_separable_conv2d(**arguments, activation=module, out_activation=module)
    assert torch.equal(by_module, depthwise_separable_conv2d(**arguments, activation=name, out_activation=name))


def test_a_subclass_of_an_activation_module_may_compute_anything():
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x - 1)

    with pytest.raises(ValueError, match="no counterpart"):
        depthwise_separable_conv2d(**_arguments(), activation=Shifted())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"padding_mode": "mirror"},
            "padding_mode must be one of",
        ),
        ({"channel_multiplier": 0}, "channel_multiplier must be at least 1, got 0"),
        ({"activation": "swish"}, "DepthwiseSeparableConv2d: activation must be one of"),
        ({"out_activation": nn.ELU()}, "DepthwiseSeparableConv2d: out_activation has no counterpart"),
        ({"padding": "same", "stride": 2}, "same"),
    ],
)
def test_wrong_module(arguments, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        DepthwiseSeparableConv2d(4, 8, 3, **arguments)
