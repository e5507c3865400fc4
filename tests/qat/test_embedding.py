"""Fake-quantized embeddings: the lookup in the quantized table, values and gradients, without quantizing all of it."""

import pytest
import torch

from aotrain.qat import FakeQuantizedEmbedding, Float8FakeQuantizeConfig, IntxFakeQuantizeConfig
from aotrain.qat.embedding import Int4WeightOnlyQATEmbedding
from aotrain.quantization import PerTensor
from tests.qat.models import randn

CONFIGS = (
    IntxFakeQuantizeConfig(torch.int4, group_size=32),
    IntxFakeQuantizeConfig(torch.int8, "per_channel", scale_precision=None),
    IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False),
    Float8FakeQuantizeConfig(),
    Float8FakeQuantizeConfig(granularity=PerTensor()),
)


def indices() -> torch.Tensor:
    return torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_of_the_quantized_table(config, dtype: torch.dtype):
    torch.manual_seed(0)
    plain = torch.nn.Embedding(20, 64, padding_idx=3, dtype=dtype)
    layer = FakeQuantizedEmbedding.from_embedding(plain, config)
    assert layer.weight is plain.weight
    assert list(layer.state_dict()) == ["weight"]
    want = torch.nn.functional.embedding(indices(), layer.weight_fake_quantizer(layer.weight), padding_idx=3)
    output = layer(indices())
    assert torch.equal(output, want)
    grad = randn(3, 9, 64, seed=1, dtype=dtype)
    (got,), (expected,) = (torch.autograd.grad(result, layer.weight, grad) for result in (output, want))
    assert torch.equal(got, expected)
    back = layer.to_embedding()
    assert type(back) is torch.nn.Embedding
    assert back.weight is plain.weight
    assert back.padding_idx == 3
    assert not list(back.children())


def test_only_the_rows_at_hand_are_quantized():
    layer = FakeQuantizedEmbedding(1000, 64, weight_config=CONFIGS[0])
    sizes = []
    quantizer = layer.weight_fake_quantizer
    forward = quantizer.forward
    quantizer.forward = lambda x: sizes.append(x.numel()) or forward(x)
    layer(torch.arange(6))
    assert sizes == [6 * 64]


def test_sparse_gradients():
    layer = FakeQuantizedEmbedding(20, 64, sparse=True, weight_config=CONFIGS[0])
    layer(indices()).sum().backward()
    assert layer.weight.grad.is_sparse


def test_switches_and_errors():
    layer = Int4WeightOnlyQATEmbedding(20, 64, group_size=32)
    plain = torch.nn.functional.embedding(indices(), layer.weight)
    assert not torch.equal(layer(indices()), plain)
    layer.disable_fake_quant()
    assert torch.equal(layer(indices()), plain)
    layer.enable_fake_quant()
    assert not torch.equal(layer(indices()), plain)
    with pytest.raises(ValueError, match=r"a table that its scheme cannot take: .* multiple of the group size 32"):
        FakeQuantizedEmbedding(20, 40, weight_config=CONFIGS[0])
