"""opcheck, with all its tests, of every op that the package registers: both layouts, with and without biases, in the
mode of deterministic algorithms. An op that is not here fails the first test."""

import pytest
import torch
from torch.library import opcheck

from dsconv_cuda import _loader, graph_ops

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]

GEOMETRY = ([2, 1], [1, 1, 1, 1], [1, 1])
SILU, TANH = 4, 9
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SCHEMA = ("test_schema",)

# Called below autograd, for plain tensors of the CPU, and never traced: no fake kernels.
EAGER_ONLY = (
    "keep", "fwd_kept", "fwd_after_norm_kept", "fwd_with_pre_kept", "bwd_kept", "seen_again", "train_fwd", "train_bwd",
    "fold_norm", "fold_norm_bwd",
)  # fmt: skip


class Operands:
    """The arguments of every op, by name, for one layout, with biases or without."""

    def __init__(self, device, channels_last: bool, biases: bool):
        ops = torch.ops.dsconv_cuda
        x = torch.randn(2, 6, 9, 7, device=device)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        dw, pw = torch.randn(12, 1, 3, 3, device=device), torch.randn(5, 12, 1, 1, device=device)
        dw_bias, pw_bias = (torch.randn(n, device=device) if biases else None for n in (12, 5))
        weights = (x, dw, pw, dw_bias)
        self.by_name = of = {}
        of["fwd"] = of["fwd_with_pre"] = (*weights, pw_bias, *GEOMETRY, SILU, TANH)
        y = ops.fwd(*of["fwd"])
        of["bwd"] = (torch.randn_like(y), *weights, y, *GEOMETRY, SILU, TANH, 31)
        of["z_moments"] = (*weights, *GEOMETRY)
        moments = ops.z_moments(*of["z_moments"])
        gamma, beta = (torch.rand(12, device=device) if biases else None for _ in range(2))
        of["norm_vectors"] = (moments, gamma, beta, 1e-5)
        vectors = ops.norm_vectors(*of["norm_vectors"])
        of["norm_track"] = (moments, 70.0, 0.1, torch.zeros(12, device=device), torch.ones(12, device=device))
        of["fwd_norm"] = (*weights, pw_bias, vectors, *GEOMETRY, SILU, True)
        y, moments = ops.fwd_norm(*of["fwd_norm"])
        of["moments"] = (y,)
        of_y, grad = ops.norm_vectors(moments, None, None, 1e-5), torch.randn_like(y)
        of["norm_act"] = (y, of_y, TANH)
        of["norm_act_sums"] = (grad, y, of_y, TANH)
        sums = ops.norm_act_sums(*of["norm_act_sums"])
        of["norm_act_grad"] = (grad, y, of_y, sums, 70.0, TANH)
        both = (grad, y, *weights, vectors, of_y, sums, 70.0, *GEOMETRY, SILU, TANH, 31)
        of["bwd_norm"] = of["bwd_norm_pointwise"] = both
        du, du_sums, *_ = ops.bwd_norm_pointwise(*both)
        of["bwd_norm_depthwise"] = (du, *weights, vectors, du_sums, 70.0, *GEOMETRY, 3)
        affine = (gamma, beta, None, None, None, 1e-5, 1e-5)
        of["norm_block"] = (*weights, pw_bias, *affine, *GEOMETRY, SILU, TANH, False, False, 0, False)
        affine2 = (gamma[:5], beta[:5]) if biases else (None, None)
        of["norm_later"] = (y, *affine2, 1e-5, SILU)
        row = graph_ops.row(*GEOMETRY, SILU, TANH)
        of["fwd_in_graph"] = of["fwd_with_pre_in_graph"] = of["fwd_packed"] = (*weights, pw_bias, row)
        of["fwd_after_norm_in_graph"] = (
            *of["fwd_in_graph"],
            torch.rand(4, 6, dtype=torch.float64, device=device),
            SILU,
        )
        of["bwd_in_graph"] = (*of["bwd"][:6], row, 31)
        many = [None if t is None else torch.stack((t, t / 2)) for t in of["bwd"][:6]]
        biases_of_y = None if pw_bias is None else torch.stack((pw_bias, -pw_bias))
        of["fwd_each"] = of["fwd_with_pre_each"] = (*many[1:5], biases_of_y, row)
        of["bwd_each"] = (*many, row, 31)
        of["train_fwd_in_graph"] = (*weights, pw_bias, gamma, beta, *affine2, 1e-5, 1e-5, row, None, 0, False)
        of["train_bwd_in_graph"] = (grad, y, *weights, pw_bias, vectors, of_y, row, 7 | 32 | 256, None, 0)
        means = torch.rand(2, 12, device=device)
        of["gate_means"] = (*weights, vectors, *GEOMETRY, SILU, False)
        of["fwd_gated"] = (*weights, pw_bias, means, vectors, None, *GEOMETRY, SILU, TANH)
        of["bwd_gate"] = (grad, *weights, means, vectors, *GEOMETRY, SILU)
        of["bwd_gated"] = (grad, *weights, means, means - 1, vectors if biases else None, *GEOMETRY, SILU, 27)
        norm = [torch.randn(12, device=device), torch.rand(12, device=device), gamma, beta]
        in_norm = [torch.randn(6, device=device), torch.rand(6, device=device), None, None] if biases else []
        of["fwd_folded"] = (*weights, pw_bias, norm, [], 1e-5, 0.0, *GEOMETRY, SILU, TANH, in_norm, 1e-5, SILU)

    def of_eager_only(self) -> dict:
        ops, of = torch.ops.dsconv_cuda, {}
        x, dw, pw, dw_bias, pw_bias, *arguments = self.by_name["fwd"]
        of["keep"] = (dw, pw, *arguments)
        kept, weights = ops.keep(*of["keep"]), (x, dw, pw, dw_bias)
        of["fwd_kept"] = (*weights, pw_bias, kept, 0)
        y = ops.fwd_kept(*of["fwd_kept"])
        vectors = torch.rand(4, 6, dtype=torch.float64, device=x.device)
        of["fwd_after_norm_kept"] = (*weights, pw_bias, ops.keep(dw, pw, *GEOMETRY, SILU, TANH), 0, vectors, SILU)
        of["fwd_with_pre_kept"] = (*weights, pw_bias, kept)
        of["bwd_kept"] = (torch.randn_like(y), *weights, y, kept, 31)
        of["seen_again"] = ([torch.ones(4)], [torch.ones(2, 3)], torch.zeros(1 + 4 * 4 + 9, dtype=torch.uint8))
        statistics = [torch.zeros(12), torch.ones(12), torch.tensor(0), torch.zeros(5), torch.ones(5), torch.tensor(0)]
        of["train_fwd"] = (*weights, pw_bias, *(None,) * 4, *statistics, 1e-5, 0.1, 1e-5, 0.1, kept, None, 0, False)
        _, y, vectors1, vectors2 = ops.train_fwd(*of["train_fwd"])
        of["train_bwd"] = (torch.randn_like(y), y, *weights, pw_bias, vectors1, vectors2, kept, 7, None, 0)
        norm = (dw_bias, torch.randn(12), torch.rand(12))
        of["fold_norm"] = (dw, *norm, dw_bias, dw_bias, 1e-5)
        of["fold_norm_bwd"] = (*map(torch.randn_like, ops.fold_norm(*of["fold_norm"])), dw, *norm, dw_bias, 1e-5)
        return of


@pytest.fixture(autouse=True)
def _deterministic():
    _loader.load_library()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def registered() -> set[str]:
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.split(".")[0] for namespace, name in names if namespace == "dsconv_cuda"}


def has_kernel(name: str, device) -> bool:
    return any(_loader.has_kernel(name, key) for key in (device.type.upper(), "CompositeImplicitAutograd"))


def test_every_op_is_known(device):
    assert registered() <= {*Operands(device, False, True).by_name, *EAGER_ONLY}


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_op(channels_last, biases, device):
    checked = []
    for name, arguments in Operands(device, channels_last, biases).by_name.items():
        if name not in registered() or not has_kernel(name, device):
            continue
        # du has room that nothing is written to, so two calls cannot be compared; a composite op has no schema check.
        left_out = {"bwd_norm_pointwise": ALL[3:], "norm_block": SCHEMA, "norm_later": SCHEMA}.get(name, ())
        opcheck(
            getattr(torch.ops.dsconv_cuda, name).default, arguments, test_utils=[t for t in ALL if t not in left_out]
        )
        checked.append(name)
    assert {"fwd", "bwd", "bwd_norm", "norm_block"} <= set(checked)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_op_with_gradients(channels_last, biases, device):
    """The same where tensors require gradients, of the ops that have them."""
    operands = Operands(device, channels_last, biases).by_name
    for name in ("fwd", "fwd_with_pre", "norm_block", "norm_later"):
        arguments = [
            t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in operands[name]
        ]
        tests = [t for t in ALL if name != "norm_block" or t != "test_schema"]
        opcheck(getattr(torch.ops.dsconv_cuda, name).default, tuple(arguments), test_utils=tests)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_schemas_of_the_ops_of_eager_mode(channels_last, biases, device):
    if not has_kernel("fwd_kept", device) or device.type != "cpu":
        pytest.skip("ops of the CPU kernels")
    arguments = Operands(device, channels_last, biases).of_eager_only()
    assert set(arguments) == set(EAGER_ONLY)
    for name, args in arguments.items():
        opcheck(getattr(torch.ops.dsconv_cuda, name).default, args, test_utils=SCHEMA)
