"""compressed-tensors: words as the library packs them, a configuration it accepts, models that load bit for bit."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aotrain.export import export
from aotrain.export.compressed_tensors import _integers_from_bytes, pack_integers
from aotrain.export.table import FORMATS
from aotrain.quantization import SCHEMES
from tests.export.models import assert_same_weights, logits, save_llama, save_mixture, served_model, transformers

pytest.importorskip("compressed_tensors", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
CARRIED = [name for name, scheme in SCHEMES.items() if FORMATS["compressed-tensors"].refusal(scheme) is None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "in")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_mixture(tmp_path_factory.mktemp("mixture") / "in")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_words_are_those_of_the_library_both_ways(bits: int, rows: int, columns: int, seed: int):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    ours = pack_integers(codes, bits)
    assert torch.equal(ours, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(ours, bits, torch.Size([rows, columns])), codes)
    assert torch.equal(_integers_from_bytes(ours, bits)[:, :columns], codes)


@pytest.mark.parametrize("scheme", CARRIED)
def test_the_library_accepts_the_configuration_and_would_write_the_same(llama, tmp_path, scheme: str):
    from compressed_tensors.quantization import QuantizationConfig

    export(llama, tmp_path / "out", scheme=scheme, verify=False)
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(written)
    again = json.loads(read.model_dump_json())
    for key, value in written.items():
        assert again[key] == value, key


# Where transformers keeps what the file has; its own scales of activations are divided in bfloat16, another rounding.
EXACT = ["int2-g32", "int4-g32", "int4-g128", "int8-g32", "mxfp4", "mxfp8"]
WEIGHTS_EXACT = ["int8", "int4-g32-a8", "int4-g32-a4"]


@pytest.mark.parametrize("scheme", EXACT + WEIGHTS_EXACT)
def test_transformers_loads_the_values_of_training(llama, tmp_path, scheme: str):
    export(llama, tmp_path / "out", scheme=scheme)
    expected = served_model(llama, scheme, torch.bfloat16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    served = logits(loaded)  # the first forward decompresses
    assert_same_weights(loaded, expected)
    assert torch.equal(served, logits(expected)) == (scheme in EXACT)


@pytest.mark.parametrize("scheme", ["fp8", "fp8-weight-only", "fp8-block", "nvfp4"])
def test_transformers_dequantizes_to_the_values_of_training(llama, tmp_path, scheme: str):
    """By default it rounds float32 scales to bfloat16, which is what `dequantize` is for."""
    export(llama, tmp_path / "out", scheme=scheme)
    expected = served_model(llama, scheme, torch.bfloat16)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", quantization_config=config
    )
    assert_same_weights(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize("scheme", ["int4-g32", "mxfp4"])
def test_experts_load(mixture, tmp_path, scheme: str):
    export(mixture, tmp_path / "out", scheme=scheme)
    expected = served_model(mixture, scheme, torch.bfloat16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    served = logits(loaded)
    assert_same_weights(loaded, expected)
    assert torch.equal(served, logits(expected))
