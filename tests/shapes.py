"""The calls that the numerical tests make: shapes around the edges of tiles, by rule.

A kernel works in tiles of pixels and channels, and what breaks is what does not fill them. So each size takes the
values below, at, above and well above every power of two that a tile may have, one size at a time, the others held at a
prime. A new tile size needs no new case.
"""

import itertools
from dataclasses import dataclass, replace

import torch

import dsconv_cuda.activations

TILE_SIZES = (4, 8, 16, 32)


def around(tile: int) -> tuple[int, ...]:
    return (tile - 1, tile, tile + 1)


EDGES = tuple(sorted({1, 2, *(size for tile in TILE_SIZES for size in around(tile)), 2 * TILE_SIZES[-1] + 1}))


def described(case) -> str:
    """In what a dataclass differs from its default, for the names of tests."""
    default = type(case)()
    fields = {name: value for name, value in vars(case).items() if value != getattr(default, name)}
    return ",".join(f"{name}={value}".replace(" ", "") for name, value in fields.items()) or "default"


@dataclass(frozen=True)
class Case:
    """One call of the op."""

    n: int = 2
    c: int = 5
    multiplier: int = 1
    c_out: int = 7
    h: int = 7
    w: int = 11
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    dw_bias: bool = True
    pw_bias: bool = True
    activation: str = "relu6"
    out_activation: str = "identity"

    def __str__(self):
        return described(self)

    @property
    def kwargs(self) -> dict:
        names = ("stride", "padding", "dilation", "activation", "out_activation")
        return {name: getattr(self, name) for name in names}

    def tensors(
        self, dtype: torch.dtype, device="cpu", channels_last: bool = False, requires_grad: bool = False
    ) -> list:
        """(input, dw_weight, pw_weight, dw_bias, pw_bias), of values that float32 holds exactly."""
        c_mid = self.c * self.multiplier
        shapes = (
            (self.n, self.c, self.h, self.w),
            (c_mid, 1, *self.kernel),
            (self.c_out, c_mid, 1, 1),
            (c_mid,) if self.dw_bias else None,
            (self.c_out,) if self.pw_bias else None,
        )
        tensors = [None if s is None else torch.randn(s).to(device=device, dtype=dtype) for s in shapes]
        if channels_last:
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        if requires_grad:
            tensors = [None if t is None else t.requires_grad_() for t in tensors]
        return tensors


CHANNELS = [Case(c=c, c_out=EDGES[-1 - i]) for i, c in enumerate(EDGES)]
PIXELS = [Case(n=1, c=9, h=EDGES[-1 - i] if w > 2 else 3, w=w) for i, w in enumerate(EDGES)]
MULTIPLIERS = [Case(c=c, multiplier=m, c_out=9) for c, m in ((1, 8), (3, 2), (5, 3), (8, 2), (17, 4))]
GEOMETRIES = [
    Case(h=13, w=15, kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    for kernel, stride, padding, dilation in (
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((1, 1), (2, 2), (1, 0), (1, 1)),
        ((3, 3), (1, 1), (0, 0), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((3, 3), (2, 1), (0, 1), (1, 1)),
        ((3, 3), (3, 4), (2, 2), (1, 1)),
        ((3, 3), (1, 1), (2, 2), (2, 2)),
        ((3, 3), (2, 2), (3, 1), (2, 3)),
        ((3, 3), (1, 1), (5, 4), (1, 1)),  # wider than the kernel: outputs that see zeros only
        ((5, 5), (1, 1), (2, 2), (1, 1)),
        ((5, 5), (2, 2), (2, 2), (1, 1)),
        ((7, 7), (1, 1), (3, 3), (1, 1)),
        ((2, 2), (1, 1), (0, 0), (1, 1)),
        ((2, 3), (1, 1), "same", (1, 1)),
        ((4, 2), (1, 1), "same", (3, 2)),
        ((1, 7), (1, 1), (0, 3), (1, 1)),
        ((11, 1), (1, 2), (5, 0), (1, 1)),
        ((13, 15), (1, 1), (0, 0), (1, 1)),  # one output pixel
        ((13, 13), (1, 1), "same", (1, 1)),
    )
]
# Windows of x that a CPU kernel cannot hold as a whole: it cuts the rows, the columns, or goes by the taps. In float32
# only: PyTorch's own bfloat16 gradients of such dilations crash (2.14.1 on AVX512-BF16).
WINDOWS = [
    Case(n=1, c=17, h=4, w=4200),
    Case(n=1, c=17, h=400, w=8, padding=(180, 1), dilation=(180, 1)),
    Case(n=1, c=17, h=70, w=230, padding=(30, 2), dilation=(30, 2)),
    Case(n=1, c=17, h=70, w=230, stride=(1, 2), padding=(30, 2), dilation=(30, 2)),
    Case(n=1, c=17, h=210, w=210, padding=(100, 100), dilation=(100, 100)),
    Case(n=1, c=3, multiplier=2, h=70, w=230, padding=(30, 2), dilation=(30, 2)),
]
BIASES = [Case(dw_bias=dw, pw_bias=pw) for dw, pw in itertools.product((False, True), repeat=2) if not (dw and pw)]
ACTIVATIONS = tuple(dsconv_cuda.activations.ACTIVATIONS)
MIDDLES = [Case(activation=name) for name in ACTIVATIONS]
EPILOGUES = [Case(out_activation=name, activation="silu") for name in ACTIVATIONS[1:]]

ALL = [*CHANNELS, *PIXELS, *MULTIPLIERS, *GEOMETRIES, *BIASES, *MIDDLES, *EPILOGUES]

# The layers that the project is measured on, with fewer channels and pixels.
LAYERS = [
    Case(n=1, c=32, c_out=64, h=28, w=28),
    Case(n=1, c=64, c_out=128, h=28, w=28, stride=(2, 2)),
    Case(n=2, c=128, c_out=128, h=14, w=14),
    Case(n=1, c=96, c_out=24, h=28, w=28, stride=(2, 2)),
    Case(n=1, c=72, c_out=40, h=28, w=28, kernel=(5, 5), stride=(2, 2), padding=(2, 2)),
    Case(n=1, c=48, c_out=96, h=28, w=28, kernel=(7, 7), padding=(3, 3)),
    Case(n=1, c=16, c_out=16, h=33, w=33, kernel=(31, 31), padding=(15, 15)),
    Case(n=2, c=32, c_out=32, h=1, w=100, kernel=(1, 31), padding=(0, 15)),
    # Of wide kernels runs of taps that are outside the image on one side or the other, inside, or both in part.
    Case(n=1, c=20, c_out=16, h=11, w=12, kernel=(5, 33), padding=(2, 20)),
    Case(n=1, c=36, c_out=16, h=19, w=30, kernel=(9, 11), stride=(2, 2), padding=(4, 9)),
    # Groups of tiles that meet within images, and rows of grad_x between them.
    Case(n=3, c=33, c_out=16, h=56, w=30, kernel=(7, 7), padding=(3, 3)),
    Case(n=5, c=40, c_out=33, h=28, w=28, stride=(3, 3)),
    Case(n=1, c=9, multiplier=3, c_out=20, h=60, w=70, activation="silu"),
    # Channels enough for the CPU backward to go by panels of them; several chunks of images.
    Case(n=11, c=250, c_out=220, h=7, w=7, activation="silu"),
    Case(n=1, c=272, c_out=100, h=14, w=14, kernel=(5, 5), stride=(2, 2), padding=(2, 2)),
    # Rows longer than a box of the CUDA kernels, in cells of four pixels.
    Case(n=1, c=9, c_out=8, h=9, w=4300, stride=(2, 2)),
]


def thinned(cases: list[Case], step: int) -> list[Case]:
    return cases[::step]


def with_dtype(cases: list[Case]) -> list[tuple[Case, torch.dtype, bool]]:
    """Each case in float32 in both layouts, and in one other dtype in the layout that its turn brings."""
    others = itertools.cycle(itertools.product((torch.float64, torch.bfloat16, torch.float16), (True, False)))
    result = []
    for case in cases:
        result += [(case, torch.float32, False), (case, torch.float32, True), (case, *next(others))]
    return result


def identify(value) -> str | None:
    """Test ids."""
    if isinstance(value, Case):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return None


def without_biases(case: Case) -> Case:
    return replace(case, dw_bias=False, pw_bias=False)
