"""Names and linear layers of torchtitan's models, read from its source and its config trees."""

import importlib.util
import subprocess
import sys

import pytest

from aotrain.integrations.torchtitan.families import FAMILIES
from aotrain.integrations.torchtitan.models import llama3_spec
from aotrain.integrations.torchtitan.shapes import families, layer_shapes
from aotrain.nn.expert_work import Experts


@pytest.mark.parametrize(
    ("family", "table"),
    [
        ("llama3", "llama3_configs"),
        ("qwen3", "qwen3_configs"),
        ("deepseek_v3", "deepseekv3_configs"),
        ("gpt_oss", "gptoss_configs"),
    ],
)
def test_sizes_are_those_of_the_package(family, table):
    loaded = getattr(importlib.import_module(f"torchtitan.models.{family}"), table)
    ours = {"debug"} if family in ("llama3", "deepseek_v3") else set()
    assert set(families()[family]) == set(loaded) | ours


@pytest.mark.parametrize("family", ["llama3", "qwen3", "deepseek_v3", "gpt_oss"])
def test_families_can_be_listed(family):
    layers = layer_shapes(family, families()[family][0])
    linears = [layer for layer in layers if not isinstance(layer, Experts)]
    assert all(n > 0 and k > 0 for _, n, k in linears)
    assert linears
    assert (len(layers) > len(linears)) == (family in ("deepseek_v3", "gpt_oss"))


@pytest.mark.parametrize(
    ("family", "size", "count", "experts"),
    [
        (
            *("deepseek_v3", "16B", 26),
            Experts(
                "layers.1.moe.routed_experts.inner_experts",
                (("w1_EFD", 1408, 2048), ("w2_EDF", 2048, 1408), ("w3_EFD", 1408, 2048)),
                *(64, 6),
            ),
        ),
        (
            *("gpt_oss", "20b", 24),
            Experts(
                "layers.0.moe.routed_experts.inner_experts",
                (("mlp1_weight_EGD", 5760, 2880), ("mlp2_weight_EDF", 2880, 2880)),
                *(32, 4),
            ),
        ),
    ],
)
def test_experts_have_their_products(family, size, count, experts):
    found = [layer for layer in layer_shapes(family, size) if isinstance(layer, Experts)]
    assert (len(found), found[0]) == (count, experts)


def test_a_family_that_lacks_a_package_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan.models.qwen3", None)
    with pytest.raises(ValueError, match=r"qwen3/8B: torchtitan's qwen3 cannot be loaded"):
        layer_shapes("qwen3", "8B")


def test_without_torchtitan_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'aotrain\[titan\]'"):
        families()


def test_shapes_of_llama():
    shapes = {fqn: (n, k) for fqn, n, k in layer_shapes("llama3", "8B")}
    assert len(shapes) == 1 + 5 * 32
    assert shapes["lm_head"] == (128256, 4096)
    assert shapes["layers.31.attention.qkv_linear.wqkv"] == (6144, 4096)
    assert shapes["layers.0.feed_forward.w2"] == (4096, 14336)


def test_gates_of_routers_are_not_candidates():
    names = [layer[0] for layer in layer_shapes("deepseek_v3", "16B")]
    assert "layers.1.moe.shared_experts.w1" in names
    assert not any("gate" in name for name in names)


def test_every_family_of_a_job_is_torchtitans():
    for name, family in FAMILIES.items():
        assert set(family.sizes.values()) <= set(families()[family.package]), name


def test_the_debug_size_is_ours():
    debug = layer_shapes("llama3", "debug")
    assert debug[0] == ("lm_head", 320, llama3_spec("debug", "sdpa").model.dim)


def test_names_are_listed_without_importing_torch():
    script = (
        "import sys\nfrom aotrain.integrations.torchtitan.shapes import families\n"
        "assert '8B' in families()['llama3']\nassert 'torch' not in sys.modules and 'torchtitan' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
