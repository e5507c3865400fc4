"""prepare_qat and convert_qat by the name of a scheme: reports, exclusions, ties, errors, equality of bits."""

import pytest
import torch
from torch import nn

from aotrain.nn import conversion_report
from aotrain.qat import FakeQuantizedEmbedding, FakeQuantizedLinear, IntxFakeQuantizeConfig, convert_qat, prepare_qat
from aotrain.quantization import SCHEMES, QuantizedEmbedding, QuantizedLinear, get_scheme
from tests.qat.models import Model, randn, tokens


def kinds(model: nn.Module) -> list[type]:
    return [type(layer) for layer in (model.embed, model.block[0], model.block[2], model.lm_head)]


def test_report():
    model = Model()
    model.block[0] = nn.Linear(64, 33)
    model.block[2] = nn.Linear(33, 64)
    report = prepare_qat(model, "int4-g32-a8")
    assert report.converted == ("block.0",)
    assert list(report.skipped) == ["block.2", "lm_head"]
    assert str(report).splitlines() == [
        "QAT int4-g32-a8: converted 1 layers, skipped 2 (1 the last dimension of (64, 33) is no multiple of the group "
        "size 32: choose a smaller group; 1 excluded)",
        "  converted block.0: weight and input, 64 -> 33",
        "  skipped   block.2: the last dimension of (64, 33) is no multiple of the group size 32: choose a smaller "
        "group",
        "  skipped   lm_head: excluded",
    ]
    assert conversion_report(model) is report
    converted = convert_qat(model)
    assert str(converted).splitlines()[1:] == ["  converted block.0: int4-g32-a8"]


def test_patterns():
    model = Model()
    prepare_qat(model, "int4-g32", exclude=["block.[0-1]", "lm_*"])
    assert kinds(model) == [nn.Embedding, nn.Linear, FakeQuantizedLinear, nn.Linear]
    model = Model()
    prepare_qat(model, "int4-g32", exclude=[])
    assert kinds(model) == [nn.Embedding, *[FakeQuantizedLinear] * 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int4g32"}, "did you mean 'int4-g32'"),
        ({"scheme": "int4-g32", "exclude": ["blok.*"]}, r"exclude='blok.\*', which matches no module; want a pattern"),
        ({"scheme": "int4-g32", "exclude": "lm_head"}, r"want a list of patterns: \['lm_head'\]"),
        ({"scheme": "int4-g32", "exclude": ["*"]}, "found no layer to prepare: .* skipped 3 .3 excluded"),
        ({"scheme": "int4-g128"}, "found no layer to prepare: .*choose a smaller group"),
    ],
)
def test_errors(arguments, message):
    model = Model()
    model.block = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=message):
        prepare_qat(model, **arguments)
    assert kinds(model) == [nn.Embedding, *[nn.Linear] * 3]


def test_twice_or_not_at_all():
    model = Model()
    with pytest.raises(ValueError, match="convert_qat got a model without fake-quantized layers"):
        convert_qat(model)
    prepare_qat(model, "int4-g32")
    with pytest.raises(ValueError, match=r"prepared already \(block.0 and 1 more\)"):
        prepare_qat(model, "int4-g32")
    convert_qat(model)
    with pytest.raises(ValueError, match="converted already"):
        convert_qat(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCHEMES)
def test_converted_is_prepared_to_the_last_bit(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 128), nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 128)).to(dtype)
    report = prepare_qat(model, name, embeddings=name != "fp8-block")
    assert not report.skipped
    inputs = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    model(inputs).float().square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    prepared = model(inputs)
    convert_qat(model)
    assert type(model[1]) is QuantizedLinear
    assert torch.equal(model(inputs), prepared)


def test_training_in_float32_for_a_bfloat16_server():
    model = Model()
    prepare_qat(model, get_scheme("int4-g32", scale_dtype=torch.bfloat16))
    prepared = model(tokens())
    convert_qat(model)
    assert model.block[0].scale.dtype == torch.bfloat16
    assert torch.equal(model(tokens()), prepared)


def test_a_layer_in_two_places_stays_one():
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    prepare_qat(model, "int4-g32")
    assert model[0] is model[2]
    prepared = model(randn(3, 64))
    convert_qat(model)
    assert model[0] is model[2]
    assert torch.equal(model(randn(3, 64)), prepared)


def test_hooks_stay():
    model = Model()
    calls = []
    model.block[0].register_forward_hook(lambda *_: calls.append(1))
    prepare_qat(model, "int4-g32")
    model(tokens())
    convert_qat(model)
    model(tokens())
    assert calls == [1, 1]


def test_layers_that_nobody_calls_or_that_compute_otherwise_are_skipped():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleDict({"own": Own(64, 64), "attention": nn.MultiheadAttention(64, 2), "plain": nn.Linear(64, 64)})
    report = prepare_qat(model, "int4-g32")
    assert report.converted == ("plain",)
    assert "MultiheadAttention only reads its weight" in report.skipped["attention.out_proj"]
    assert "does not have QAT support" in report.skipped["own"]


def test_tied_embeddings_are_one_or_none():
    model = Model(tied=True)
    report = prepare_qat(model, "int4-g32-a8", exclude=())
    assert report.skipped == {"lm_head": "its weight is that of embed: embeddings=True would quantize both"}

    model = Model(tied=True)
    report = prepare_qat(model, "int4-g32-a8", exclude=["embed"], embeddings=True)
    assert report.skipped == {"embed": "excluded", "lm_head": "its weight is that of embed: excluded"}

    # The head's weight is the table; its input is left as it was asked for.
    model = Model(tied=True)
    prepare_qat(model, "int4-g32-a8", embeddings=True)
    assert kinds(model) == [FakeQuantizedEmbedding, *[FakeQuantizedLinear] * 3]
    assert model.lm_head.activation_fake_quantizer is None
    assert model.lm_head.weight is model.embed.weight
    table = model.embed(torch.arange(80))
    assert torch.equal(table, model.lm_head.weight_fake_quantizer(model.lm_head.weight))
    prepared = model(tokens())
    convert_qat(model)
    assert kinds(model) == [QuantizedEmbedding, *[QuantizedLinear] * 3]
    assert model.lm_head.codes is model.embed.codes
    assert model.lm_head.scale is model.embed.scale
    assert torch.equal(model(tokens()), prepared)
    assert torch.equal(model.embed(torch.arange(80)), table)


def test_a_tie_that_is_prepared_by_half_is_refused():
    model = Model(tied=True)
    model.lm_head = FakeQuantizedLinear.from_linear(
        model.lm_head, None, IntxFakeQuantizeConfig(torch.int4, group_size=32)
    )
    with pytest.raises(ValueError, match=r"'lm_head', whose weight is that of 'embed', which is not quantized with it"):
        convert_qat(model)
    assert type(model.lm_head) is FakeQuantizedLinear


def test_what_cannot_be_converted():
    static = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, is_dynamic=False)
    int4 = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    model = nn.Sequential(FakeQuantizedLinear(64, 64, activation_config=static, weight_config=int4))
    with pytest.raises(ValueError, match="scales kept from the first step"):
        convert_qat(model)
    model = nn.Sequential(FakeQuantizedLinear(64, 64, activation_config=int4))
    with pytest.raises(ValueError, match="'0' without a weight_config"):
        convert_qat(model)
    learned = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False, range_learning=True)
    model = nn.Sequential(FakeQuantizedLinear(64, 64, weight_config=learned))
    with pytest.raises(ValueError, match="a range to learn that was never initialized"):
        convert_qat(model)


def test_kept_scales_are_converted():
    kept = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False)
    model = nn.Sequential(FakeQuantizedLinear(64, 64, weight_config=kept))
    x = randn(3, 64)
    model(x)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    prepared = model(x)
    convert_qat(model)
    assert torch.equal(model(x), prepared)


def test_compiled_is_eager():
    model = Model()
    prepare_qat(model, "int4-g32-a8", exclude=(), embeddings=True)
    want = model(tokens())
    grads = torch.autograd.grad(want.square().mean(), model.parameters())
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens())
    assert torch.equal(got, want)
    for mine, eager in zip(torch.autograd.grad(got.square().mean(), model.parameters()), grads, strict=True):
        assert torch.equal(mine, eager)
