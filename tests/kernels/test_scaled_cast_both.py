"""The scaled_cast_both op: the bits of two casts, whichever implementation runs."""

import warnings
from itertools import product

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    COLWISE,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    Scaling,
    quantize,
)
from aotrain.kernels import _dispatch, scaled_cast_both
from aotrain.kernels.scaled_cast import _cuda_both
from aotrain.recipes import RECIPES
from aotrain.testing import adversarial_matrix, assert_bitwise_equal

BLOCKS = [TENSORWISE, ROWWISE, COLWISE, BLOCKWISE_1X128, BLOCKWISE_128X128]
SHAPES = [(37, 100), (1, 1), (0, 16), (16, 0), (2, 3, 31), (2, 3, 130, 5)]


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    _dispatch.warn_slow.cache_clear()


def _arguments(scaling: Scaling, scaling_t: Scaling) -> tuple[str | int, ...]:
    return tuple(part for s in (scaling, scaling_t) for part in (s.element.name, s.scale.name, *s.block))


def _on_cpu(x: torch.Tensor, scaling: Scaling, scaling_t: Scaling) -> tuple[torch.Tensor, ...]:
    q, q_t = scaled_cast_both(x, scaling, scaling_t)
    return *q[:2], *q_t[:2]


def _as_on_a_gpu(x: torch.Tensor, scaling: Scaling, scaling_t: Scaling) -> tuple[torch.Tensor, ...]:
    return _cuda_both(x, *_arguments(scaling, scaling_t))


def _assert_two_casts(got: tuple[torch.Tensor, ...], x: torch.Tensor, scaling: Scaling, scaling_t: Scaling) -> None:
    expected = quantize(x.contiguous(), scaling)[:2] + quantize(x.mT.contiguous(), scaling_t)[:2]
    for actual, want, what in zip(got, expected, ("data", "scale", "data_t", "scale_t"), strict=True):
        assert_bitwise_equal(actual.cpu(), want, what=what)
        assert actual.is_contiguous()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("cast", [_on_cpu, _as_on_a_gpu])
@pytest.mark.parametrize(("block", "block_t"), list(product(BLOCKS, repeat=2)), ids=str)
def test_equals_two_casts(cast, block: tuple[int, int], block_t: tuple[int, int]) -> None:
    pair = Scaling(element=FLOAT8_E4M3, block=block), Scaling(element=FLOAT8_E4M3, block=block_t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (adversarial_matrix(37, 100), adversarial_matrix(60, 37).t()):
            _assert_two_casts(cast(x, *pair), x, *pair)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("cast", [_on_cpu, _as_on_a_gpu])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_any_shape(cast, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for block in BLOCKS:
        pair = Scaling(element=INT8, block=block), Scaling(element=INT8, block=block)
        _assert_two_casts(cast(x, *pair), x, *pair)
        _assert_two_casts(cast(x.mT, *pair), x.mT, *pair)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["float8_tensorwise", "float8_rowwise", "float8_blockwise", "int8_rowwise"])
def test_gradients_of_the_recipes_take_one_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from aotrain.kernels.triton import scaled_cast_tiles

    launches = []
    original = scaled_cast_tiles.scaled_cast_tiles
    monkeypatch.setattr(
        scaled_cast_tiles, "scaled_cast_tiles", lambda *args: launches.append(args[1:3]) or original(*args)
    )
    pair = RECIPES[name].grad_input.lhs, RECIPES[name].grad_weight.lhs
    assert pair[0] is not None
    assert pair[1] is not None
    x = torch.randn(40, 36).bfloat16()
    _assert_two_casts(_as_on_a_gpu(x, *pair), x, *pair)
    assert launches == [(pair[0].block, pair[1].block)]


@pytest.mark.parametrize(
    "scaling_t",
    [
        Scaling(element=FLOAT8_E5M2, block=ROWWISE),
        Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["float32_pow2"], block=ROWWISE),
        Scaling(element=FLOAT8_E4M3, block=BLOCKWISE_1X32),
    ],
    ids=["element", "scale", "no-kernel"],
)
def test_what_one_kernel_does_not_do_takes_two_casts(scaling_t: Scaling) -> None:
    # Those of a CPU tensor here; on a GPU each has its kernel, or its own warning that there is none.
    x, scaling = adversarial_matrix(40, 37), Scaling(element=FLOAT8_E4M3, block=ROWWISE)
    for pair in ((scaling, scaling_t), (scaling_t, scaling)):
        _assert_two_casts(_as_on_a_gpu(x, *pair), x, *pair)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t()], ids=["contiguous", "transposed"])
def test_opcheck(block: tuple[int, int], view) -> None:
    x, scaling = view(torch.randn(37, 100)), Scaling(element=FLOAT8_E4M3, block=block)
    torch.library.opcheck(torch.ops.aotrain.scaled_cast_both, (x, *_arguments(scaling, scaling)))


def test_compiles_into_one_graph_with_equal_bits() -> None:
    x, pair = adversarial_matrix(37, 100), (RECIPES["float8_blockwise"].grad_input.lhs,) * 2

    def cast(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _on_cpu(x, *pair)

    _assert_two_casts(torch.compile(cast, fullgraph=True, backend="aot_eager")(x), x, *pair)


def test_outputs_do_not_share_memory() -> None:
    x, scaling = torch.randn(1, 8), Scaling(element=FLOAT8_E4M3)
    data, scale, data_t, scale_t = _on_cpu(x, scaling, scaling)
    assert data.data_ptr() != data_t.data_ptr()
    assert scale.data_ptr() != scale_t.data_ptr()


def test_two_runs_are_equal() -> None:
    x, scaling = adversarial_matrix(37, 100), Scaling(element=FLOAT8_E4M3, block=ROWWISE)
    for first, second in zip(_on_cpu(x, scaling, scaling), _on_cpu(x, scaling, scaling), strict=True):
        assert_bitwise_equal(first, second)


def test_errors_are_those_of_one_cast() -> None:
    nearest = Scaling(element=FLOAT8_E4M3)
    with pytest.raises(ValueError, match="rounds to nearest"):
        scaled_cast_both(torch.randn(2, 2), nearest, Scaling(element=FLOAT8_E4M3, rounding="stochastic"))
    for cast in (_on_cpu, _as_on_a_gpu):
        with pytest.raises(TypeError, match="float64"):
            cast(torch.randn(4, 32, dtype=torch.float64), nearest, nearest)
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            cast(torch.randn(32), nearest, nearest)


@pytest.mark.gpu
@pytest.mark.parametrize(("block", "block_t"), [(b, b) for b in BLOCKS] + [(TENSORWISE, BLOCKWISE_1X128)], ids=str)
def test_on_a_gpu(block: tuple[int, int], block_t: tuple[int, int]) -> None:
    pair = Scaling(element=FLOAT8_E4M3, block=block), Scaling(element=FLOAT8_E4M3, block=block_t)
    for shape in SHAPES:
        for x in (torch.randn(shape), torch.randn(shape).mT):
            _assert_two_casts(_on_cpu(x.cuda(), *pair), x, *pair)
