"""bench.static and bench.traffic: what is read out of compiled kernels, and what the emulation counts of memory."""

import dataclasses
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_host.build import build_counter_cases

import dsconv_cuda
from bench import layers, roofline, sass, static, traffic, traffic_norm
from bench.problem import FORWARD, TRAINING, TRAINING_BN, Problem

BUILD_DIR = Path(__file__).resolve().parents[1] / ".cache" / "cuda_host"

LISTING = """
	code for sm_80
		Function : _Z5firstv
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
                                                                           /* 0x000fe40000000f00 */
        /*0010*/               @P0 LDG.E.128.CONSTANT R4, [R2.64] ;        /* 0x0000000402047981 */
        /*0020*/              @!P1 LDGSTS.E.BYPASS.128 [R8], [R2.64] ;     /* 0x0000000402047981 */
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;        /* 0x000000080804723c */
        /*0040*/                   HFMA2.MMA R9, -RZ, RZ, 0, 5.9e-08 ;     /* 0x00000001ff097435 */
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;           /* 0x0000000000007b1d */
        /*0060*/                   LDSM.16.M88.4 R4, [R5] ;                /* 0x000000000504783b */
        /*0070*/              @UP0 STL [R1], R4 ;                          /* 0x0000000401007387 */
        /*0080*/                   NOP ;                                   /* 0x0000000000007918 */
		Function : _Z6secondv
        /*0000*/                   LDG.E R4, [R2.64] ;                     /* 0x0000000402047981 */
        /*0010*/                   LDG.E R5, [R2.64] ;                     /* 0x0000000402047981 */
        /*0020*/                   FFMA R4, R4, R4, RZ ;                   /* 0x00000004040472fe */
        /*0030*/               @P0 BRA 0x10 ;                              /* 0xffffffd000000947 */
        /*0040*/                   FFMA R4, R4, R4, RZ ;                   /* 0x00000004040472fe */
        /*0050*/              @!P1 BRA 0x0 ;                               /* 0xffffffd000000947 */
        /*0060*/                   FFMA R4, R4, R4, RZ ;                   /* 0x00000004040472fe */
        /*0070*/              @!P1 BRA P2, 0x60 ;                          /* 0xffffffd000000947 */
        /*0080*/                   BRA 0x80;                               /* 0xfffffff000007947 */
"""

PTX = """
.visible .entry _Z5firstv(
	.param .u64 p
)
.maxntid 256, 1, 1
.minnctapersm 2
{
}
	// .globl	_Z6secondv
.visible .entry _Z6secondv()
{
}
"""


def test_instructions_are_counted():
    counts = sass.instruction_counts(LISTING)
    (first, _, product), (second, loops, none) = counts["sm_80", "_Z5firstv"], counts["sm_80", "_Z6secondv"]
    expected = {"HMMA": 1, "LDSM": 1, "LDGSTS": 1, "LDG.128": 1, "LDG": 1, "BAR": 1, "local": 1, "HFMA2": 0, "all": 8}
    assert {column: first[column] for column in expected} == expected
    assert (second["LDG"], second["LDG.128"], second["FFMA"], second["all"]) == (2, 0, 3, 9)
    # The inner loop and the loop of one line; not the outer one, not the jump to itself at the end.
    assert [(loop["FFMA"], loop["LDG"], loop["all"]) for loop in loops] == [(1, 1, 3), (1, 0, 2)]
    assert (product["HMMA"], product["all"], none["all"]) == (1, 1, 0)


def test_launch_bounds_are_read():
    assert sass.launch_bounds(PTX) == {"_Z5firstv": (256, 2), "_Z6secondv": (0, 0)}


def test_names_are_short():
    long = "void dsconv::forward_kernel<dsconv::Traits<dsconv::Half, (dsconv::Layout)1>, 3>(dsconv::Params, unsigned)"
    assert sass.short_name(long) == "forward_kernel<Traits<Half, (Layout)1>, 3>"


def test_a_tool_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sass, "nvcc", lambda: str(tmp_path / "nvcc"))
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sass.MissingTool, match=r"cuobjdump was not found: pip install nvidia-cuda-cuobjdump"):
        sass.cuobjdump.__wrapped__()


@pytest.mark.parametrize(
    ("architecture", "registers", "threads", "shared", "blocks"),
    [
        ("sm_80", 32, 256, 0, 8),  # threads
        ("sm_80", 33, 256, 0, 6),  # 40 registers a thread: 48 warps
        ("sm_80", 128, 256, 0, 2),
        ("sm_80", 168, 128, 0, 3),  # 12 warps
        ("sm_80", 32, 32, 0, 32),  # blocks
        ("sm_86", 32, 256, 0, 6),
        ("sm_80", 32, 256, 48 << 10, 3),  # 164 KiB over 49
        ("sm_90", 32, 256, 75 << 10, 3),
        ("sm_75", 32, 256, 32 << 10, 2),
        ("sm_120", 32, 256, 99 << 10, 1),
        ("sm_86", 32, 256, 100 << 10, 0),
    ],
)
def test_blocks_that_share_a_multiprocessor(architecture, registers, threads, shared, blocks):
    gpu = dsconv_cuda.gpus()[architecture]
    found = static.blocks_per_multiprocessor(gpu, registers=registers, threads=threads, shared=shared)
    assert found == blocks


KERNEL = sass.CompiledKernel(
    "_Z1k", "kernel<Half>", "k.cu", "sm_80", 64, 0, 0, 0, 256, 2, dict.fromkeys([*sass.INSTRUCTIONS, "all"], 0)
)


def test_rules():
    def broken(launched=None, **changes):
        counts = {**KERNEL.instructions, **changes.pop("instructions", {})}
        kernel = dataclasses.replace(KERNEL, **changes, instructions=counts)
        return static.broken_rules(static.rows_of([kernel], launched or {}), launched)

    assert broken() == []
    assert "8 bytes of spills" in broken(spills=8)[0]
    assert "1 accesses of local memory" in broken(instructions={"local": 1})[0]
    assert "1 blocks share a multiprocessor, 2 are asked for" in broken(registers=200)[0]
    assert "no tensor core instruction" in broken(name="forward_mma_kernel<Half>")[0]
    assert "HMMA without ldmatrix (0) or cp.async (3)" in broken(instructions={"HMMA": 8, "LDGSTS": 3})[0]
    assert broken(instructions={"HMMA": 8, "LDGSTS": 3, "LDSM": 4}) == []
    never = broken({("sm_80", "_Z2l"): traffic.LaunchSizes(256)})
    assert "no layer and no call of tests/cuda_host/driver_calls.h comes to it" in never[0]

    def launched(*launches):
        return broken({("sm_80", "_Z1k"): traffic.LaunchSizes(256, frozenset(launches))})

    # Of every launch what is planned for it; where nothing is, what is asked for.
    assert launched((1 << 10, 2), (100 << 10, 1)) == []
    (text,) = launched((1 << 10, 2), (100 << 10, 2))
    assert text == "kernel<Half> on sm_80: 1 blocks of 102400 bytes share a multiprocessor, 2 are planned"
    (text,) = launched((100 << 10, 0), (110 << 10, 0))
    assert text == "kernel<Half> on sm_80: 1 blocks share a multiprocessor, 2 are asked for"


def test_the_table_tells_every_kernel():
    sizes = traffic.LaunchSizes(256, frozenset({(1024, 4), (60 << 10, 2)}))
    rows = static.rows_of([KERNEL], {("sm_80", "_Z1k"): sizes})
    assert rows[0].blocks == (2, 4)
    columns = [column.strip() for column in static.table(rows).splitlines()[-1].split("|")]
    assert columns[1:11] == ["kernel<Half>", "256", "64", "0", "0", "1024-61440", "2-4", "2-4", "2", "25%-50%"]
    assert "1 of 1" in static.summary(rows)


def test_accesses_are_counted_as_by_hand():
    done = subprocess.run([build_counter_cases(BUILD_DIR)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "cases 21\n"


GPU = dsconv_cuda.gpus


@pytest.fixture(scope="module")
def tiny():
    """Every block of a layer whose rows fill sectors, in both layouts and modes."""
    (layer,) = layers.parse("tiny 1 32 16x16 3x3 1 1 64 identity")
    return {
        (layout, mode): traffic.count([Problem(layer, mode, torch.float16)], layout, GPU()["sm_90"], 1000)[0]
        for layout in traffic.LAYOUTS
        for mode in (FORWARD, TRAINING)
    }


def test_every_output_is_written_once(tiny):
    for (layout, mode), counted in tiny.items():
        written = {}
        for launch in counted.launches:
            for name, of in launch.tensors.items():
                written[name] = written.get(name, 0) + of.written
                assert of.of_blocks <= of.read + of.written
        assert written["y"] >= 2 * 64 * 256, (layout, mode)
        assert written["x"] == written["pw_weight"] == written["dw_weight"] == 0
        if mode == TRAINING:
            assert written["grad_x"] >= 2 * 32 * 256
            assert {"grad_dw_weight", "grad_pw_weight", "grad_dw_bias", "grad_pw_bias"} <= written.keys()


def test_nothing_can_be_below_the_least(tiny):
    for counted in tiny.values():
        assert counted.waves == 1
        assert counted.over_least_of_blocks >= 1
        assert counted.over_least >= counted.over_least_of_blocks
        assert counted.over_unfused < counted.over_least
        assert counted.wavefronts >= 1
    forward = tiny["nchw", FORWARD]
    assert forward.least == 2 * (32 * 256 + 64 * 256 + 32 * (9 + 64 + 1) + 64)
    assert forward.unfused == forward.least + 2 * 2 * 32 * 256
    assert forward.activations >= 1
    assert forward.weights > 0


def test_of_a_split_forward_the_product_is_assumed():
    """The depthwise kernel reads x about once and writes act(z) once; the product reads by tiles."""
    (layer,) = layers.parse("wide 8 1024 7x7 3x3 1 1 512 identity")
    problem = Problem(layer, FORWARD, torch.float16)
    for layout in traffic.LAYOUTS:
        counted = traffic.count([problem], layout, GPU()["sm_80"], 8)[0]
        assert counted.is_split
        assert counted.waves == 1
        depthwise, product = counted.launches[:2]
        pixels, z = 8 * 49, 2 * 8 * 49 * 1024
        assert z <= depthwise.tensors["x"].read <= 1.5 * z, layout
        assert z <= depthwise.tensors["act_z"].written <= 1.6 * z, layout
        assert product.name == traffic.PRODUCT
        rows = math.ceil(pixels / 128) if layout == "channels_last" else 8
        assert product.tensors["act_z"].read == 4 * z
        assert product.tensors["pw_weight"].read == rows * 2 * 1024 * 512
        assert product.tensors["y"].written == 2 * pixels * 512


def test_blocks_are_scaled_to_the_grid():
    (layer,) = layers.parse("tiny 4 32 32x32 3x3 1 1 64 identity")
    problem = Problem(layer, FORWARD, torch.float16)
    every, some = (traffic.count([problem], "nchw", GPU()["sm_90"], blocks)[0] for blocks in (1000, 4))
    assert every.launches[0].blocks == some.launches[0].blocks > 4
    assert math.isclose(some.over_least, every.over_least, rel_tol=0.05)


def test_traffic_is_told(capsys, monkeypatch):
    monkeypatch.setattr(layers, "LAYERS", layers.parse("tiny 1 32 16x16 3x3 1 1 64 identity"))
    traffic.main(["--layers", "tiny", "--batch", "2", "--blocks", "2", "--kernels", "--arch", "sm_86"])
    text = capsys.readouterr().out
    assert "float16, 2 images, planned for GeForce RTX 3090 (sm_86, 82 multiprocessors), 2 blocks" in text
    assert "tiny, training, channels_last" in text
    assert "training: sectors over least within the goal in" in text
    assert "grad_pw_weight" in text


@pytest.fixture(scope="module")
def step():
    """Every block of a step through BatchNorm, in both layouts."""
    (layer,) = layers.parse("tiny 2 32 16x16 3x3 1 1 64 relu6")
    problem = Problem(layer, TRAINING_BN, torch.float16)
    return {layout: traffic_norm.count([problem], layout, GPU()["sm_90"], 1000)[0] for layout in traffic.LAYOUTS}


def test_passes_of_training_through_batch_norm(step):
    """x is read for the statistics and for y, y is written, the norm behind it reads and writes it."""
    for layout, counted in step.items():
        assert counted.least == 2 + 2
        assert counted.goal == pytest.approx(1.3 * 4)
        x, y = 2 * 2 * 32 * 256, 2 * 2 * 64 * 256
        tensors = {phase: {} for phase in ("statistics", "forward", "norm", "backward")}
        for launch in counted.counted.launches:
            for name, of in launch.tensors.items():
                read, written = tensors[launch.phase].get(name, (0, 0))
                tensors[launch.phase][name] = read + of.read, written + of.written
        assert x <= tensors["statistics"]["x"][0] <= 1.3 * x, layout
        assert tensors["forward"]["y"] == (0, y)
        assert tensors["norm"]["y"] == (y, 0)
        assert tensors["norm"]["out"] == (0, y)
        assert tensors["backward"]["grad"] == (2 * y, 0)
        assert tensors["forward"]["y_parts"][0] > 0
        assert counted.passes("statistics", "forward", in_l2=True) <= counted.passes("statistics", "forward")


def test_traffic_of_the_norms_is_told(capsys, monkeypatch):
    monkeypatch.setattr(layers, "LAYERS", layers.parse("tiny 1 32 16x16 3x3 1 1 64 relu6"))
    traffic_norm.main(["--layers", "tiny", "--batch", "2", "--blocks", "2", "--kernels", "--arch", "sm_86"])
    text = capsys.readouterr().out
    assert "training through BatchNorm, in passes of z's size: float16, 2 images" in text
    assert "norm_box_kernel<Half, true" in text
    assert re.search(
        r"training forward, nchw: within 1\.3 x least in \d of 1, with the weights once a wave in \d", text
    )


def test_every_kernel_that_is_launched_is_known():
    launched = traffic.launches([GPU()["sm_86"]])
    assert all(sizes.threads % 32 == 0 and sizes.least_shared <= sizes.most_shared for sizes in launched.values())
    assert all(planned >= 0 for sizes in launched.values() for _, planned in sizes.launches)
    names = sass.demangle([symbol for _, symbol in launched])
    own = (
        "forward",
        "depthwise_forward_kernel",
        "depthwise_forward_tile",
        "outputs",
        "du",
        "pointwise_sum",
        "grad_x",
        "depthwise_sum",
        "sum_partials",
    )
    norms = ("box", "rows", "planes", "pixel", "merge", "parts", "fold", "vectors")
    for kind in (*own, *(f"norm_{norm}" for norm in norms)):
        assert any(name.startswith(kind) for name in names), kind


LOOP = dict.fromkeys([*sass.INSTRUCTIONS, "all"], 0)
PRODUCT = {**LOOP, "all": 40, "HMMA": 16, "HMMA.16816": 16, "LDSM": 6}
TAPS = {**LOOP, "all": 36, "FFMA": 12, "LDG": 15}


def test_inner_loops_are_told_by_their_multiply_adds():
    kernel = dataclasses.replace(KERNEL, loops=[LOOP, PRODUCT, {**TAPS, "FFMA": 2}, TAPS])
    found = roofline.inner_loops(kernel)
    assert found == roofline.Loops(PRODUCT, TAPS)
    # Unrolled between other loops, the product is none of them.
    kernel = dataclasses.replace(KERNEL, loops=[LOOP, {**TAPS, "FFMA": 2}, TAPS], tensor_stretch=PRODUCT)
    assert roofline.inner_loops(kernel) == found
    assert roofline.Loops.per_multiply_add(TAPS) * 32 == 3
    assert roofline.Loops.per_multiply_add(PRODUCT) * 16 * 2048 == 40
    with pytest.raises(ValueError, match="no loop with multiply-adds"):
        roofline.inner_loops(KERNEL)


def test_the_busiest_resource_decides(tiny):
    counted = tiny["channels_last", FORWARD]
    kernel = dataclasses.replace(KERNEL, loops=[PRODUCT, TAPS], instructions={**KERNEL.instructions, "HMMA": 16})
    gpu = GPU()["sm_90"]
    assert math.isclose(roofline.clock(gpu), 1.98e9, rel_tol=0.01)
    assert math.isclose(roofline.clock(GPU()["sm_80"]), 1.41e9, rel_tol=0.01)
    taps, product = roofline.multiply_adds(counted.problem)
    assert (taps, product) == (32 * 46 * 46, 32 * 64 * 256)
    predicted = roofline.predict(counted, gpu, kernel)
    assert predicted.total == roofline.LAUNCH + predicted.seconds[predicted.bound]
    assert math.isclose(predicted.seconds["tensor cores"], product / gpu.mma_f16)
    assert math.isclose(predicted.seconds["DRAM"], counted.problem.least_bytes / gpu.bandwidth)
    assert predicted.fused < predicted.unfused
    slow = roofline.predict(counted, dataclasses.replace(gpu, bandwidth=1e6), kernel)
    assert slow.bound == "DRAM"
    assert "| tiny" in roofline.times_table([predicted, slow])
    assert roofline.loops_table([kernel, kernel]).count("kernel<Half>") == 1
