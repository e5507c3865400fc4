"""What `--check` says: the scheme as servers name it, and the layers that they join."""

import pytest
import torch

from aotrain.export import describe_export, export, formats_for
from aotrain.export.table import FORMATS
from aotrain.quantization import SCHEMES
from tests.export.checkpoints import tensors_of, write

# Classes that vLLM 0.32 chooses for the exported configurations: run for integers and mxfp8, read in its source for the
# others, which need a GPU or a model under way.
VLLM = {
    "int2-g32": "pack-quantized W2A16, int2 group 32 weights; vLLM: CompressedTensorsWNA16",
    "int4-g32": "pack-quantized W4A16, int4 group 32 weights; vLLM: CompressedTensorsWNA16",
    "int4-g128": "pack-quantized W4A16, int4 group 128 weights; vLLM: CompressedTensorsWNA16",
    "int8-g32": "pack-quantized W8A16, int8 group 32 weights; vLLM: CompressedTensorsWNA16",
    "int8": "int-quantized W8A8, int8 channel weights, int8 token activations; vLLM: CompressedTensorsW8A8Int8",
    "int4-g32-a8": "W4A8, int4 group 32 weights, int8 token activations; vLLM: CompressedTensorsWNA8Int",
    "int4-g32-a4": "W4A4, int4 group 32 weights, int4 token activations; vLLM: CompressedTensorsWNA4Int",
    "fp8": "float-quantized W8A8, fp8 channel weights, fp8 token activations; vLLM: CompressedTensorsW8A8Fp8",
    "fp8-weight-only": "float-quantized W8A16, fp8 channel weights; vLLM: CompressedTensorsW8A16Fp8",
    "fp8-block": "W8A8, fp8 block weights, fp8 group 128 activations; vLLM: CompressedTensorsW8A8Fp8",
    "nvfp4": "nvfp4-pack-quantized W4A16, fp4 tensor_group 16 weights; vLLM: CompressedTensorsW4A4Fp4",
    "mxfp4": "mxfp4-pack-quantized W4A16, fp4 group 32 weights; vLLM: CompressedTensorsW4A4Mxfp4",
    "mxfp8": "mxfp8-quantized W8A16, fp8 group 32 weights; vLLM: CompressedTensorsW8A8Mxfp8",
}


def test_every_scheme_of_the_format_has_a_name():
    assert set(VLLM) == {name for name, scheme in SCHEMES.items() if "compressed-tensors" in formats_for(scheme)}


@pytest.mark.parametrize("scheme", VLLM)
def test_the_scheme_as_vllm_names_it(tmp_path, scheme: str):
    text = describe_export(write(tmp_path / "in", tensors_of()), scheme=scheme)
    assert VLLM[scheme] in text
    assert "6 linear layers" in text
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_other_formats_and_dtypes(tmp_path):
    source = write(tmp_path / "in", tensors_of(dtype=torch.float32))
    text = describe_export(source, scheme="8da4w", format="torchao", weight_dtype=torch.bfloat16)
    assert "served in bfloat16" in text
    assert "torchao Int8DynamicActivationIntxWeightConfig, weights are IntxUnpackedToInt8Tensor" in text
    assert "Q4_0" in describe_export(source, scheme="q4_0", format="gguf-grid")
    assert "Fp8LinearMethod" in describe_export(source, scheme="fp8-block", format="float8-block")
    for name, scheme in SCHEMES.items():
        for format in formats_for(scheme):
            assert FORMATS[format].server_view(scheme), (name, format)


def test_layers_that_are_joined(tmp_path):
    tensors = tensors_of()
    for layer in range(2):
        for leaf in ("gate_proj", "up_proj"):
            tensors[f"model.layers.{layer}.mlp.{leaf}.weight"] = torch.randn(64, 256).bfloat16()
    source = write(tmp_path / "in", tensors)
    text = describe_export(source, scheme="nvfp4")
    assert "one global scale for each group:\n" in text
    assert "\n  self_attn: q_proj + k_proj (2 groups)" in text
    assert "\n  mlp: gate_proj + up_proj (2 groups)" in text
    assert "no scale is common to a group" in describe_export(source, scheme="int4-g32")


def test_what_an_export_refuses_is_refused(tmp_path):
    source = write(tmp_path / "in", tensors_of())
    for arguments in ({"scheme": "int3-g32"}, {"scheme": "int4-g32", "exclude": ("*.0.*q_proj",)}):
        with pytest.raises(ValueError) as refused:  # noqa: PT011  (the same message)
            export(source, tmp_path / "out", **arguments)
        with pytest.raises(ValueError) as described:  # noqa: PT011
            describe_export(source, **arguments)
        assert str(described.value) == str(refused.value)
