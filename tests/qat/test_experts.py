"""QAT of experts: what training multiplies by is what an exporter makes of a checkpoint's matrices, bit for bit."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from aotrain.nn import conversion_report, convert_moe_training, unconvert
from aotrain.ops.fake_quantize import fake_quantized_linear
from aotrain.qat import QATSchedule
from aotrain.qat.experts import is_prepared, prepare_moe_qat, unprepare_moe_qat
from aotrain.quantization import SCHEMES
from aotrain.testing import assert_bitwise_equal
from tests.nn.experts import Experts, ListedExperts, LoopedExperts, MoE, rows


def experts(**changed) -> Experts:
    torch.manual_seed(0)
    return Experts(**{"dim": 64, "hidden": 96} | changed)


def batch(count: int = 40, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_(), torch.tensor([9, 9, 30, count], dtype=torch.int32)


def by_hand(module: Experts, name: str, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """A fake-quantized layer per expert."""
    scheme, outputs, start = SCHEMES[name], [], 0
    for expert, end in enumerate(offs.tolist()):
        h = x[start:end].to(module.dtype)
        for weight in (module.up, module.down):
            h = fake_quantized_linear(h, weight[expert].to(module.dtype), None, scheme.activation, scheme.weight)
            h = h.relu() if weight is module.up else h
        outputs.append(h)
        start = end
    return torch.cat(outputs)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-a8", "8da4w", "fp8", "nvfp4", "mxfp4", "q4_0"])
def test_trains_on_the_values_of_single_matrices(name: str):
    module, (x, offs) = experts(), batch()
    keys, parameters = list(module.state_dict()), list(module.parameters())
    leaves = [x, *parameters]
    grad = torch.randn(len(x), 64).bfloat16()
    want = by_hand(module, name, x, offs)
    want_grads = torch.autograd.grad(want, leaves, grad)
    report = prepare_moe_qat(module, name)
    assert report.converted == ("",)
    got = module(x, offs)
    assert_bitwise_equal(got + 0, want + 0)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, grad), want_grads, strict=True):
        assert_bitwise_equal(mine + 0, theirs + 0)
    assert list(module.state_dict()) == keys
    assert all(mine is theirs for mine, theirs in zip(module.parameters(), parameters, strict=True))


def test_weights_stored_the_other_way():
    torch.manual_seed(0)
    module, (x, offs) = ListedExperts(dim=64, hidden=96), batch()
    scheme = SCHEMES["int4-g32"]
    prepare_moe_qat(module, "int4-g32")
    got, expert = module(x, offs), 2
    h = x[9:30].bfloat16()
    for weight in module.weights:
        h = fake_quantized_linear(h, weight[expert].bfloat16().t().contiguous(), None, None, scheme.weight)
    assert_bitwise_equal(got[9:30].detach() + 0, h.detach() + 0)


def test_switches_and_the_way_back():
    module, (x, offs) = experts(), batch()
    plain = module(x, offs)
    prepare_moe_qat(module, "int4-g32-a8")
    quantized = module(x, offs)
    assert not torch.equal(plain, quantized)
    quantizers = (module.activation_fake_quantizer, module.weight_fake_quantizer)
    for quantizer in quantizers:
        quantizer.enabled = False
    assert torch.equal(module(x, offs), plain)
    for quantizer in quantizers:
        quantizer.enabled = True
    assert torch.equal(module(x, offs), quantized)
    unprepare_moe_qat(module)
    assert type(module) is Experts
    assert not list(module.children())
    assert torch.equal(module(x, offs), plain)
    with pytest.raises(ValueError, match="without prepared experts"):
        unprepare_moe_qat(module)


def test_a_schedule_reaches_experts():
    module, (x, offs) = experts(), batch()
    plain = module(x, offs)
    prepare_moe_qat(module, "int2-g32")
    quantized = module(x, offs)
    QATSchedule(start_step=1).apply(module, 0)
    assert torch.equal(module(x, offs), plain)
    QATSchedule(start_step=1).apply(module, 1)
    assert torch.equal(module(x, offs), quantized)


def test_copies_and_pickles_are_prepared_and_apart():
    module, (x, offs) = experts(), batch()
    prepare_moe_qat(module, "int4-g32")
    want = module(x, offs)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert is_prepared(again)
        assert torch.equal(again(x, offs), want)
        again.weight_fake_quantizer.enabled = False
        assert not torch.equal(again(x, offs), want)
    assert torch.equal(module(x, offs), want)


def test_learns():
    module = MoE(experts(dim=64), dim=64)
    report = prepare_moe_qat(module, "int2-g32")
    assert report.converted == ("experts",)
    assert conversion_report(module) is report
    x, target = rows(64, dim=64)[0], torch.randn(64, 16)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (module(x).float() - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        assert module.experts.up.grad.any()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_compiled_is_eager():
    torch.compiler.reset()
    module, (x, offs) = experts(), batch()
    prepare_moe_qat(module, "int4-g32-a8")
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    got, want = compiled(x, offs), module(x, offs)
    assert_bitwise_equal(got.detach(), want.detach())
    mine = torch.autograd.grad(got.float().sum(), compiled.parameters())
    for one, other in zip(mine, torch.autograd.grad(want.float().sum(), module.parameters()), strict=True):
        assert_bitwise_equal(one, other)
    compiled.weight_fake_quantizer.enabled = module.weight_fake_quantizer.enabled = False
    assert_bitwise_equal(compiled(x, offs).detach(), module(x, offs).detach())


def test_experts_without_grouped_gemms_raise():
    module, (x, offs) = LoopedExperts(dim=64, hidden=96), batch()
    prepare_moe_qat(module, "int4-g32")
    with pytest.raises(RuntimeError, match="no grouped GEMM"):
        module(x, offs)


def test_nothing_to_prepare_is_an_error():
    with pytest.raises(ValueError, match="prepared no module"):
        prepare_moe_qat(nn.Linear(64, 64), "int4-g32")
    with pytest.raises(ValueError, match="rejected by the filter"):
        prepare_moe_qat(experts(), "int4-g32", module_filter_fn=lambda module, fqn: False)
    with pytest.raises(ValueError, match=re.escape("up: the last dimension of (96, 64) is no multiple")):
        prepare_moe_qat(experts(), "int4-g128")
    with pytest.raises(ValueError, match="did you mean 'int4-g32'"):
        prepare_moe_qat(experts(), "int4g32")


def test_preparing_twice_or_after_a_conversion_is_an_error():
    module = nn.Sequential(experts())
    prepare_moe_qat(module, "int4-g32")
    with pytest.raises(ValueError, match="0 prepared already; go back first"):
        prepare_moe_qat(module, "int8")
    with pytest.raises(ValueError, match="prepared for QAT; unprepare_moe_qat goes back"):
        convert_moe_training(module)
    assert is_prepared(module[0])
    unprepare_moe_qat(module)
    convert_moe_training(module)
    with pytest.raises(ValueError, match="converted to low-precision training"):
        prepare_moe_qat(module, "int4-g32")
    unconvert(module)
    prepare_moe_qat(module, "int4-g32")
