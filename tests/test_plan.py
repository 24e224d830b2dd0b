"""What Python can ask the planners: dsconv_cuda.plan(), and cpu_plan() and cuda_plan() of the extension."""

import dataclasses
import functools

import pytest
import torch

import dsconv_cuda
from dsconv_cuda import _loader, planning

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


CALL = ((2, 24, 30, 31), 40, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
def test_a_plan_for_every_gpu_of_the_table(backward, dtype):
    assert {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"} == set(dsconv_cuda.gpus())
    for architecture, gpu in dsconv_cuda.gpus().items():
        plan = dsconv_cuda.plan(*CALL, padding=1, dtype=dtype, backward=backward, arch=architecture)
        assert plan.gpu == gpu
        assert [alternative.chosen for alternative in plan.alternatives].count(True) == 1
        for kernel in plan.kernels:
            assert 1 <= kernel.blocks_per_multiprocessor <= gpu.blocks_per_multiprocessor, kernel
            assert kernel.shared_bytes <= gpu.shared_per_block
            assert kernel.threads <= 1024
            waves = kernel.blocks / (kernel.blocks_per_multiprocessor * gpu.multiprocessors)
            assert kernel.waves == pytest.approx(waves)
            assert kernel.seconds > max(kernel.dram_seconds, kernel.l2_seconds, kernel.arithmetic_seconds)


def test_the_plan_is_the_one_that_is_predicted_to_be_fastest():
    for shape, c_out in (((128, 64, 56, 56), 128), ((128, 144, 56, 56), 24), ((1, 1024, 7, 7), 1024)):
        plan = dsconv_cuda.plan(shape, c_out, 3, padding=1, arch="sm_90")
        assert plan.seconds == min(alternative.seconds for alternative in plan.alternatives if alternative.ours)
        # x, both weights and y, once each
        pixels = shape[0] * shape[2] * shape[3]
        assert plan.chosen.dram_bytes == 4 * ((shape[1] + c_out) * pixels + shape[1] * (9 + c_out))
        unfused = next(alternative for alternative in plan.alternatives if not alternative.ours)
        assert unfused.dram_bytes == plan.chosen.dram_bytes + 4 * 2 * shape[1] * pixels


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_wide_layers_of_few_pixels_are_split(memory_format, arch):
    plan = functools.partial(dsconv_cuda.plan, padding=1, memory_format=memory_format, arch=arch)
    for shape, c_out in (((32, 1024, 7, 7), 1024), ((32, 1536, 10, 10), 2048)):
        found = plan(shape, c_out, 3, dtype=torch.float16)
        assert found.chosen.name == "split, 32 images at a time"
        assert [kernel.name for kernel in found.kernels] == ["depthwise", "pointwise, the library's"]
        assert found.seconds == min(alternative.seconds for alternative in found.alternatives if alternative.ours)
        # The workspace is act(z), channels of pixels at multiples of 16 bytes.
        pixels = shape[2] * shape[3]
        plane = pixels if memory_format == torch.channels_last else -(-pixels // 8) * 8
        assert found.chosen.workspace_bytes == 2 * shape[0] * shape[1] * plane
        assert all(kernel.launches == 1 for kernel in found.kernels)
        single = plan(shape, c_out, 3, dtype=torch.float32)
        assert not any("split" in alternative.name for alternative in single.alternatives)
    narrow = plan((32, 64, 56, 56), 128, 3, dtype=torch.float16)
    assert "split" not in narrow.chosen.name
    assert any("split" in alternative.name for alternative in narrow.alternatives)


def test_a_split_goes_by_groups_of_images_that_l2_holds():
    gpu = dataclasses.replace(dsconv_cuda.gpus()["sm_90"], bandwidth=5e11)
    plan = dsconv_cuda.plan((64, 728, 19, 19), 728, 3, padding=1, dtype=torch.float16, arch=gpu)
    (split,) = (alternative for alternative in plan.alternatives if "split" in alternative.name)
    assert split.name == "split, 32 images at a time"
    assert split.workspace_bytes < gpu.l2_bytes / 2 < 2 * split.workspace_bytes
    assert {kernel.launches for kernel in split.kernels} == {2}
    assert " in 2 " in str(plan)


def test_what_bounds_a_kernel():
    def bound(gpu, shape=(128, 144, 56, 56), c_out=24):
        return dsconv_cuda.plan(shape, c_out, 3, padding=1, arch=gpu).kernels[0].bound

    gpu = dsconv_cuda.gpus()["sm_90"]
    assert bound(dataclasses.replace(gpu, bandwidth=1e10)) == "DRAM"
    assert bound(dataclasses.replace(gpu, l2_bandwidth=1e10)) == "L2"
    assert bound(dataclasses.replace(gpu, fma_f32=1e10)) == "arithmetic"
    assert bound(gpu, (1, 8, 4, 4), 8) == "launch"


@pytest.mark.parametrize("arch", ["sm_90", "cpu"])
def test_a_volume_has_a_plan(arch):
    call = ([8, 54, 16, 56, 56], 24, 3, 1, 1)
    plan = dsconv_cuda.plan(*call, dtype=torch.float16, memory_format=torch.channels_last_3d, arch=arch)
    assert "forward of [8, 54, 16, 56, 56] float16 channels_last, 3x3x3, padding (1, 1, 1, 1, 1, 1)" in str(plan)
    if arch != "cpu":
        flat = dsconv_cuda.plan([128, 54, 56, 56], *call[1:], dtype=torch.float16,
                                memory_format=torch.channels_last, arch=arch)  # fmt: skip
        assert plan.chosen.dram_bytes - flat.chosen.dram_bytes == 2 * 54 * 18  # taps
        assert plan.chosen.kernels[0].l2_bytes > 2 * flat.chosen.kernels[0].l2_bytes  # x, a plane a tap of the depth
    with pytest.raises(ValueError, match=r"memory_format must be contiguous_format or torch\.channels_last_3d"):
        dsconv_cuda.plan(*call, memory_format=torch.channels_last, arch=arch)


def test_a_backward_without_activation_needs_no_z():
    plain, bent = (
        dsconv_cuda.plan(*CALL, activation=name, backward=True, arch="sm_80") for name in ("identity", "relu6")
    )
    assert [kernel.name for kernel in plain.kernels] == [kernel.name for kernel in bent.kernels]
    assert plain.kernels[0].name == bent.kernels[0].name == "du"
    assert plain.kernels[0].dram_bytes < bent.kernels[0].dram_bytes
    assert plain.chosen.workspace_bytes > 0


def test_columns_that_are_adjacent_have_both_depthwise_gradients_from_one_kernel():
    plan = functools.partial(
        dsconv_cuda.plan, [32, 144, 56, 56], 24, 3, padding=1, dtype=torch.float16, backward=True, arch="sm_90"
    )
    found = {kernel.name: kernel for kernel in plan().kernels}
    assert not {"grad_x", "depthwise_sum"} & set(found)
    tensor = 2 * 32 * 144 * 56 * 56
    assert 3 * tensor < found["depthwise_planes"].dram_bytes < 3.1 * tensor  # x, du, grad_x


def test_channels_that_are_adjacent_have_both_depthwise_gradients_of_3x3_from_one_kernel():
    def plan(kernel):
        return dsconv_cuda.plan(
            [32, 144, 56, 56],
            24,
            kernel,
            padding=kernel // 2,
            dtype=torch.float16,
            memory_format=torch.channels_last,
            backward=True,
            arch="sm_90",
        )

    found = {kernel.name: kernel for kernel in plan(3).kernels}
    assert not {"depthwise_planes", "grad_x_tile", "depthwise_sum_tile"} & set(found)
    tensor = 2 * 32 * 144 * 56 * 56
    assert 3 * tensor < found["depthwise_tile"].dram_bytes < 3.1 * tensor  # x, du, grad_x
    two = {kernel.name for kernel in plan(5).kernels}
    assert {"grad_x_tile", "depthwise_sum_tile"} < two
    assert not {"depthwise_planes", "depthwise_tile"} & two


def test_plans_can_be_read():
    text = str(dsconv_cuda.plan(*CALL, stride=2, padding=1, dtype=torch.float16, arch="sm_90"))
    assert "forward of [2, 24, 30, 31] float16 NCHW, 3x3, stride (2, 2), padding (1, 1, 1, 1), 24 -> 40" in text
    assert "on H100 SXM 80 GB (sm_90, 132 multiprocessors)" in text
    assert text.count("\n->") == 1
    assert "= unfused" in text
    backward = dsconv_cuda.plan(
        *CALL, backward=True, channel_multiplier=2, memory_format=torch.channels_last, arch="sm_86"
    )
    assert "float32 channels_last, 3x3, 48 -> 40 channels" in str(backward)
    assert "workspace" in str(backward)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the default is the GPU")
def test_without_a_gpu_the_plan_is_that_of_the_cpu(library):
    plan = dsconv_cuda.plan(*CALL, padding=1)
    assert plan.numbers == library.cpu_plan([2, 24, 30, 31], [24, 1, 3, 3], 40, padding=[1] * 4, threads=plan.threads)
    assert f"on the CPU, {library.isa_active()} kernels" in str(plan)
    with pytest.raises(RuntimeError, match="this machine has no GPU; name an architecture"):
        dsconv_cuda.plan(*CALL, arch="cuda:0")


def test_a_gpu_that_is_no_entry_of_the_table_has_the_rates_of_its_kin():
    known = list(dsconv_cuda.gpus().values())
    pcie = planning.scaled(known, 90, 66, "half an H100")
    assert (pcie.multiprocessors, pcie.bandwidth) == (66, dsconv_cuda.gpus()["sm_90"].bandwidth / 2)
    assert planning.scaled(known, 87, 16, "Orin").shared_per_block == dsconv_cuda.gpus()["sm_86"].shared_per_block
    assert planning.scaled(known, 70, 80, "V100").l2_bytes == dsconv_cuda.gpus()["sm_75"].l2_bytes
    # As the op takes them.
    assert dsconv_cuda.plan(*CALL, arch=pcie).gpu is pcie


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"arch": "sm_42"}, "arch must be a Gpu, a CUDA device, cpu or one of sm_75, sm_80"),
        ({"input_size": (24, 30, 31)}, r"input_size must be \[N, C, H, W\]"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"memory_format": torch.preserve_format}, "memory_format must be"),
        ({"kernel_size": 50}, "kernel larger than the padded input"),
        ({"padding": "same", "stride": 2}, "takes stride 1 only"),
    ],
)
def test_a_plan_for_what_the_op_refuses_is_refused(arguments, text):
    call = {"input_size": CALL[0], "out_channels": CALL[1], "kernel_size": CALL[2], "arch": "sm_90", **arguments}
    with pytest.raises(ValueError, match=text):
        dsconv_cuda.plan(**call)
