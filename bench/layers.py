"""The layers that are measured: the lists for the benchmarks, their tests and their tables.

Each is a pair: depthwise k_h x k_w, then 1x1 from C (times a multiplier, where there is one) to C_out, biases on both.
Padding is d * (k - 1) / 2, so that the map is kept at stride 1. ReLU6 stands between the two; after the 1x1 it stands
where the network has an activation there. The SiLU, h-swish and GELU of the original networks are replaced by it, since
every peer fuses ReLU6. 3-D layers have a depth in front: D x H x W, and k_d x k_h x k_w.
"""

import math
from dataclasses import dataclass, replace

TABLE = """
# name                  N     C      HxW      k  s  d C_out  out_activation
mbv1_b01                1    32  112x112    3x3  1  1    64  relu6     quick
mbv1_b02                1    64  112x112    3x3  2  1   128  relu6     quick
mbv1_b03                1   128    56x56    3x3  1  1   128  relu6
mbv1_b04                1   128    56x56    3x3  2  1   256  relu6
mbv1_b05                1   256    28x28    3x3  1  1   256  relu6
mbv1_b06                1   256    28x28    3x3  2  1   512  relu6
mbv1_b07                1   512    14x14    3x3  1  1   512  relu6     quick
mbv1_b12                1   512    14x14    3x3  2  1  1024  relu6
mbv1_b13                1  1024      7x7    3x3  1  1  1024  relu6
mbv1_b01_n16           16    32  112x112    3x3  1  1    64  relu6
mbv1_b02_n16           16    64  112x112    3x3  2  1   128  relu6
mbv1_b05_n16           16   256    28x28    3x3  1  1   256  relu6     quick
mbv1_b07_n16           16   512    14x14    3x3  1  1   512  relu6
mbv1_b13_n16           16  1024      7x7    3x3  1  1  1024  relu6
mbv2_32x112s1_16        1    32  112x112    3x3  1  1    16  identity
mbv2_96x112s2_24        1    96  112x112    3x3  2  1    24  identity
mbv2_144x56s1_24        1   144    56x56    3x3  1  1    24  identity
mbv2_144x56s2_32        1   144    56x56    3x3  2  1    32  identity
mbv2_192x28s1_32        1   192    28x28    3x3  1  1    32  identity
mbv2_192x28s2_64        1   192    28x28    3x3  2  1    64  identity
mbv2_384x14s1_64        1   384    14x14    3x3  1  1    64  identity
mbv2_384x14s1_96        1   384    14x14    3x3  1  1    96  identity
mbv2_576x14s1_96        1   576    14x14    3x3  1  1    96  identity  quick
mbv2_576x14s2_160       1   576    14x14    3x3  2  1   160  identity
mbv2_960x7s1_160        1   960      7x7    3x3  1  1   160  identity
mbv2_960x7s1_320        1   960      7x7    3x3  1  1   320  identity
effb0_k5_144x56s2_40    1   144    56x56    5x5  2  1    40  identity
effb0_k5_240x28s1_40    1   240    28x28    5x5  1  1    40  identity
effb0_k5_480x14s1_112   1   480    14x14    5x5  1  1   112  identity
effb0_k5_672x14s1_112   1   672    14x14    5x5  1  1   112  identity  quick
effb0_k5_672x14s2_192   1   672    14x14    5x5  2  1   192  identity
effb0_k5_1152x7s1_192   1  1152      7x7    5x5  1  1   192  identity
mbv3_k5_72x56s2_40      1    72    56x56    5x5  2  1    40  identity
mbv3_k5_120x28s1_40     1   120    28x28    5x5  1  1    40  identity
mbv3_k5_672x14s2_160    1   672    14x14    5x5  2  1   160  identity
mbv3_k5_960x7s1_160     1   960      7x7    5x5  1  1   160  identity
xception_mid            1   728    19x19    3x3  1  1   728  relu6
convnext_k7             1    96    56x56    7x7  1  1   384  relu6
replknet_k31            1   128    56x56  31x31  1  1   512  relu6
conformer_k31           1   256    1x400   1x31  1  1   256  relu6
dilated_d2              1   256    28x28    3x3  1  2   256  relu6
"""

# For GPUs: whole maps and batches, from the networks named. A 1-D layer is a map of one row.
GPU_TABLE = """
# name                  N     C      HxW      k  s  d C_out  out_activation
mbv1_b01_n128         128    32  112x112    3x3  1  1    64  relu6     quick
mbv1_b02_n128         128    64  112x112    3x3  2  1   128  relu6
mbv1_b03_n128         128   128    56x56    3x3  1  1   128  relu6
mbv1_b04_n128         128   128    56x56    3x3  2  1   256  relu6
mbv1_b05_n128         128   256    28x28    3x3  1  1   256  relu6     quick
mbv1_b06_n128         128   256    28x28    3x3  2  1   512  relu6
mbv1_b07_n128         128   512    14x14    3x3  1  1   512  relu6     quick
mbv1_b12_n128         128   512    14x14    3x3  2  1  1024  relu6
mbv1_b13_n128         128  1024      7x7    3x3  1  1  1024  relu6
mbv1_b07_n1             1   512    14x14    3x3  1  1   512  relu6     quick
mbv2_144_n128         128   144    56x56    3x3  1  1    24  identity  quick
effb0_1152_n128       128  1152      7x7    5x5  1  1   192  identity
effb0_672_n128        128   672    14x14    5x5  1  1   112  identity  quick
mnasnet_240_n128      128   240    28x28    5x5  2  1    80  identity
xception_entry_n32     32   128    74x74    3x3  1  1   256  identity
xception_mid_n32       32   728    19x19    3x3  1  1   728  identity
xception_exit_n32      32  1536    10x10    3x3  1  1  2048  identity
convnext_s1_n64        64    96    56x56    7x7  1  1   384  relu6     quick
convnext_s3_n64        64   384    14x14    7x7  1  1  1536  relu6
replk_s1_n64           64   128    56x56  31x31  1  1   128  relu6
replk_s3_n64           64   512    14x14  27x27  1  1   512  relu6
replk_s4_n64           64  1024      7x7  13x13  1  1  1024  relu6
conformer_n16          16   512    1x400   1x31  1  1   512  relu6
quartznet_b1_n32       32   256    1x835   1x33  1  1   256  relu6
quartznet_b3_n32       32   512    1x835   1x51  1  1   512  relu6
quartznet_b5_n32       32   512    1x835   1x75  1  1   512  relu6
quartznet_c2_n32       32   512    1x835   1x87  1  2   512  relu6
mobileclip_64_n8        8    64    64x64    7x7  1  1   128  relu6     multiplier=2
mobileclip_128_n8       8   128    32x32    7x7  1  1   256  relu6     multiplier=2
mobileclip_256_n8       8   256    16x16    7x7  1  1   512  relu6     multiplier=2
"""

# X3D-M (arXiv:2004.04730): the 3 x 3 x 3 of every stage.
VOLUME_TABLE = """
# name                  N     C      DxHxW      k      s  d C_out  out_activation
x3d_s2                  8    54   16x56x56    3x3x3    1  1    24  identity
x3d_s2_n1               1    54   16x56x56    3x3x3    1  1    24  identity
x3d_s3_n1               1   108   16x28x28    3x3x3    1  1    48  identity
x3d_s4_n1               1   216   16x14x14    3x3x3    1  1    96  identity
x3d_s5_n1               1   432     16x7x7    3x3x3    1  1   192  identity
"""


@dataclass(frozen=True)
class Layer:
    name: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: int
    dilation: int
    out_channels: int
    out_activation: str
    multiplier: int = 1  # channels between the two convolutions, over those of the input
    quick: bool = False
    depth: int = 1  # of a 3-D layer, whose kernel has three numbers

    @property
    def middle_channels(self):
        return self.channels * self.multiplier

    @property
    def size(self):
        return (self.depth, self.height, self.width)[-len(self.kernel) :]

    @property
    def pixels(self):
        return math.prod(self.size)

    @property
    def out_pixels(self):
        return math.prod(self.out_size)

    @property
    def taps(self):
        return math.prod(self.kernel)

    @property
    def padding(self):
        return tuple(self.dilation * (k - 1) // 2 for k in self.kernel)

    @property
    def out_size(self):
        sizes = zip(self.size, self.kernel, self.padding, strict=True)
        return tuple((size + 2 * p - self.dilation * (k - 1) - 1) // self.stride + 1 for size, k, p in sizes)


def parse(table):
    """The layers of a table with one line each; `#` begins a comment."""
    layers = []
    for line in table.splitlines():
        fields = line.split("#")[0].split()
        if not fields:
            continue
        name, batch, channels, size, kernel, stride, dilation, out_channels, out_activation, *marks = fields
        multiplier = [mark.removeprefix("multiplier=") for mark in marks if mark.startswith("multiplier=")]
        if len(set(marks) - {"quick"}) > len(multiplier):
            raise ValueError(f"layer {name}: unknown mark in {marks}")
        *depth, height, width = map(int, size.split("x"))
        layers.append(
            Layer(
                name,
                int(batch),
                int(channels),
                height,
                width,
                tuple(map(int, kernel.split("x"))),
                int(stride),
                int(dilation),
                int(out_channels),
                out_activation,
                int(multiplier[0]) if multiplier else 1,
                "quick" in marks,
                *depth,
            )
        )
    return tuple(layers)


def frames(volume):
    """The frames of a 3-D layer as images: a 2-D layer of as many channels and pixels."""
    return replace(
        volume, name=f"{volume.name}_frames", batch=volume.batch * volume.depth, kernel=volume.kernel[1:], depth=1
    )


LAYERS = parse(TABLE)
GPU_LAYERS = parse(GPU_TABLE)
VOLUMES = tuple(layer for volume in parse(VOLUME_TABLE) for layer in (volume, frames(volume)))


def select(choice, gpu=False):
    """`quick`, `all`, or layer names separated by commas; `quick` and `all` of those for GPUs where `gpu`. `rows` are
    the 1-D layers, `volumes` the 3-D ones, each before its frames as images."""
    layers = GPU_LAYERS if gpu else LAYERS
    if choice == "volumes":
        return VOLUMES
    if choice == "rows":
        return tuple(layer for layer in (*LAYERS, *GPU_LAYERS) if layer.height == 1)
    if choice == "all":
        return layers
    if choice == "quick":
        return tuple(layer for layer in layers if layer.quick)
    by_name = {layer.name: layer for layer in (*LAYERS, *GPU_LAYERS, *VOLUMES)}
    unknown = [name for name in choice.split(",") if name not in by_name]
    if unknown:
        raise ValueError(f"no layer {', '.join(unknown)}; there are: quick, all, rows, volumes, {', '.join(by_name)}")
    return tuple(by_name[name] for name in choice.split(","))
