"""Names and linear layers of torchtitan's models, read from its source and its config trees."""

import importlib.util
import subprocess
import sys

import pytest

from aotrain.integrations.torchtitan.models import llama3_spec
from aotrain.integrations.torchtitan.shapes import families, linear_shapes


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
    ours = {"debug"} if family == "llama3" else set()
    assert set(families()[family]) == set(loaded) | ours


@pytest.mark.parametrize("family", ["llama3", "qwen3", "deepseek_v3", "gpt_oss"])
def test_families_can_be_listed(family):
    shapes = linear_shapes(family, families()[family][0])
    assert shapes
    assert all(n > 0 and k > 0 for _, n, k in shapes)


def test_a_family_that_lacks_a_package_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan.models.qwen3", None)
    with pytest.raises(ValueError, match=r"qwen3/8B: torchtitan's qwen3 cannot be loaded"):
        linear_shapes("qwen3", "8B")


def test_without_torchtitan_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'aotrain\[titan\]'"):
        families()


def test_shapes_of_llama():
    shapes = {fqn: (n, k) for fqn, n, k in linear_shapes("llama3", "8B")}
    assert len(shapes) == 1 + 5 * 32
    assert shapes["lm_head"] == (128256, 4096)
    assert shapes["layers.31.attention.qkv_linear.wqkv"] == (6144, 4096)
    assert shapes["layers.0.feed_forward.w2"] == (4096, 14336)


def test_the_debug_size_is_ours():
    debug = linear_shapes("llama3", "debug")
    assert debug[0] == ("lm_head", 320, llama3_spec("debug", "sdpa").model.dim)


def test_names_are_listed_without_importing_torch():
    script = (
        "import sys\nfrom aotrain.integrations.torchtitan.shapes import families\n"
        "assert '8B' in families()['llama3']\nassert 'torch' not in sys.modules and 'torchtitan' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
