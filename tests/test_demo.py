"""The demo from end to end on a few digits, and what makes its comparison fair."""

import pytest
import torch

from bench import demo
from bench.demo_report import largest_difference, running_means
from bench.digits import SIDE, load_digits
from bench.mnist_net import MnistNet
from bench.plain import PlainSeparableConvBN2d
from bench.saved import saved_bytes
from dsconv_cuda import DepthwiseSeparableConvBN2d

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_digits(per_class=20)


def test_the_split_is_stratified_and_the_same_every_time():
    digits = load_digits()
    assert (len(digits.train_labels), len(digits.test_labels)) == (4000, 1000)
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    again = load_digits()
    assert torch.equal(digits.train_images, again.train_images)
    assert torch.equal(digits.test_images, again.test_images)
    assert not torch.equal(load_digits(seed=1).test_images, digits.test_images)


def test_no_test_digit_is_trained_on():
    digits = load_digits()
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train for image in digits.test_images)


def test_batches_depend_on_the_seed_alone(digits):
    first, second, other = (list(digits.batches(32, seed)) for seed in (3, 3, 4))
    assert len(first) == len(digits.train_labels) // 32
    for (images, labels), (images_again, labels_again) in zip(first, second, strict=True):
        assert images.shape == (32, 1, SIDE, SIDE)
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)
    assert not torch.equal(first[0][0], other[0][0])


def test_a_shifted_image_is_a_digit_of_its_label(digits):
    """Every batch image is some training image of its label, moved by at most two pixels with background coming in."""
    images, labels = next(digits.batches(4, 0))
    padded = torch.nn.functional.pad(digits.train_images, [2] * 4, value=digits.background)
    for image, label in zip(images, labels, strict=True):
        candidates = padded[digits.train_labels == label, 0]
        windows = (candidates[:, r : r + SIDE, c : c + SIDE] for r in range(5) for c in range(5))
        assert any((window == image).flatten(1).all(1).any() for window in windows)


@pytest.mark.parametrize("activation", ["relu6", "relu", "silu"])
def test_the_networks_agree_at_the_start(digits, activation):
    *fused, plain, _ = demo.make_runs(CPU, 10, activation, "channels_last", seed=0)
    images, labels = next(digits.batches(64, 1))
    with torch.no_grad():
        losses = [run.loss(images, labels).item() for run in (*fused, plain)]
        exact = plain.network.double()(images.double())
        expected = torch.nn.functional.cross_entropy(exact, labels).item()
    own_error = abs(losses[-1] - expected)
    for loss in losses[:-1]:
        assert abs(loss - expected) <= 2 * own_error + 16 * torch.finfo(torch.float32).eps * expected


def test_state_dicts_are_interchangeable():
    torch.manual_seed(0)
    fused, plain = MnistNet(DepthwiseSeparableConvBN2d), MnistNet(PlainSeparableConvBN2d)
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    for name, value in fused.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    linear = torch.nn.Linear(4, 3)
    x = torch.randn(5, 4, requires_grad=True)
    assert saved_bytes(linear, lambda: linear(x)) == 5 * 4 * 4
    assert saved_bytes(linear, lambda: linear(x) + linear(x)) == 5 * 4 * 4
    # relu keeps its result, the second layer's input: one storage for both
    square = torch.nn.Linear(4, 4)
    assert saved_bytes(square, lambda: square(square(x).relu())) == 2 * 5 * 4 * 4


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_the_fused_networks_save_no_intermediate(digits, layout):
    """Of each block the plain network saves the input, the depthwise result, the same after BatchNorm, after ReLU6, the
    pointwise result, and the same after BatchNorm. The blocks save the input and the pointwise result, and in a chain
    the first input and the pointwise results."""
    images, labels = next(digits.batches(64, 1))
    chain, blocks, plain = (
        saved_bytes(run.network, lambda run=run: run.loss(images, labels))
        for run in demo.make_runs(CPU, 10, "relu6", layout, seed=0)[:3]
    )
    intermediates, inputs, vectors, side, channels = 0, 0, 0, SIDE, 24
    for out_channels, stride in ((48, 2), (96, 1), (96, 1), (192, 2), (192, 1)):
        inputs += 64 * side * side * channels * 4 if channels > 24 else 0
        side = -(-side // stride)
        intermediates += 64 * side * side * (3 * channels + out_channels) * 4
        vectors += 4 * 8 * (channels + out_channels)
        channels = out_channels
    assert abs(plain - blocks - intermediates) <= vectors
    assert abs(blocks - chain - inputs) <= vectors


def test_end_to_end(tmp_path, capsys):
    picture = tmp_path / "folder" / "curves.png"
    runs = demo.run_demo(
        epochs=1,
        batch_size=32,
        activation="relu6",
        layout="channels_last",
        output=picture,
        device=CPU,
        per_class=20,
    )
    text = capsys.readouterr().out
    for title in ("test accuracy", "seconds an epoch", "saved for backward a step", "largest difference"):
        assert f"| {title}" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    for run in runs:
        assert len(run.losses) == 160 // 32
        assert len(run.accuracies) == len(run.epoch_seconds) == 1
        assert all(0 < loss < 10 for loss in run.losses)
    chain, blocks, plain, yardstick = runs
    # Batches of 32 make BatchNorm enlarge rounding: as much between the layouts of stock modules.
    assert largest_difference(chain, plain) < 1e-2
    assert largest_difference(blocks, plain) < 1e-2
    assert largest_difference(yardstick, plain) < 1e-2


def test_arguments():
    arguments = demo.parse_arguments(["--epochs", "2", "--batch-size", "16", "--threads", "1", "--output", "a.png"])
    assert (arguments.epochs, arguments.batch_size, arguments.threads, str(arguments.output)) == (2, 16, 1, "a.png")


def test_running_means():
    assert running_means([1.0, 2.0, 6.0], 2) == [1.5, 4.0]
    assert running_means([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]


def test_the_learning_rate_rises_and_falls():
    shares = [demo.share_of_peak_rate(step, 100) for step in range(100)]
    assert shares[0] > 0
    assert shares[:20] == sorted(shares[:20])
    assert max(shares) == pytest.approx(1)
    assert shares[20:] == sorted(shares[20:], reverse=True)
    assert shares[-1] == pytest.approx(0)
