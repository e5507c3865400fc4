"""Products of groups: the loop, torch's grouped products, and the Triton kernels, each against dequantized operands."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aotrain.formats import (
    BLOCKWISE_1X32,
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    ScaledTensor,
    Scaling,
    dequantize,
    quantize,
)
from aotrain.kernels import _grouped_mm_cuda as cuda
from aotrain.kernels import scaled_grouped_mm as module
from aotrain.kernels.grouped_cast import grouped_cast, grouped_cast_t
from aotrain.kernels.groups import GroupLayout, group_bounds, group_layout
from aotrain.testing import assert_bitwise_equal, sqnr

# As for scaled_mm: only the result is rounded. Measured 54-57 dB for bfloat16, 130 dB and more for float32.
SQNR_DB = {torch.bfloat16: 48.0, torch.float32: 120.0, torch.float16: 66.0}
SIZES = {
    "ragged": ([5, 0, 37, 1], 43),
    "tail": ([17, 3, 130], 170),
    "one-has-all": ([0, 45, 0], 45),
    "empty": ([0, 0], 9),
}
E8M0 = "e8m0_rceil"
# Of both operands of a product with E matrices; a and b of one that contracts rows.
ROWS_BLOCKS = [
    (ROWWISE, ROWWISE),
    (ROWWISE, TENSORWISE),
    (BLOCKWISE_1X128, BLOCKWISE_128X128),
    (BLOCKWISE_1X128, BLOCKWISE_1X128),
]
CONTRACTED_BLOCKS = [ROWWISE, BLOCKWISE_1X128]


def scaling_of(block, element=FLOAT8_E4M3, scale: str = "float32_pow2") -> Scaling:
    return Scaling(element=element, scale=SCALE_FORMATS[scale], block=block)


def layout_of(sizes: list[int], rows: int, align: int = 128, device: str = "cpu") -> GroupLayout:
    return group_layout(torch.tensor(sizes, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32), rows, align)


def spread(rows: int, columns: int) -> torch.Tensor:
    """Rows, and every 128 columns, have a magnitude of their own, so that a scale in the wrong place shows."""
    return torch.exp2(torch.arange(rows)[:, None] % 5 * 2.0 + torch.arange(columns)[None, :] // 128 * 3.0)


def rows_operands(sizes, rows, k, n, scaling_a, scaling_b, device="cpu"):
    layout = layout_of(sizes, rows, device=device)
    a = grouped_cast((torch.randn(rows, k) * spread(rows, k)).to(device), layout, scaling_a)
    b = quantize((torch.randn(len(sizes), n, k) / spread(n, k)).to(device), scaling_b)
    return a, b, layout


def rows_product(a: ScaledTensor, b: ScaledTensor, layout: GroupLayout) -> torch.Tensor:
    """float64 [M, N] of the dequantized operands, zero in rows of no group."""
    lhs, rhs = dequantize(a).double(), dequantize(b).double()
    want = lhs.new_zeros(lhs.shape[0], rhs.shape[1])
    for group, (start, end) in enumerate(group_bounds(layout.ends, layout.rows)):
        want[start:end] = lhs[start:end] @ rhs[group].t()
    return want


def contracted_operands(sizes, rows, k, n, scaling, align=128, device="cpu"):
    layout = layout_of(sizes, rows, align, device)
    sources = [torch.randn(rows, n) * spread(n, rows).t(), torch.randn(rows, k) / spread(k, rows).t()]
    a, b = (grouped_cast_t(x.to(device), layout, scaling) for x in sources)
    return a, b, layout


def contracted_product(a: ScaledTensor, b: ScaledTensor, layout: GroupLayout) -> torch.Tensor:
    """float64 [E, N, K] of the dequantized operands."""
    results = []
    for group, (start, end) in enumerate(group_bounds(layout.padded_ends, layout.padded_rows)):
        lhs, rhs = (dequantize(module._columns(q, group, start, end - start)).double() for q in (a, b))
        results.append(lhs @ rhs.t())
    return torch.stack(results)


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert not got[want == 0].any()
    if want.any():
        assert sqnr(want, got) >= SQNR_DB[dtype]


@pytest.mark.parametrize("dtype", SQNR_DB, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_is_the_product_of_the_dequantized_operands(name: str, dtype: torch.dtype):
    for blocks in ROWS_BLOCKS:
        a, b, layout = rows_operands(*SIZES[name], 150, 70, *map(scaling_of, blocks))
        assert_close(module.scaled_grouped_mm(a, b, layout, dtype), rows_product(a, b, layout), dtype)
    for block in CONTRACTED_BLOCKS:
        a, b, layout = contracted_operands(*SIZES[name], 70, 33, scaling_of(block))
        got = module.scaled_grouped_mm_contracted(a, b, layout, dtype)
        assert_close(got, contracted_product(a, b, layout), dtype)


class TestTorchsGroupedProducts:
    """What a GPU runs through torch._grouped_mm, which CPUs have too."""

    @pytest.mark.parametrize("name", SIZES)
    @pytest.mark.parametrize(
        ("blocks", "scale"),
        [*((blocks, "float32_pow2") for blocks in ROWS_BLOCKS), ((BLOCKWISE_1X32, BLOCKWISE_1X32), E8M0)],
        ids=str,
    )
    def test_emulated_rows(self, blocks, scale: str, name: str):
        a, b, layout = rows_operands(*SIZES[name], 152, 72, *(scaling_of(block, scale=scale) for block in blocks))
        got = cuda.zero_ungrouped_rows(cuda.emulated_rows(a, b, layout.ends), layout.ends)
        assert_close(got, rows_product(a, b, layout), torch.bfloat16)

    @pytest.mark.parametrize("name", ["ragged", "tail", "one-has-all"])
    @pytest.mark.parametrize(
        ("block", "scale"), [*((b, "float32_pow2") for b in CONTRACTED_BLOCKS), (BLOCKWISE_1X32, E8M0)], ids=str
    )
    def test_emulated_contracted(self, block, scale: str, name: str):
        align = 32 if scale == E8M0 else 128
        a, b, layout = contracted_operands(*SIZES[name], 72, 40, scaling_of(block, scale=scale), align)
        got = cuda.emulated_contracted(a, b, layout.padded_ends)
        assert_close(got, contracted_product(a, b, layout), torch.bfloat16)

    @pytest.mark.parametrize("name", SIZES)
    def test_high_precision(self, name: str):
        sizes, rows = SIZES[name]
        layout = layout_of(sizes, rows)
        x, grad = torch.randn(rows, 40).bfloat16(), torch.randn(rows, 24).bfloat16()
        weight = torch.randn(len(sizes), 24, 40).bfloat16().mT
        for a, b in ((x, weight), (grad, weight.mT), (grad[:1].expand(rows, 24), weight.mT)):
            want = module._grouped_mm(a.double(), b.double(), layout.ends)
            assert_close(cuda.rows(a, b, layout.ends), want, torch.bfloat16)
        for a in (grad, grad[:1].expand(rows, 24), grad.t().contiguous().t()):
            want = module._grouped_mm_contracted(a.double(), x.double(), layout.ends)
            assert_close(cuda.contracted(a, x, layout.ends), want, torch.bfloat16)

    def test_what_torch_does_not_take_is_said_once(self):
        cuda.warn_slow.cache_clear()
        layout = layout_of([4, 4], 8)
        with pytest.warns(UserWarning, match="multiples of 8, got torch.float32"):
            assert cuda.rows(torch.ones(8, 16), torch.ones(2, 16, 8), layout.ends) is None
        with pytest.warns(UserWarning, match=r"grouped_mm_contracted.*each group is waited for"):
            assert cuda.contracted(torch.ones(8, 3).bfloat16(), torch.ones(8, 16).bfloat16(), layout.ends) is None


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize("name", SIZES)
    @pytest.mark.parametrize("blocks", ROWS_BLOCKS, ids=str)
    def test_rows(self, blocks, name: str):
        for k, n in ((150, 130), (256, 72)):
            a, b, layout = rows_operands(*SIZES[name], k, n, *map(scaling_of, blocks))
            for dtype in (torch.bfloat16, torch.float32):
                got = cuda.triton_rows(a, b, layout.ends, dtype, fast_accum=False)
                assert_close(got, rows_product(a, b, layout), dtype)

    @pytest.mark.parametrize("name", SIZES)
    @pytest.mark.parametrize("block", CONTRACTED_BLOCKS, ids=str)
    def test_contracted(self, block, name: str):
        for align in (16, 128) if block == ROWWISE else (128,):
            a, b, layout = contracted_operands(*SIZES[name], 72, 150, scaling_of(block), align)
            for dtype in (torch.bfloat16, torch.float32):
                got = cuda.triton_contracted(a, b, layout.padded_ends, dtype, fast_accum=True)
                assert_close(got, contracted_product(a, b, layout), dtype)

    @pytest.mark.parametrize("config", [0, 1], ids=["large-tile", "small-tile"])
    def test_both_tiles_and_several_bands(self, config: int, monkeypatch: pytest.MonkeyPatch):
        from aotrain.kernels.triton import grouped_mm as kernels

        monkeypatch.setattr(kernels, "select_config", lambda rows, scaled_rows: kernels.CONFIGS[config])
        monkeypatch.setattr(kernels, "BAND", 2)
        for blocks in ROWS_BLOCKS:
            a, b, layout = rows_operands([70, 1, 0, 130], 210, 130, 150, *map(scaling_of, blocks))
            got = cuda.triton_rows(a, b, layout.ends, torch.float32, fast_accum=False)
            assert_close(got, rows_product(a, b, layout), torch.float32)

    @pytest.mark.parametrize("elements", [(FLOAT8_E5M2, FLOAT8_E4M3), (FLOAT8_E5M2, FLOAT8_E5M2)], ids=str)
    def test_other_float8(self, elements):
        a, b, layout = rows_operands(
            *SIZES["ragged"], 140, 72, *(scaling_of(ROWWISE, element, "float32") for element in elements)
        )
        got = cuda.triton_rows(a, b, layout.ends, torch.float32, fast_accum=True)
        assert_close(got, rows_product(a, b, layout), torch.float32)

    def test_int8_is_exact(self):
        scaling = scaling_of(ROWWISE, INT8, "float32")
        a, b, layout = rows_operands(*SIZES["ragged"], 300, 72, scaling, scaling)
        got = cuda.triton_rows(a, b, layout.ends, torch.float32, fast_accum=False)
        assert_bitwise_equal(got, module.scaled_grouped_mm(a, b, layout, torch.float32))
        a, b, layout = contracted_operands(*SIZES["tail"], 40, 24, scaling)
        got = cuda.triton_contracted(a, b, layout.padded_ends, torch.float32, fast_accum=False)
        assert_bitwise_equal(got, module.scaled_grouped_mm_contracted(a, b, layout, torch.float32))

    def test_a_value_that_is_not_finite_stays_in_its_row(self):
        for blocks in ROWS_BLOCKS:
            x = torch.randn(60, 140)
            x[20, 5] = torch.nan
            layout = layout_of([20, 9, 25], 60)
            a, b = (
                grouped_cast(x, layout, scaling_of(blocks[0])),
                quantize(torch.randn(3, 40, 140), scaling_of(blocks[1])),
            )
            got = cuda.triton_rows(a, b, layout.ends, torch.bfloat16, fast_accum=False)
            assert got[20].isnan().all()
            assert not got[torch.arange(60) != 20].isnan().any()

    def test_rows_of_no_group_become_zeros(self):
        from aotrain.kernels.triton.groups import zero_ungrouped_rows

        for sizes, rows in (([3, 70], 200), ([0, 0], 9), ([5], 5)):
            x = torch.randn(rows, 70)
            want = x.clone()
            want[sum(sizes) :] = 0
            zero_ungrouped_rows(x, layout_of(sizes, rows).ends)
            assert_bitwise_equal(x, want)


@pytest.mark.parametrize("k", [16, 256])
@pytest.mark.parametrize("sizes", [[5, 0, 37], [1], [300, 2]], ids=str)
def test_native_layouts_are_accepted_by_the_cuda_op(sizes: list[int], k: int):
    """torch's fake CUDA kernel checks strides, scales and multiples of 16 as the real one does; it needs no GPU."""
    groups, rows, n = len(sizes), sum(sizes) + 3, 48
    layout = layout_of(sizes, rows, 16)
    with FakeTensorMode():

        def operand(shape, scale_shape):
            data = torch.empty(shape, device="cuda", dtype=torch.float8_e4m3fn)
            return ScaledTensor(data, torch.empty(scale_shape, device="cuda"), scaling_of(ROWWISE))

        ends = torch.empty(groups, device="cuda", dtype=torch.int32)
        a = operand((rows, k), (rows, 1))
        for b in (operand((groups, n, k), (groups, n, 1)), operand((groups, n, k), (groups, 1, 1))):
            assert cuda.cutlass_takes(a, b, k, n, groups, torch.bfloat16)
            out = cuda.cutlass_rows(a, b, ends, True)
            assert (out.shape, out.dtype, out.is_contiguous()) == ((rows, n), torch.bfloat16, True)
        a, b = (operand((size, layout.padded_rows), (groups, size)) for size in (n, k))
        assert cuda.cutlass_takes(a, b, layout.padded_rows, k, groups, torch.bfloat16)
        out = cuda.cutlass_contracted(a, b, ends, False)
        assert (out.shape, out.dtype, out.is_contiguous()) == ((groups, n, k), torch.bfloat16, True)


@pytest.mark.parametrize(
    ("capability", "a", "b", "k", "dtype", "emulate", "way"),
    [
        ((9, 0), ROWWISE, ROWWISE, 64, torch.bfloat16, False, "cutlass"),
        ((9, 0), ROWWISE, TENSORWISE, 64, torch.bfloat16, False, "cutlass"),
        ((9, 0), ROWWISE, ROWWISE, 72, torch.bfloat16, False, "triton"),
        ((9, 0), ROWWISE, ROWWISE, 64, torch.float32, False, "triton"),
        ((9, 0), BLOCKWISE_1X128, BLOCKWISE_128X128, 64, torch.bfloat16, False, "triton"),
        ((10, 0), ROWWISE, ROWWISE, 64, torch.bfloat16, False, "triton"),
        ((8, 9), ROWWISE, ROWWISE, 64, torch.bfloat16, False, "triton"),
        ((8, 0), ROWWISE, ROWWISE, 64, torch.bfloat16, False, None),
        ((8, 0), ROWWISE, ROWWISE, 64, torch.bfloat16, True, "emulated"),
        ((9, 0), BLOCKWISE_1X32, BLOCKWISE_1X32, 64, torch.bfloat16, False, "emulated"),
    ],
    ids=str,
)
def test_which_kernel_takes_which_operands(monkeypatch, capability, a, b, k, dtype, emulate, way):
    from aotrain.kernels import _dispatch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    _dispatch._cuda_problem.cache_clear()
    try:
        with FakeTensorMode():
            lhs = ScaledTensor(torch.empty(8, k, device="cuda:0"), torch.empty(8, 1), scaling_of(a))
            arguments = lhs, lhs._replace(scaling=scaling_of(b)), k, 32, 4, k, dtype, emulate
            if way is None:
                with pytest.raises(RuntimeError, match=r"Some GPU.*8\.0.*emulate=True"):
                    cuda._way(*arguments)
            else:
                assert cuda._way(*arguments) == way
    finally:
        _dispatch._cuda_problem.cache_clear()


def test_opcheck():
    a, b, layout = rows_operands([3, 0, 4], 8, 32, 16, scaling_of(ROWWISE), scaling_of(ROWWISE))
    c, d, _ = contracted_operands([3, 0, 4], 8, 32, 16, scaling_of(ROWWISE))
    x, weight = torch.randn(8, 16), torch.randn(3, 16, 4)
    options = (torch.bfloat16, False, False)
    for op, args in (
        (torch.ops.aotrain.scaled_grouped_mm, (*module._operand(a), *module._operand(b), layout.ends, *options)),
        (
            torch.ops.aotrain.scaled_grouped_mm_contracted,
            (*module._operand(c), *module._operand(d), *layout[:2], 8, *options),
        ),
        (torch.ops.aotrain.grouped_mm, (x, weight, layout.ends)),
        (torch.ops.aotrain.grouped_mm_contracted, (x, x, layout.ends)),
    ):
        # Not test_schema: it compares inputs with allclose, which torch does not have for float8.
        torch.library.opcheck(
            op.default, args, test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        )


@pytest.mark.gpu
class TestCompiled:
    @pytest.mark.parametrize("name", SIZES)
    @pytest.mark.parametrize("blocks", ROWS_BLOCKS, ids=str)
    def test_rows(self, blocks, name: str):
        for k, n in ((256, 144), (150, 130)):
            a, b, layout = rows_operands(*SIZES[name], k, n, *map(scaling_of, blocks), device="cuda")
            for dtype in (torch.bfloat16, torch.float32):
                want = rows_product(a, b, layout)
                # Hopper sums float8 products with 14 bits or so of them; 30 dB finds a scale in a wrong place.
                for got in (
                    module.scaled_grouped_mm(a, b, layout, dtype),
                    cuda.triton_rows(a, b, layout.ends, dtype, fast_accum=False),
                ):
                    assert not got[want == 0].any()
                    assert not want.any() or sqnr(want, got) >= 30

    @pytest.mark.parametrize("name", SIZES)
    @pytest.mark.parametrize("block", CONTRACTED_BLOCKS, ids=str)
    def test_contracted(self, block, name: str):
        a, b, layout = contracted_operands(*SIZES[name], 256, 144, scaling_of(block), device="cuda")
        want = contracted_product(a, b, layout)
        for got in (
            module.scaled_grouped_mm_contracted(a, b, layout, torch.bfloat16),
            cuda.triton_contracted(a, b, layout.padded_ends, torch.float32, fast_accum=False),
        ):
            assert not got[want == 0].any()
            assert not want.any() or sqnr(want, got) >= 30
