"""What holds whatever the numbers are: random configurations, and properties that need no oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import check
from shapes import ACTIVATIONS, ALL, Case, identify

from dsconv_cuda import depthwise_separable_conv2d

pytestmark = pytest.mark.usefixtures("isa")

# Derandomised: a failure is the same in every run, and reproduced by its printed case.
RANDOM = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
LINEAR = [
    Case(stride=(2, 1), activation="identity"),
    Case(c=16, c_out=32, h=9, w=17, kernel=(5, 3), dilation=(1, 2), activation="identity"),
    Case(c=3, multiplier=3, kernel=(2, 4), padding="same", activation="identity"),
]


@st.composite
def cases(draw) -> Case:
    small = st.integers(1, 4)
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    same = draw(st.booleans()) and draw(st.booleans())
    stride = (1, 1) if same else draw(st.tuples(small, small))
    padding = "same" if same else draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    # Images that the dilated kernel fits into, up to a couple of tiles more.
    around = (0, 0) if same else padding
    least = [1 if same else max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, around, strict=True)]
    return Case(
        n=draw(st.integers(0, 3)),
        c=draw(st.integers(1, 40)),
        multiplier=draw(st.sampled_from((1, 1, 1, 2, 3))),
        c_out=draw(st.integers(1, 70)),
        h=least[0] + draw(st.integers(0, 12)),
        w=least[1] + draw(st.integers(0, 20)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        dw_bias=draw(st.booleans()),
        pw_bias=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        out_activation=draw(st.sampled_from(ACTIVATIONS)),
    )


@RANDOM
@given(
    case=cases(),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_configurations(case, dtype, channels_last, seed, device):
    torch.manual_seed(seed)
    check(case.tensors(dtype, device, channels_last), case.kwargs, backward=True)


@pytest.mark.parametrize("case", LINEAR, ids=identify)
def test_linear_in_the_input_and_in_each_weight(case, device):
    tensors, others = case.tensors(torch.float64, device), case.tensors(torch.float64, device)
    for i in range(3):
        x, w, v, *_ = tensors

        def op(t, i=i, fixed=(x, w, v)):
            return depthwise_separable_conv2d(*fixed[:i], t, *fixed[i + 1 :], **case.kwargs)

        torch.testing.assert_close(op(2 * tensors[i] - 3 * others[i]), 2 * op(tensors[i]) - 3 * op(others[i]))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", LINEAR, ids=identify)
def test_backward_is_the_adjoint(case, channels_last, device):
    """<f(x), g> = <x, f^T(g)>, in the input and in each weight."""
    tensors = [t.requires_grad_() for t in case.tensors(torch.float64, device, channels_last)[:3]]
    y = depthwise_separable_conv2d(*tensors, **case.kwargs)
    g = torch.randn_like(y)
    inner = (y * g).sum()
    for t, grad in zip(tensors, torch.autograd.grad(y, tensors, g), strict=True):
        torch.testing.assert_close((t * grad).sum(), inner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=identify)
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_do_not_depend_on_one_another(channels_last, dtype, device):
    """A batch gives the bits that its images give alone, forward and in the gradient of the input."""
    x, *weights = Case(n=5, c=17, c_out=33, h=9, w=10).tensors(dtype, device, channels_last)
    x.requires_grad_()
    y = depthwise_separable_conv2d(x, *weights, padding=1, activation="relu")
    dy = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, dy)
    for i in range(5):
        image = x[i : i + 1].detach().requires_grad_()
        alone = depthwise_separable_conv2d(image, *weights, padding=1, activation="relu")
        assert torch.equal(alone, y[i : i + 1])
        assert torch.equal(torch.autograd.grad(alone, image, dy[i : i + 1])[0], grad[i : i + 1])


def _every_result(case: Case, dtype, device, channels_last) -> list[torch.Tensor]:
    torch.manual_seed(1)
    tensors = case.tensors(dtype, device, channels_last, requires_grad=True)
    y = depthwise_separable_conv2d(*tensors, **case.kwargs)
    dy = torch.randn(y.shape).to(y.device, dtype)
    return [y, *torch.autograd.grad(y, [t for t in tensors if t is not None], dy)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=identify)
@pytest.mark.parametrize("case", [Case(n=7, c=32, c_out=48, h=15, w=17), *ALL[::11]], ids=identify)
def test_bits_do_not_depend_on_the_run_or_on_the_threads(case, dtype, channels_last, device):
    threads = torch.get_num_threads()
    expected = _every_result(case, dtype, device, channels_last)
    try:
        for count in (1, 2, 3, 7, threads):
            torch.set_num_threads(count)
            actual = _every_result(case, dtype, device, channels_last)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)
