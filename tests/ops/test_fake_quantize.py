"""Fake quantization: values of the codes, straight-through gradients, and nothing kept for backward but the tensors."""

from dataclasses import replace

import pytest
import torch

from aotrain.ops.fake_quantize import fake_quantize, fake_quantized_linear
from aotrain.quantization import SCHEMES
from aotrain.quantization.schemes import AffineScheme

linear = torch.nn.functional.linear


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 256), (128, 256), (128,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return x, weight, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCHEMES)
def test_linear_is_that_of_fake_quantized_operands(name: str, dtype: torch.dtype):
    scheme, (x, weight, bias) = SCHEMES[name], operands(dtype)
    output = fake_quantized_linear(x, weight, bias, scheme.activation, scheme.weight)
    quantized = x if scheme.activation is None else fake_quantize(x, scheme.activation)
    want = linear(quantized, fake_quantize(weight, scheme.weight), bias)
    assert torch.equal(output, want)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(output, (x, weight, bias), grad)
    for mine, theirs in zip(got, torch.autograd.grad(want, (x, weight, bias), grad), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_pass_straight_but_for_what_saturates(name: str):
    scheme, (_, weight, _) = SCHEMES[name].weight, operands()
    if isinstance(scheme, AffineScheme):
        scheme = replace(scheme, scale_gradient=False)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 1e-6
    (got,) = torch.autograd.grad(fake_quantize(weight, scheme), weight, grad)
    passed = got == grad
    assert (passed | (got == 0)).all()
    # A symmetric scale of amax / 7.5 lets the largest elements of a group saturate, at most one in a few.
    assert passed.float().mean() > (0.85 if name.startswith("int2") else 0.95)


def test_only_input_and_weight_are_saved():
    x, weight, bias = operands()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.data_ptr()), lambda tensor: tensor
    ):
        fake_quantized_linear(x, weight, bias, SCHEMES["8da4w"].activation, SCHEMES["8da4w"].weight)
    assert saved == [x.data_ptr(), weight.data_ptr()]


def test_under_autocast_the_product_is_narrow_and_gradients_wide():
    x, weight, bias = operands()
    scheme = SCHEMES["int4-g32-a8"]
    with torch.autocast("cpu", torch.bfloat16):
        output = fake_quantized_linear(x, weight, bias, scheme.activation, scheme.weight)
        want = linear(fake_quantize(x, scheme.activation), fake_quantize(weight, scheme.weight), bias)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, want)
    output.sum().backward()
    assert {x.grad.dtype, weight.grad.dtype, bias.grad.dtype} == {torch.float32}


def test_a_vector_is_a_row():
    x, weight, bias = operands()
    row = x[0, 0]
    scheme = SCHEMES["int8"]
    one = fake_quantized_linear(row, weight, bias, scheme.activation, scheme.weight)
    assert torch.equal(one, fake_quantized_linear(row[None], weight, bias, scheme.activation, scheme.weight)[0])


@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize("name", ["int4-g32", "8da4w", "int2-g32", "nvfp4", "fp8"])
def test_compiles_into_one_graph_once(name: str):
    torch.compiler.reset()
    scheme, graphs = SCHEMES[name], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layer(x, weight, bias):
        return fake_quantized_linear(x, weight, bias, scheme.activation, scheme.weight)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    counted = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        x, weight, bias = operands(torch.bfloat16)
        grad = torch.ones(2, 5, 128, dtype=torch.bfloat16)
        want = layer(x, weight, bias)
        got = compiled(x, weight, bias)
        assert torch.equal(got, want)
        for mine, theirs in zip(
            torch.autograd.grad(got, (x, weight, bias), grad),
            torch.autograd.grad(want, (x, weight, bias), grad),
            strict=True,
        ):
            assert torch.equal(mine, theirs)
        counted(x, weight, bias)
    assert len(graphs) == 1
