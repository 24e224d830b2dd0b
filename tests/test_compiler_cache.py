"""Caches of torch.compile on disk are not shared between builds of the package."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import dsconv_cuda
from dsconv_cuda import _loader, compiler_cache

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.one_isa]


@pytest.fixture
def config(device):
    _loader.load_library()
    with torch.compiler.config.patch(cache_key_tag=torch.compiler.config.cache_key_tag):
        yield torch.compiler.config


def test_the_digest_tells_schemas_and_kernels_apart():
    ops = [("a(Tensor x) -> Tensor", "CPU"), ("b(Tensor x, int n) -> Tensor", "CPU CUDA")]
    others = (
        [("a(Tensor x, int n) -> Tensor", "CPU"), ops[1]],
        [("a(Tensor x) -> Tensor", "CPU CUDA"), ops[1]],
        ops[:1],
    )
    assert len({compiler_cache.digest(some) for some in (ops, *others)}) == 4
    assert compiler_cache.digest(ops[::-1]) == compiler_cache.digest(ops)


def test_the_tag_joins_what_the_user_put_there(config):
    tag = f"dsconv_cuda {compiler_cache.digest(compiler_cache.registered_ops())}"
    assert tag in config.cache_key_tag
    config.cache_key_tag = "mine"
    compiler_cache.mark()
    compiler_cache.mark()
    assert config.cache_key_tag == f"mine {tag}"


def test_a_graph_of_another_build_is_not_taken(config, device, monkeypatch):
    net = dsconv_cuda.DepthwiseSeparableConv2d(3, 4, 3).to(device)
    x = torch.randn(1, 3, 5, 5, device=device)

    def hits() -> int:
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            torch.compile(net)(x)
        return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]

    with fresh_cache():
        assert hits() == 0
        assert hits() > 0
        monkeypatch.setattr(compiler_cache, "registered_ops", lambda: [("another(Tensor x) -> Tensor", "CPU")])
        config.cache_key_tag = ""
        compiler_cache.mark()
        assert hits() == 0
