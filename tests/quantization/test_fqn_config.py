"""FqnToConfig: which key decides for a layer, and keys that name nothing."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from aotrain.nn import Float8Linear, Float8LinearConfig, conversion_report
from aotrain.quantization import (
    AOPerModuleConfig,
    FqnToConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    ModuleFqnToConfig,
    PerGroup,
    fqn_matches_fqn_config,
    quantize_,
    scheme_of,
)

FOUR, TWO, EIGHT = (IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32)) for bits in (4, 2, 8))
NAMES = {scheme_of(config).name: config for config in (FOUR, TWO, EIGHT)}


def model() -> nn.Module:
    layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(32, 32), "v": nn.Linear(32, 32)}) for _ in range(2))
    return nn.ModuleDict({"embed": nn.Embedding(8, 32), "layers": layers, "norm": nn.LayerNorm(32)})


def schemes(network: nn.Module) -> dict[str, str]:
    return {fqn: each.scheme.name for fqn, each in network.named_modules() if hasattr(each, "scheme")}


Q0, V0, Q1, V1 = "layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({Q0: FOUR, "embed.weight": TWO}, {"embed": "int2-g32", Q0: "int4-g32"}),
        ({f"{Q0}.weight": FOUR, Q0: TWO}, {Q0: "int4-g32"}),
        ({f"{Q0}.weight": None, Q0: TWO, V0: TWO}, {V0: "int2-g32"}),
        ({r"re:layers\..*\.q": FOUR, Q0: TWO}, {Q0: "int2-g32", Q1: "int4-g32"}),
        ({r"re:layers\..*\.q": FOUR, Q0: None}, {Q1: "int4-g32"}),
        ({r"re:layers\.0\..": TWO, r"re:layers\.0\.q\.weight": FOUR}, {Q0: "int4-g32", V0: "int2-g32"}),
        ({r"re:.*\.0\.q": TWO, r"re:layers\..*\.q": FOUR}, {Q0: "int2-g32", Q1: "int4-g32"}),
        ({r"re:layers\..*": FOUR, r"re:.*\.v": TWO}, dict.fromkeys((Q0, V0, Q1, V1), "int4-g32")),
        ({"_default": FOUR, Q0: None, V1: EIGHT}, {V0: "int4-g32", Q1: "int4-g32", V1: "int8-g32"}),
        ({r"re:norm|.*\.q": None, "_default": FOUR}, {V0: "int4-g32", V1: "int4-g32"}),
    ],
    ids=[
        "names",
        "weight-before-layer",
        "weight-none",
        "name-before-pattern",
        "name-none",
        "weight-pattern-before-layer-pattern",
        "first-pattern",
        "first-pattern-of-weight",
        "default",
        "pattern-none",
    ],
)
def test_precedence(keys: dict, want: dict[str, str]):
    network = model()
    quantize_(network, FqnToConfig(OrderedDict(keys)), filter_fn=None)
    assert schemes(network) == want
    assert set(conversion_report(network).converted) == set(want)


@pytest.mark.parametrize(
    "keys",
    [
        {f"{Q0}.weight": FOUR, Q0: TWO},
        {f"{Q0}.weight": None, Q0: TWO, V0: TWO},
        {r"re:layers\..\.q": FOUR, Q0: TWO},
        {r"re:layers\.0\..": TWO, r"re:layers\.0\.q\.weight": FOUR},
        {r"re:.*\.0\.q": TWO, r"re:layers\..\.q": FOUR},
        {Q0: None, r"re:layers\..\..": FOUR},
    ],
)
def test_precedence_is_the_peers(keys: dict):
    peers = pytest.importorskip("torchao.quantization", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
    bits = {"int4-g32": torch.int4, "int2-g32": torch.int2}
    network, other = model(), model()
    quantize_(network, FqnToConfig(OrderedDict(keys)))
    same = OrderedDict(
        (key, None if each is None else peers.IntxWeightOnlyConfig(each.weight_dtype, peers.PerGroup(32)))
        for key, each in keys.items()
    )
    peers.quantize_(other, peers.FqnToConfig(same), filter_fn=None)
    target = {
        fqn: each.weight.target_dtype
        for fqn, each in other.named_modules()
        if hasattr(getattr(each, "weight", None), "target_dtype")
    }
    assert {fqn: bits[name] for fqn, name in schemes(network).items()} == target


def test_configurations_of_other_kinds_and_of_a_layer_itself():
    network = model()
    quantize_(network, FqnToConfig({Q0: Float8LinearConfig(), Q1: Int8WeightOnlyConfig()}))
    assert isinstance(network["layers"][0]["q"], Float8Linear)
    assert network["layers"][1]["q"].scheme == scheme_of(Int8WeightOnlyConfig())
    layer = nn.Linear(32, 8)
    quantize_(layer, FqnToConfig({"weight": FOUR}), filter_fn=None)
    assert layer.scheme.name == "int4-g32"


def test_both_attributes_are_one_object_and_the_old_names_are_the_class():
    assert ModuleFqnToConfig is AOPerModuleConfig is FqnToConfig
    config = FqnToConfig(module_fqn_to_config={Q0: FOUR})
    assert config.fqn_to_config is config.module_fqn_to_config
    assert "'layers.0.q'" in str(config)


def test_names_that_match():
    config = FqnToConfig({Q0: FOUR, r"re:layers\.1\..*": TWO, "_default": EIGHT})
    matches = {name: fqn_matches_fqn_config(name, config) for name in (Q0, Q1, f"{V1}.weight", V0, "xlayers.1.q")}
    assert matches == {Q0: True, Q1: True, f"{V1}.weight": True, V0: False, "xlayers.1.q": False}
    with pytest.raises(ValueError, match="got the pattern"):
        fqn_matches_fqn_config(r"re:layers\.1\..*", config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FqnToConfig({Q0: FOUR}, {Q0: TWO}), "both specified and are not equal"),
        (lambda: FqnToConfig({"re:*": FOUR}), "want a regular expression"),
        (lambda: quantize_(model(), FqnToConfig({Q0: FOUR}), lambda *_: True), "Custom filter_fn and FqnToConfig"),
        (lambda: quantize_(model(), FqnToConfig({"layers.7.q": FOUR})), "'layers.7.q', which names no linear"),
        (lambda: quantize_(model(), FqnToConfig({"norm": FOUR})), "'norm', which names no linear"),
        (lambda: quantize_(model(), FqnToConfig({Q0: FOUR, "re:decoder.*": None})), "'re:decoder"),
        (lambda: quantize_(model(), FqnToConfig({Q0: None})), "converts no layer"),
        (lambda: quantize_(model(), FqnToConfig()), "converts no layer"),
    ],
)
def test_what_is_an_error(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
