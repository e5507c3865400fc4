"""torchao's format: the file it would write itself, and models that load bit for bit."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from aotrain.export import export
from tests.export.checkpoints import tensors_of, write
from tests.export.models import assert_same_weights, logits, save_llama, served_model, transformers

pytest.importorskip("torchao", reason="needs the [oracles] extra: pip install -e '.[oracles]'")

# Plain imports: a module that torchao has moved must fail, not skip.
from torchao import quantization
from torchao.prototype.safetensors import safetensors_support


def configuration(scheme: str):
    group, row = quantization.PerGroup(32), quantization.PerRow()
    return {
        "int2-g32": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=group),
        "int3-g32": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=group),
        "int4-g32": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group),
        "8da4w": lambda: quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=group
        ),
        "fp8-weight-only": lambda: quantization.Float8WeightOnlyConfig(),
        "int8": lambda: quantization.Int8DynamicActivationInt8WeightConfig(version=2, granularity=row),
    }[scheme]()


@pytest.mark.parametrize("scheme", ["int2-g32", "int3-g32", "int4-g32", "8da4w", "int8", "fp8-weight-only"])
def test_the_file_is_the_one_that_torchao_writes(tmp_path, scheme: str):
    key = "model.layers.0.mlp.down_proj"
    tensors = tensors_of(1)
    export(write(tmp_path / "in", tensors), tmp_path / "out", scheme=scheme, format="torchao")
    layer = torch.nn.Linear(128, 256, bias=False, dtype=torch.bfloat16)
    layer.weight.data = tensors[f"{key}.weight"]
    quantization.quantize_(layer, configuration(scheme))
    theirs, metadata = safetensors_support.flatten_tensor_state_dict({f"{key}.weight": layer.weight})
    stored = load_file(tmp_path / "out/model.safetensors")
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()[f"{key}.weight"])["_type"] == type(layer.weight).__name__
        ours = json.loads(file.metadata()[f"{key}.weight"])
        assert sorted(json.loads(file.metadata()["tensor_names"])) == sorted(tensors)
    expected = json.loads(metadata[f"{key}.weight"])
    assert ours["_data"] == expected["_data"]
    assert sorted(ours["_tensor_data_names"]) == sorted(expected["_tensor_data_names"])
    for name, tensor in theirs.items():
        assert stored[name].dtype == tensor.dtype
        assert stored[name].shape == tensor.shape
    if scheme.startswith(("int2", "int3", "int4", "8da")):  # scales of the others are in another dtype, or rounding
        for name, tensor in theirs.items():
            assert torch.equal(stored[name], tensor), name


@pytest.mark.parametrize("scheme", ["int2-g32", "int3-g32", "int4-g128", "int8-g32", "fp8-weight-only"])
def test_transformers_loads_the_values_of_training(tmp_path, scheme: str):
    source = save_llama(tmp_path / "in")
    export(source, tmp_path / "out", scheme=scheme, format="torchao")
    expected = served_model(source, scheme, torch.bfloat16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same_weights(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize("scheme", ["8da4w", "int8", "fp8"])
def test_weights_load_where_torchao_rounds_activations_by_itself(tmp_path, scheme: str):
    source = save_llama(tmp_path / "in")
    export(source, tmp_path / "out", scheme=scheme, format="torchao", exclude=("lm_head", "*.0.mlp.down_proj"))
    expected = served_model(source, scheme, torch.bfloat16)
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").model.layers[0].mlp.down_proj
    expected.model.layers[0].mlp.down_proj.weight.data = dense.weight.data
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same_weights(loaded, expected)
    assert type(loaded.model.layers[0].mlp.down_proj.weight.data) is torch.Tensor
