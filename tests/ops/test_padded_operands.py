"""On a GPU the casts of a layer write the padding that its products need, and nothing else pads.

torch's fake CUDA kernels check strides and multiples of 16 as the real ones do; they need no GPU.
"""

from collections import Counter
from importlib import import_module
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from aotrain.kernels._padding import native_multiples
from aotrain.kernels.scaled_mm import _int8, _native, _native_blocks
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.ops import scaled_linear
from aotrain.ops.scaled_linear import _Options, _ScaledLinear, cast_operand, cast_weight
from aotrain.recipes import RECIPES
from aotrain.testing import assert_bitwise_equal

SHAPES = [(37, 100, 50), (1, 17, 16), (5, 130, 257), (128, 256, 384)]  # M, K, N
_LAYER = import_module("aotrain.ops.scaled_linear")
_CODES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


class _NativeOps(TorchDispatchMode):
    """Runs each scaled product as on a GPU with the hardware for it, and counts what is done to codes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.of_codes: Counter[str] = Counter()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aotrain.scaled_mm.default:
            self.products += 1
            a, a_scale, a_block, b, b_scale, b_block, _, out_dtype, fast_accum, _ = args
            with self:
                if a.dtype == torch.int8:
                    return _int8(a, a_scale, b, b_scale, out_dtype)
                if tuple(a_block) == (1, 128):
                    return _native_blocks(a, a_scale, b, b_scale, tuple(b_block), out_dtype)
                return _native(a, a_scale, b, b_scale, out_dtype, fast_accum)
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if tensors and tensors[0].dtype in _CODES:
            self.of_codes[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class _Context:
    """What autograd gives; its engine does not run without the device."""

    needs_input_grad = (True, True, False)
    saved_tensors: tuple[torch.Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


def _train_on_a_fake_gpu(name: str, m: int, k: int, n: int, save_for_backward: str) -> _NativeOps:
    options = _Options(RECIPES[name], False, save_for_backward, cast_weight, cast_operand)
    with FakeTensorMode(), _NativeOps() as ops:
        x = torch.empty(m, k, device="cuda", dtype=torch.bfloat16)
        w = torch.empty(n, k, device="cuda", dtype=torch.bfloat16)
        context = _Context()
        y = _ScaledLinear.forward(context, x, w, options)
        grad_input, grad_weight, _ = _ScaledLinear.backward(context, torch.empty_like(y))
        assert [result.shape for result in (y, grad_input, grad_weight)] == [(m, n), (m, k), (n, k)]
        assert all(result.is_contiguous() for result in (y, grad_input, grad_weight))
    return ops


@pytest.mark.parametrize("save_for_backward", ["high_precision", "quantized"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
def test_codes_go_from_cast_to_product_as_they_are(name: str, shape, save_for_backward: str) -> None:
    ops = _train_on_a_fake_gpu(name, *shape, save_for_backward)
    assert ops.products == sum(
        gemm.quantized for gemm in (RECIPES[name].output, RECIPES[name].grad_input, RECIPES[name].grad_weight)
    )
    # Views and questions besides the products.
    assert set(ops.of_codes) <= {"t", "narrow", "device", "_scaled_mm", "_scaled_mm_v2", "_int_mm", "detach"}, (
        ops.of_codes
    )


def test_without_the_multiples_codes_are_padded_in_a_pass_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would miss is not missed."""
    monkeypatch.setattr(_LAYER, "operand_multiples", lambda x, scaling, side: (1, 1))
    assert _train_on_a_fake_gpu("float8_rowwise", 37, 100, 50, "high_precision").of_codes["pad"] == 6


def _on_cpu(name: str, m: int, k: int, n: int, save_for_backward: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Sums of so few, small integers are exact in any order.
    x, w, grad = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((m, k), (n, k), (m, n)))
    x.requires_grad_()
    w.requires_grad_()
    y = scaled_linear(x, w, None, RECIPES[name], save_for_backward=save_for_backward)
    return [y.detach(), *torch.autograd.grad(y, (x, w), grad)]


@pytest.mark.parametrize("padded_side", ["both", "lhs", "rhs"])
@pytest.mark.parametrize("save_for_backward", ["high_precision", "quantized"])
@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
def test_padding_changes_no_bit(
    name: str, save_for_backward: str, padded_side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one operand comes padded and the other, such as a gathered weight, does not."""
    expected = _on_cpu(name, 37, 100, 50, save_for_backward)

    def multiples(x, scaling, side):
        if padded_side not in ("both", side):
            return 1, 1
        return native_multiples(x.shape[0], scaling.element.name == "int8", scaling.block, side)

    monkeypatch.setattr(_LAYER, "operand_multiples", multiples)
    for got, want in zip(_on_cpu(name, 37, 100, 50, save_for_backward), expected, strict=True):
        assert_bitwise_equal(got, want)
