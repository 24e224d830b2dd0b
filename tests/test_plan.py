"""What Python can ask the planners: cpu_plan() and cuda_plan() of the extension."""

import pytest

from dsconv_cuda import _loader

LAYER = {"input": [2, 24, 30, 31], "dw_weight": [48, 1, 3, 3], "c_out": 40, "stride": [2, 1], "padding": [1, 1, 1, 1]}
PIXELS = 2 * 15 * 31


@pytest.fixture
def library():
    return _loader.load_library().module


def test_the_cpu_forward_covers_every_pixel_and_follows_the_threads(library):
    one, four = (library.cpu_plan(**LAYER, threads=threads) for threads in (1, 4))
    for plan in (one, four):
        assert plan["pixels"] == PIXELS
        assert plan["tiles"] * plan["tile_pixels"] >= PIXELS
        assert plan["scratch_bytes"] <= 1 << 20
    assert four["tiles"] % 4 == 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_cpu_backward_does_not_know_the_threads(library, dtype, channels_last):
    plans = [
        library.cpu_plan(**LAYER, dtype=dtype, channels_last=channels_last, backward=True, threads=threads)
        for threads in (1, 2, 7)
    ]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0]["pointwise_groups"] >= 1


def test_the_cuda_planner_answers_without_a_gpu(library):
    forward = library.cuda_plan(**LAYER, multiprocessors=132)
    assert forward["unrolled_kernel"] == 3
    assert forward["pixel_tiles"] * forward["tile_pixels"] >= PIXELS
    assert forward["channel_tiles"] * forward["tile_channels"] >= 40
    assert forward["blocks"] == forward["pixel_tiles"] * forward["channel_tiles"]
    backward = library.cuda_plan(**LAYER, dtype="float16", backward=True, multiprocessors=132)
    # du in the dtype of the call is the least that the workspace holds.
    assert backward["workspace_bytes"] >= PIXELS * 48 * 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "int8"}, "dtype must be"),
        ({"input": [2, 24, 30]}, "4 sizes"),
        ({"stride": [0, 1]}, "must be positive"),
        ({"input": [2, 24, 0, 31]}, "larger than the padded input"),
        ({"dw_weight": [47, 1, 3, 3]}, "a positive multiple of input's"),
    ],
)
def test_a_question_without_an_answer_is_refused(library, change, text):
    for plan in (library.cpu_plan, library.cuda_plan):
        with pytest.raises(ValueError, match=text):
            plan(**{**LAYER, **change})
