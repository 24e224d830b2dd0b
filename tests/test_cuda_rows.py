"""Rows of nchw in shared memory that the depthwise stage of the CUDA kernels reads some columns at a time
(csrc/cuda/box_sums.cuh): pairs of strips at stride 2 by fours, strips along a row by the four columns that four taps
add; around where the fours begin and end, and with paddings and widths for which they are not taken."""

import pytest
import torch
from oracle import check_case
from shapes import Case, identify

pytestmark = [
    pytest.mark.usefixtures("isa"),
    pytest.mark.skipif("config.getoption('--backend') == 'cpu'", reason="CUDA"),
]

SMOOTH = {"activation": "silu"}  # no kink that a gradient of 16 bits could meet on the other side
AT_STRIDE_2 = [
    Case(n=n, c=c, c_out=9, h=h, w=w, kernel=(k, k), stride=(2, 2), padding=(p, p), **SMOOTH)
    for n, c, h, w, k, p in (
        *((1, 33, 27, w, 3, 1) for w in (16, 24, 32, 48, 56, 64, 112)),
        *((2, 5, 20, w, 5, 2) for w in (16, 24, 32, 56, 64)),
        *((3, 7, h, 32, 3, 1) for h in (7, 8, 9, 15, 16, 17)),
        *((1, 6, 19, 32, 3, p) for p in (0, 2, 3, 5)),  # other paddings: 5 begins where 1 does
        *((1, 6, 19, 40, 5, p) for p in (0, 1, 3, 6)),
        *((1, 6, 19, w, 3, 1) for w in (28, 30, 31, 33)),  # rows of other alignments
    )
]
ALONG_A_ROW = [
    Case(n=n, c=c, c_out=9, h=1, w=w, kernel=(1, k), padding=(0, p), **SMOOTH)
    for n, c, w, k, p in (
        *((2, 33, 64, k, k // 2) for k in (4, 5, 6, 7, 8, 9, 11, 31)),
        *((1, 5, 72, 9, p) for p in (0, 1, 2, 3, 5, 8)),  # the first four begins elsewhere in a row
        *((1, 5, w, 15, 7) for w in (8, 61, 62, 63, 65, 128, 150, 264)),
    )
]


@pytest.mark.parametrize("case", AT_STRIDE_2 + ALONG_A_ROW, ids=identify)
def test_in_16_bits(case, device):
    check_case(case, torch.float16, device, False, backward=True)


@pytest.mark.parametrize("case", ALONG_A_ROW, ids=identify)
def test_in_float32(case, device):
    check_case(case, torch.float32, device, False, backward=True)
