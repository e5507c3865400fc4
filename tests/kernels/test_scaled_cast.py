"""The scaled_cast op: schema, fake, every scaling, awkward shapes, and which implementation a GPU tensor takes."""

import warnings
from functools import partial

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    COLWISE,
    ELEMENT_FORMATS,
    FLOAT8_E4M3,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    Scaling,
    quantize,
    scale_shape,
)
from aotrain.kernels import _dispatch, scaled_cast, scaled_cast_both
from aotrain.kernels.scaled_cast import _capability, _cuda
from aotrain.recipes import RECIPES
from aotrain.testing import adversarial_matrix, assert_bitwise_equal

BLOCKS = [TENSORWISE, ROWWISE, COLWISE, BLOCKWISE_1X32, BLOCKWISE_128X128]
KERNEL_BLOCKS = [TENSORWISE, ROWWISE, COLWISE, BLOCKWISE_1X128, BLOCKWISE_128X128]
SCALINGS = [
    Scaling(element=element, scale=scale, block=block)
    for element in ELEMENT_FORMATS.values()
    for scale in SCALE_FORMATS.values()
    for block in BLOCKS
]
ROWWISE_E4M3 = Scaling(element=FLOAT8_E4M3, block=ROWWISE)
SHAPES = [(37, 100), (1, 1), (0, 16), (16, 0), (2, 3, 31)]


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    _dispatch.warn_slow.cache_clear()


def _assert_quantizes(x: torch.Tensor, scaling: Scaling) -> None:
    actual, expected = scaled_cast(x, scaling), quantize(x, scaling)
    assert_bitwise_equal(actual.data, expected.data, what="data")
    assert_bitwise_equal(actual.scale, expected.scale, what="scale")
    assert actual.data.is_contiguous()


def _call_cuda(x: torch.Tensor, scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor]:
    return _cuda(x, scaling.element.name, scaling.scale.name, *scaling.block)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_equals_the_definition(scaling: Scaling) -> None:
    _assert_quantizes(adversarial_matrix(37, 100), scaling)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_tails_and_empty_dimensions(block: tuple[int, int], shape: tuple[int, ...]) -> None:
    scaling = Scaling(element=FLOAT8_E4M3, block=block)
    x = torch.randn(shape)
    _assert_quantizes(x, scaling)
    assert scaled_cast(x, scaling).scale.shape == scale_shape(shape, block)


def test_non_contiguous_input() -> None:
    x = adversarial_matrix(64, 48)
    for view in (x.t(), x[::2], x[:, 5:], x[:1].expand(4, -1)):
        _assert_quantizes(view, ROWWISE_E4M3)


def test_two_runs_are_equal() -> None:
    x = adversarial_matrix(37, 100)
    first, second = scaled_cast(x, ROWWISE_E4M3), scaled_cast(x, ROWWISE_E4M3)
    assert_bitwise_equal(first.data, second.data)
    assert_bitwise_equal(first.scale, second.scale)


@pytest.mark.parametrize("block", [TENSORWISE, ROWWISE, BLOCKWISE_1X32], ids=str)
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t()], ids=["contiguous", "transposed"])
def test_opcheck(block: tuple[int, int], view) -> None:
    x = view(torch.randn(37, 100))
    torch.library.opcheck(torch.ops.aotrain.scaled_cast, (x, "float8_e4m3fn", "float32", *block))
    amax = torch.rand(scale_shape(x.shape, block))
    torch.library.opcheck(torch.ops.aotrain.scaled_cast, (x, "float8_e4m3fn", "float32", *block, amax))
    torch.library.opcheck(torch.ops.aotrain.scaled_cast, (x, "float8_e4m3fn", "float32", *block, amax, (16, 128)))


def test_compiles_into_one_graph_with_equal_bits() -> None:
    x = adversarial_matrix(37, 100)
    compiled = torch.compile(lambda x: tuple(scaled_cast(x, ROWWISE_E4M3)[:2]), fullgraph=True, backend="aot_eager")
    data, scale = compiled(x)
    expected = quantize(x, ROWWISE_E4M3)
    assert_bitwise_equal(data, expected.data)
    assert_bitwise_equal(scale, expected.scale)


def test_stochastic_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds to nearest"):
        scaled_cast(torch.randn(2, 2), Scaling(element=FLOAT8_E4M3, rounding="stochastic"))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 130, 5)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("transposed", [False, True], ids=["row-major", "column-major"])
@pytest.mark.parametrize("block", KERNEL_BLOCKS, ids=str)
def test_gpu_implementation_runs_the_kernel_on_any_shape(
    block: tuple[int, int], transposed: bool, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape).mT if transposed else torch.randn(shape)
    scaling = Scaling(element=FLOAT8_E4M3, block=block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data, scale = _call_cuda(x, scaling)
    expected = quantize(x.contiguous(), scaling)
    assert_bitwise_equal(data, expected.data)
    assert_bitwise_equal(scale, expected.scale)
    assert data.is_contiguous()
    assert scale.is_contiguous()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("mx")])
def test_gpu_implementation_has_a_kernel_for_every_cast_of_the_recipe(name: str) -> None:
    x = torch.randn(40, 36).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for gemm in (RECIPES[name].output, RECIPES[name].grad_input, RECIPES[name].grad_weight):
            for scaling in filter(None, (gemm.lhs, gemm.rhs)):
                for operand in (x, x.t()):
                    assert_bitwise_equal(_call_cuda(operand, scaling)[0], quantize(operand.contiguous(), scaling).data)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 130, 5)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("block", KERNEL_BLOCKS, ids=str)
def test_given_amax_replaces_that_of_the_blocks(block: tuple[int, int], shape: tuple[int, ...]) -> None:
    scaling = Scaling(element=FLOAT8_E4M3, block=block)
    for x in (torch.randn(shape), torch.randn(shape).mT):
        amax = torch.rand(scale_shape(x.shape, block)) * 4
        expected = quantize(x.contiguous(), scaling, amax=amax)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gpu = _cuda(x, scaling.element.name, scaling.scale.name, *block, amax)
        for data, scale in (gpu, scaled_cast(x, scaling, amax=amax)[:2]):
            assert_bitwise_equal(data, expected.data)
            assert_bitwise_equal(scale, expected.scale)
            assert data.is_contiguous()


def test_given_amax_of_another_shape_or_dtype_is_refused() -> None:
    x = torch.randn(4, 32)
    for amax in (torch.ones(4), torch.ones(4, 2), torch.ones(4, 1, dtype=torch.float64)):
        with pytest.raises(ValueError, match="want shape"):
            scaled_cast(x, ROWWISE_E4M3, amax=amax)
        with pytest.raises(ValueError, match="want shape"):
            _cuda(x, "float8_e4m3fn", "float32", *ROWWISE, amax)


@pytest.mark.parametrize("pad", [(0, 16), (16, 129), (16,)], ids=str)
def test_bad_multiples_are_refused(pad: tuple[int, ...]) -> None:
    for cast in (partial(scaled_cast, pad=pad), partial(scaled_cast_both, scaling_t=ROWWISE_E4M3, pad_t=pad)):
        with pytest.raises(ValueError, match="each from 1 to 128"):
            cast(torch.randn(4, 32), scaling=ROWWISE_E4M3)


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        (Scaling(element=FLOAT8_E4M3, block=BLOCKWISE_1X32), r"blocks of \(1, 32\)"),
        (Scaling(element=ELEMENT_FORMATS["float8_e4m3fnuz"], block=ROWWISE), "float8_e4m3fnuz"),
        (Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["e8m0_floor"], block=ROWWISE), "e8m0_floor scales"),
    ],
    ids=["block", "element", "scale"],
)
def test_gpu_implementation_without_a_kernel_warns_once(scaling: Scaling, reason: str) -> None:
    x = torch.randn(4, 32)
    with pytest.warns(UserWarning, match=f"aotrain::scaled_cast .*slower.*{reason}"):
        data, _ = _call_cuda(x, scaling)
    assert_bitwise_equal(data, quantize(x, scaling).data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _call_cuda(x, scaling)


def test_gpu_implementation_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="triton is not installed"):
        _call_cuda(torch.randn(4, 32), ROWWISE_E4M3)


def test_gpu_implementation_rejects_what_the_definition_rejects() -> None:
    with pytest.raises(TypeError, match="float64"):
        _call_cuda(torch.randn(4, 32, dtype=torch.float64), ROWWISE_E4M3)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        _call_cuda(torch.randn(32), ROWWISE_E4M3)


def test_float8_kernels_need_ada_and_int8_kernels_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, problems in (((8, 9), (False, False)), ((8, 0), (True, False)), ((7, 5), (True, True))):
        _dispatch._cuda_problem.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        for element, problem in zip(("float8_e4m3fn", "int8"), problems, strict=True):
            reason = _dispatch.triton_problem(torch.device("cuda", 0), _capability(element))
            assert (reason is not None) == problem
    assert "A100 has compute capability 7.5, the kernel needs 8.0" in str(reason)
    _dispatch._cuda_problem.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("block", KERNEL_BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_on_a_gpu(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    x, scaling = torch.randn(shape), Scaling(element=FLOAT8_E4M3, block=block)
    for operand in (x, x.mT):
        actual, expected = scaled_cast(operand.cuda(), scaling), quantize(operand.contiguous(), scaling)
        assert_bitwise_equal(actual.data.cpu(), expected.data)
        assert_bitwise_equal(actual.scale.cpu(), expected.scale)
