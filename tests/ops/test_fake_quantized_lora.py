"""A linear layer on the fake-quantized sum of weight and adapter: its definition, its gradients, what it keeps."""

from dataclasses import replace

import pytest
import torch

from aotrain.ops.fake_quantize import fake_quantize
from aotrain.ops.fake_quantized_lora import fake_quantized_lora, merged_weight
from aotrain.quantization import SCHEMES, Scheme
from aotrain.testing import sqnr

linear = torch.nn.functional.linear
SCALING = 2.0
# Gradients of the factors against autograd, which makes the gradient [N, K] first and rounds it: dB measured. Measured
# on these operands: at least 130 in float32, 48 in bfloat16, 67 in float16.
GRADIENT_DB = {torch.float32: 120, torch.bfloat16: 42, torch.float16: 58}


def operands(dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None) -> list[torch.Tensor]:
    """x, weight, bias, lora_a, lora_b."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 256), (128, 256), (128,), (8, 256), (128, 8))
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    dtypes = (dtype, dtype, dtype, adapter or dtype, adapter or dtype)
    return [(tensor * 0.3).to(each).requires_grad_() for tensor, each in zip(made, dtypes, strict=True)]


class _PassAll:
    """A weight quantizer without its mask, as the layer takes it."""

    def __init__(self, scheme: object) -> None:
        self.scheme = scheme

    def values(self, x: torch.Tensor) -> torch.Tensor:
        return self.scheme.values(x)

    def pass_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return grad


def by_autograd(scheme: Scheme, x, weight, bias, lora_a, lora_b) -> torch.Tensor:
    delta = (lora_b.float() @ lora_a.float()) * SCALING
    merged = (weight.float() + delta).to(weight.dtype)
    quantized = x if scheme.activation is None else fake_quantize(x, scheme.activation)
    return linear(quantized, fake_quantize(merged, _PassAll(scheme.weight)), bias)


def layer(scheme: Scheme, x, weight, bias, lora_a, lora_b) -> torch.Tensor:
    return fake_quantized_lora(x, weight, bias, lora_a, lora_b, SCALING, scheme.activation, scheme.weight)


@pytest.mark.parametrize("dtype", GRADIENT_DB)
@pytest.mark.parametrize("name", SCHEMES)
def test_is_autograd_of_the_quantized_sum(name: str, dtype: torch.dtype):
    tensors = operands(dtype)
    output, want = layer(SCHEMES[name], *tensors), by_autograd(SCHEMES[name], *tensors)
    assert torch.equal(output, want)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, wanted = (torch.autograd.grad(each, tensors, grad) for each in (output, want))
    for mine, theirs in zip(got[:3], wanted[:3], strict=True):  # x, weight, bias: the same products
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(got[3:], wanted[3:], strict=True):
        assert mine.dtype == dtype
        assert sqnr(theirs, mine) >= GRADIENT_DB[dtype]


def test_the_mask_of_the_weight_is_all_that_differs_from_plain_autograd():
    """Elements that saturate at int2 get a gradient here, and none by autograd of the masked quantizer."""
    scheme = SCHEMES["int2-g32"]
    x, weight, bias, lora_a, lora_b = operands()
    merged = merged_weight(weight, lora_a, lora_b, SCALING).detach().requires_grad_()
    constant_scales = replace(scheme.weight, scale_gradient=False)
    output = linear(x, fake_quantize(merged, constant_scales), bias)
    (masked,) = torch.autograd.grad(output.sum(), merged)
    (mine,) = torch.autograd.grad(layer(scheme, x, weight, bias, lora_a, lora_b).sum(), weight)
    stopped = (masked == 0) & (mine != 0)
    assert 0 < stopped.float().mean() < 0.15
    assert torch.equal(mine[~stopped], masked[~stopped])


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_merged_weight_is_rounded_once(adapter: torch.dtype):
    _, weight, _, lora_a, lora_b = operands(torch.bfloat16, adapter)
    exact = weight.double() + SCALING * lora_b.double() @ lora_a.double()
    merged = merged_weight(weight, lora_a, lora_b, SCALING)
    assert merged.dtype == torch.bfloat16
    nearest = exact.to(torch.bfloat16)
    # The float32 product may fall on the other side of a tie.
    assert (merged != nearest).float().mean() < 1e-3
    zero = torch.zeros_like(lora_b)
    assert torch.equal(merged_weight(weight, lora_a, zero, SCALING), weight)


def test_only_input_and_parameters_are_saved():
    x, weight, bias, lora_a, lora_b = operands()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each.data_ptr()), lambda each: each):
        layer(SCHEMES["8da4w"], x, weight, bias, lora_a, lora_b)
    assert saved == [each.data_ptr() for each in (x, weight, lora_a, lora_b)]


def test_no_gradient_of_the_weights_size_is_made():
    """With a frozen weight the largest matrix that backward makes besides the weight's values is the input's."""
    _, _, _, lora_a, lora_b = operands()
    x, weight = torch.randn(4, 256, requires_grad=True), torch.randn(128, 256)
    output = layer(SCHEMES["int4-g32"], x, weight, None, lora_a, lora_b)

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        shapes: list[torch.Size] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                self.shapes.append(out.shape)
            return out

    with Products() as products:
        output.sum().backward()
    # Merging again, grad_input, grad_a and grad_b with their narrow products.
    wanted = [(128, 256), (4, 256), (4, 8), (8, 256), (4, 8), (128, 8)]
    assert [tuple(shape) for shape in products.shapes] == wanted


def test_frozen_parts_get_no_gradient():
    x, weight, bias, lora_a, lora_b = operands()
    for tensor in (weight, bias, lora_a):
        tensor.requires_grad_(False)
    layer(SCHEMES["int4-g32"], x, weight, bias, lora_a, lora_b).sum().backward()
    assert [each.grad is not None for each in (x, weight, bias, lora_a, lora_b)] == [True, False, False, False, True]


def test_under_autocast_the_product_is_narrow_and_the_merge_is_not():
    x, weight, bias, lora_a, lora_b = operands()
    scheme = SCHEMES["int4-g32-a8"]
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(scheme, x, weight, bias, lora_a, lora_b)
    merged = merged_weight(weight, lora_a, lora_b, SCALING)
    values = scheme.activation.values(x).bfloat16(), scheme.weight.values(merged).bfloat16(), bias.bfloat16()
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, linear(*values))
    output.sum().backward()
    assert {each.grad.dtype for each in (x, weight, bias, lora_a, lora_b)} == {torch.float32}


def test_half_precision_weight_with_a_float32_adapter():
    tensors = operands(torch.bfloat16, torch.float32)
    output = layer(SCHEMES["int4-g32"], *tensors)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert [each.grad.dtype for each in tensors] == [torch.bfloat16] * 3 + [torch.float32] * 2


def test_switched_off_it_is_the_merged_layer():
    tensors = operands()
    x, weight, bias, lora_a, lora_b = tensors
    off = Scheme("", None)
    assert torch.equal(layer(off, *tensors), linear(x, merged_weight(weight, lora_a, lora_b, SCALING), bias))


def test_a_vector_and_no_rows():
    x, *rest = operands()
    scheme = SCHEMES["int8"]
    assert torch.equal(layer(scheme, x[0, 0], *rest), layer(scheme, x[0, :1], *rest)[0])
    output = layer(scheme, x[:0], *rest)
    output.sum().backward()
    assert output.shape == (0, 5, 128)
    assert not rest[2].grad.any()


def test_compiled_is_eager():
    torch.compiler.reset()
    tensors = operands()
    scheme = SCHEMES["int4-g32-a8"]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output, want = compiled(scheme, *tensors), layer(scheme, *tensors)
    assert torch.equal(output, want)
    for mine, theirs in zip(*(torch.autograd.grad(each.sum(), tensors) for each in (output, want)), strict=True):
        assert torch.equal(mine, theirs)


def test_factors_that_do_not_fit_are_refused():
    x, weight, bias, lora_a, lora_b = operands()
    with pytest.raises(ValueError, match=r"lora_b \(64, 8\); want \[r, 256\] and \[128, r\]"):
        layer(SCHEMES["int8"], x, weight, bias, lora_a, lora_b[:64])
