"""fake_quantized_grouped_mm: bit for bit one fake_quantized_linear per group, of any size, stored either way."""

import pytest
import torch

from aotrain.ops import scaled_grouped_mm
from aotrain.ops.fake_quantize import fake_quantized_linear
from aotrain.ops.fake_quantized_grouped_mm import FakeQuantizedMethod, fake_quantized_grouped_mm
from aotrain.quantization import SCHEMES, Scheme
from aotrain.testing import assert_bitwise_equal

# Group sizes; the rows beyond their sum belong to no group.
GROUPS = {"ragged": ([5, 0, 37, 1], 43), "tail": ([17, 3, 20], 64), "empty": ([0, 0], 9), "no-rows": ([0, 0], 0)}
K, N = 128, 160


def operands(sizes: list[int], rows: int, dtype: torch.dtype = torch.bfloat16, transposed: bool = True):
    """x, weight [E, K, N] as the view of an [E, N, K] parameter or stored so, offsets, gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, K, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(len(sizes), N, K, generator=generator) * 0.1).to(dtype).mT
    weight = (weight if transposed else weight.contiguous()).requires_grad_()
    offsets = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return x, weight, offsets, torch.randn(rows, N, generator=generator).to(dtype)


def run(scheme: Scheme, x, weight, offsets, grad, bias=None) -> list[torch.Tensor]:
    y = fake_quantized_grouped_mm(x, weight, offsets, scheme.activation, scheme.weight, bias=bias)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def one_layer_per_group(scheme: Scheme, x, weight, offsets, grad, bias=None) -> list[torch.Tensor]:
    """The definition."""
    starts, outputs, grads_x, grads_w, grads_b = [0, *offsets.tolist()], [], [], [], []
    for group in range(len(offsets)):
        rows = slice(starts[group], starts[group + 1])
        leaves = [x[rows].detach().requires_grad_(), weight[group].detach().t().contiguous().requires_grad_()]
        leaves += [] if bias is None else [bias[group].detach().requires_grad_()]
        layer_bias = leaves[2] if bias is not None else None
        y = fake_quantized_linear(*leaves[:2], None, scheme.activation, scheme.weight)
        y = y if layer_bias is None else y + layer_bias
        got = torch.autograd.grad(y, leaves, grad[rows])
        outputs.append(y.detach())
        grads_x.append(got[0])
        grads_w.append(got[1].t())
        grads_b += got[2:]
    tail = len(x) - starts[-1]
    results = [
        torch.cat([*outputs, x.new_zeros(tail, N)]).detach(),
        torch.cat([*grads_x, x.new_zeros(tail, K)]).detach(),
        torch.stack(grads_w),
    ]
    return results if bias is None else [*results, torch.stack(grads_b)]


def check(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    names = ("output", "grad_input", "grad_weight", "grad_bias")
    for name, mine, theirs in zip(names, got, want, strict=False):
        assert_bitwise_equal(mine + 0, theirs + 0, what=name)  # -0 + 0 is 0


@pytest.mark.parametrize("transposed", [True, False], ids=["ENK", "EKN"])
@pytest.mark.parametrize("name", SCHEMES)
def test_is_one_layer_per_group(name: str, transposed: bool):
    arguments = operands(*GROUPS["ragged"], transposed=transposed)
    check(run(SCHEMES[name], *arguments), one_layer_per_group(SCHEMES[name], *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_of_any_size_and_dtype(groups: str, dtype: torch.dtype):
    arguments = operands(*GROUPS[groups], dtype=dtype)
    check(run(SCHEMES["int4-g32-a8"], *arguments), one_layer_per_group(SCHEMES["int4-g32-a8"], *arguments))


def test_a_bias_per_group():
    arguments = (*operands(*GROUPS["ragged"]), torch.randn(4, N, dtype=torch.bfloat16, requires_grad=True))
    got, want = run(SCHEMES["8da4w"], *arguments), one_layer_per_group(SCHEMES["8da4w"], *arguments)
    check(got[:3], want[:3])
    assert_bitwise_equal(got[3][[0, 1, 3]], want[3][[0, 1, 3]])  # sums of few rows round once either way


def test_rows_beyond_the_groups_do_not_matter():
    x, weight, offsets, grad = operands(*GROUPS["tail"])
    want = run(SCHEMES["int8"], x, weight, offsets, grad)
    with torch.no_grad():
        x[40:] = float("nan")
        grad[40:] = float("nan")
    got = run(SCHEMES["int8"], x, weight, offsets, grad)
    check(got, want)
    assert not got[0][40:].any()
    assert not got[1][40:].any()


def test_only_tokens_and_weights_are_saved():
    x, weight, offsets, _ = operands(*GROUPS["ragged"])
    scheme = SCHEMES["int4-g32-a8"]

    def saved(*leaves: torch.Tensor, activation=scheme.activation) -> list[int]:
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: found.append(each) or each, lambda each: each):
            fake_quantized_grouped_mm(*leaves, offsets, activation, scheme.weight)
        return [each.data_ptr() for each in found if each.is_floating_point()]

    assert saved(x, weight) == [x.data_ptr(), weight.data_ptr()]
    assert saved(x.detach(), weight) == [x.data_ptr(), weight.data_ptr()]
    assert saved(x, weight.detach(), activation=None) == [weight.data_ptr()]


def test_under_autocast_quantization_is_of_what_comes():
    x, weight, offsets, _ = operands(*GROUPS["ragged"], dtype=torch.float32)
    scheme = SCHEMES["int4-g32-a8"]
    with torch.autocast("cpu", torch.bfloat16):
        y = fake_quantized_grouped_mm(x, weight, offsets, scheme.activation, scheme.weight)
    assert y.dtype == torch.bfloat16
    values = scheme.weight.values(weight[2].t()).bfloat16()
    assert torch.equal(y[5:42], torch.nn.functional.linear(scheme.activation.values(x[5:42]).bfloat16(), values))
    y.float().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


class Switch:
    def __init__(self, scheme: object) -> None:
        self.scheme, self.enabled = scheme, True

    def arithmetic(self, x: torch.Tensor) -> object:
        return self.scheme if self.enabled else None


def test_a_method_asks_its_switches_on_every_call():
    x, weight, offsets, grad = operands(*GROUPS["ragged"])
    scheme = SCHEMES["int4-g32-a8"]
    method = FakeQuantizedMethod(Switch(scheme.activation), Switch(scheme.weight))
    want = run(scheme, x, weight, offsets, grad)[0]
    assert torch.equal(scaled_grouped_mm(x, weight, offsets, method), want)
    method.weight.enabled = method.activation.enabled = False
    plain = scaled_grouped_mm(x, weight, offsets, method)
    assert torch.equal(plain[5:42], x[5:42] @ weight[2])
    assert torch.equal(plain, scaled_grouped_mm(x, weight, offsets, FakeQuantizedMethod(None, None)))


def test_weights_that_do_not_fit_are_refused():
    x, weight, offsets, _ = operands(*GROUPS["ragged"])
    scheme = SCHEMES["int4-g32"]
    with pytest.raises(ValueError, match="want x \\[M, K\\]"):
        fake_quantized_grouped_mm(x[:, :64], weight, offsets, None, scheme.weight)
    with pytest.raises(ValueError, match="32"):
        fake_quantized_grouped_mm(x[:, :40], weight[:, :40], offsets, None, scheme.weight)
