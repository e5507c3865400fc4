"""The fused CPU step against the reference: codes, scales and parameters bit for bit, on every instruction set."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aotrain import _build
from aotrain.formats import BFLOAT16, philox_bits16, round_stochastic
from aotrain.formats.codebook import _boundaries
from aotrain.kernels import _adam_cpu as cpu
from aotrain.kernels import adam as kernel
from aotrain.kernels.adam import AdamScalars, AdamTensors
from aotrain.optim.state import BlockMoment, Dynamic4bitMoment, Dynamic8bitMoment, Float8Moment, Float32Moment
from aotrain.optim.step import adam_scalars, adam_update
from aotrain.testing import assert_bitwise_equal
from tests.kernels.native import build_or_skip, isa_or_skip

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [((3, 1000), 256), ((5, 64), 256), ((2, 7, 33), 32), ((4, 500), 100), ((2, 301), 18), ((1, 257), 256)]
# The kernel's name of a format -> the reference's class; None has float32 state.
FORMATS: dict[str, type[BlockMoment] | None] = {
    "dynamic8": Dynamic8bitMoment,
    "dynamic4": Dynamic4bitMoment,
    "float8_e4m3fn": Float8Moment,
    "float32": None,
}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_or_skip("adam", cpu)


@pytest.fixture(params=list(cpu.ISAS))
def isa(request: pytest.FixtureRequest) -> str:
    return isa_or_skip("adam", cpu, request.param)


@pytest.fixture(params=list(FORMATS))
def state_format(request: pytest.FixtureRequest) -> str:
    return request.param


def scalars_of(step: int, *, lr: float = 1e-3, decoupled: bool = True, **overrides: object) -> AdamScalars:
    common = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, **overrides}
    return adam_scalars(lr=lr, decoupled=decoupled, step=step, **common)


def same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal bits, but NaNs of any payload are equal: IEEE 754 leaves it open which operand's payload survives."""
    if actual.is_floating_point():
        actual, expected = (torch.where(x.isnan(), torch.full_like(x, torch.nan), x) for x in (actual, expected))
    assert_bitwise_equal(actual, expected, what=what)


class Pair:
    """Parameter and state stepped by both implementations.

    `first_index` asks for stochastic rounding: the position of this part in the global parameter.
    """

    def __init__(
        self,
        param: torch.Tensor,
        block_size: int,
        state_format: str = "dynamic8",
        *,
        first_index: int | None = None,
        row_stride: int = 0,
    ) -> None:
        self.state_format, self.block_size = state_format, block_size
        self.first_index, self.row_stride = first_index, row_stride
        kind = FORMATS[state_format]
        self.moments = [
            kind(name, signed, block_size) if kind else Float32Moment(name)
            for name, signed in (("m", True), ("v", False))
        ]
        state = [tensor for moment in self.moments for tensor in moment.init(param).values()]
        self.want = [param.clone(), *state]
        self.got = [x.clone() for x in self.want]

    def step(self, grad: torch.Tensor, scalars: AdamScalars, isa: str, *, maximize: bool = False) -> None:
        self.reference_step(grad, scalars, -1 if maximize else 1)
        param, *state = self.got
        if self.state_format == "float32":
            state = [state[0], None, state[1], None]
        rounding = {}
        if self.first_index is not None:
            rounding = {"rounding_keys": [KEY], "first_indices": [self.first_index], "row_strides": [self.row_stride]}
        cpu.adam_(
            *([x] for x in (param, grad, *state)),
            state_format=self.state_format,
            block_size=self.block_size,
            maximize=maximize,
            **scalars._asdict(),
            **rounding,
            isa=isa,
        )

    def reference_step(self, grad: torch.Tensor, scalars: AdamScalars, sign: int) -> None:
        param = self.want[0]
        names = [key for moment in self.moments for key in moment.keys]
        state = dict(zip(names, self.want[1:], strict=True))
        values = [moment.read(state, param) for moment in self.moments]
        updated, new = adam_update(param.float(), sign * grad.float(), values, scalars)
        for moment, value in zip(self.moments, new, strict=True):
            moment.write(state, value)
        if self.first_index is not None:
            rows, columns = torch.arange(len(param)), torch.arange(param[0].numel())
            index = self.first_index + rows[:, None] * self.row_stride + columns
            noise = philox_bits16(KEY, index).view(param.shape)
            rounded = round_stochastic(updated, BFLOAT16, noise).float()
            updated = torch.where(updated.isfinite(), rounded, updated)
        param.copy_(updated)

    def check(self) -> None:
        names = ["param", *(key for moment in self.moments for key in moment.keys)]
        for name, got, want in zip(names, self.got, self.want, strict=True):
            same(got, want, name)


KEY = 0xFEDCBA9876543210 >> 1


@pytest.mark.parametrize(("shape", "block_size"), SHAPES)
@pytest.mark.parametrize("param_dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_many_steps(
    shape: tuple[int, ...],
    block_size: int,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    state_format: str,
    isa: str,
):
    pair = Pair(torch.randn(shape).to(param_dtype), block_size, state_format)
    for step in range(1, 13):
        # Magnitudes over many decades, so that all of the maps are used.
        grad = (torch.randn(shape) * torch.exp(torch.randn(shape) * 3)).to(grad_dtype)
        pair.step(grad, scalars_of(step), isa)
        pair.check()


@pytest.mark.parametrize(("first_index", "row_stride"), [(0, 300), (3, 300), (2**33 + 5, 1000), (8, 304)])
def test_stochastic_rounding(first_index: int, row_stride: int, state_format: str, isa: str):
    param = torch.randn(4, 300).bfloat16()
    param[0, :4] = torch.tensor([math.inf, math.nan, 3.39e38, 1e-39])
    pair = Pair(param, 100, state_format, first_index=first_index, row_stride=row_stride)
    for step in range(1, 5):
        pair.step(torch.randn(4, 300).bfloat16(), scalars_of(step, lr=1e-2), isa)
        pair.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "magnitude", [0.0, 1e-45, 1e-40, 1e-30, 1e-20, 1e-7, 1e15, 1e25, 1e36, 3e38, math.inf, math.nan]
)
def test_extreme_gradients(magnitude: float, dtype: torch.dtype, state_format: str, isa: str):
    shape = (4, 700)
    pair = Pair(torch.randn(shape).to(dtype), 128, state_format)
    for step in range(1, 6):
        grad = torch.randn(shape).clamp(-1, 1)
        grad[1] *= magnitude
        grad[2, ::7] = 0.0
        grad[3, 650] = -magnitude
        pair.step(grad.to(dtype), scalars_of(step), isa)
        pair.check()


@pytest.mark.parametrize(
    "overrides", [{"decoupled": False}, {"weight_decay": 0.0}, {"eps": 0.0}, {"betas": (0.0, 0.0)}]
)
@pytest.mark.parametrize("maximize", [False, True])
def test_options(overrides: dict[str, object], maximize: bool, state_format: str, isa: str):
    pair = Pair(torch.randn(3, 300), 64, state_format)
    for step in range(1, 6):
        pair.step(torch.randn(3, 300), scalars_of(step, **overrides), isa, maximize=maximize)
        pair.check()


@pytest.mark.parametrize("top", [1.0, 0.37, 3.1e-5, 1e20, 2e38, 1e-13])
def test_every_midpoint_and_its_neighbours(top: float, state_format: str, isa: str):
    """Gradients become moments unchanged (beta = 0), so any value can be encoded."""
    values = midpoints(state_format)
    values = torch.cat([values, torch.zeros(1), -torch.zeros(1)])
    for _ in range(4):
        nearby = [values.nextafter(torch.tensor(sign * math.inf)) for sign in (-1, 1)]
        values = torch.cat([values, *nearby]).unique()
    values = torch.cat([values, -values, torch.rand(4096), torch.exp(-20 * torch.rand(4096))]) * top
    rows = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    grad = torch.nn.functional.pad(rows, (0, 1), value=top).contiguous()
    for beta2_zero in (grad, grad.abs().sqrt()):
        pair = Pair(torch.randn(grad.shape), 256, state_format)
        pair.step(beta2_zero, scalars_of(1, betas=(0.0, 0.0)), isa)
        pair.check()


def midpoints(state_format: str) -> torch.Tensor:
    """Where the code of a value changes, of values whose block has the largest magnitude 1."""
    if state_format == "float32":
        return torch.ones(1)
    if state_format == "float8_e4m3fn":
        values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / 448
        return (values[:-1] + values[1:]) / 2
    bits = int(state_format[-1])
    return torch.cat([_boundaries(signed, torch.device("cpu"), bits) for signed in (True, False)])


def test_bfloat16_parameters_keep_nan_and_round_to_even(isa: str):
    param = torch.tensor([math.nan, math.inf, -math.inf, 3.38e38, 0.0, -0.0, 1e-40, 1.0] * 16).bfloat16().view(2, 64)
    pair = Pair(param, 64)
    for step in range(1, 4):
        pair.step(torch.randn(2, 64), scalars_of(step, lr=1e-2), isa)
        pair.check()


def arguments(shape: tuple[int, int] = (4, 96)) -> AdamTensors:
    pair = Pair(torch.randn(shape), 32)
    param, *state = pair.got
    return AdamTensors(param, torch.randn(shape), *state)


FORMAT = {"state_format": "dynamic8", "block_size": 32}


def test_the_op_checks_out():
    lists = [[x, y] for x, y in zip(arguments()[:6], arguments((3, 64))[:6], strict=True)]
    torch.library.opcheck(torch.ops.aotrain.adam_.default, tuple(lists), {**FORMAT, **scalars_of(1)._asdict()})


def test_threads_do_not_change_the_result():
    tensors = arguments((64, 2048))
    copies = AdamTensors(*(x.clone() for x in tensors[:6]))
    threads = torch.get_num_threads()
    kernel.adam_step([tensors], scalars_of(1), **FORMAT)
    try:
        torch.set_num_threads(2)
        kernel.adam_step([copies], scalars_of(1), **FORMAT)
    finally:
        torch.set_num_threads(threads)
    for got, want in zip(copies[:6], tensors[:6], strict=True):
        assert_bitwise_equal(got, want)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t._replace(param=t.param.half()), "float16"),
        (lambda t: t._replace(grad=t.grad.t().contiguous().t()), "not contiguous"),
        (lambda t: t._replace(grad=t.grad[:3].contiguous()), "gradient's shape"),
        (lambda t: t._replace(exp_avg_scale=t.exp_avg_scale[:, :1].contiguous()), "scales must be"),
        (lambda t: t._replace(exp_avg_sq_scale=None), "scales must be"),
        (lambda t: t._replace(exp_avg=t.exp_avg.int()), "state must be"),
        (lambda t: AdamTensors(*(x.to("meta") for x in t[:6])), "meta"),
        (lambda t: t._replace(grad=t.grad.to("meta")), "not dense on cpu"),
    ],
)
def test_what_the_kernel_cannot_take(change: Callable[[AdamTensors], AdamTensors], problem: str):
    assert problem in str(kernel.adam_problem(change(arguments()), **FORMAT))
    assert kernel.adam_problem(arguments(), **FORMAT) is None


def test_empty():
    tensors = arguments((0, 96))
    assert kernel.adam_problem(tensors, **FORMAT) is None
    kernel.adam_step([tensors], scalars_of(1), **FORMAT)


@pytest.mark.parametrize("compiler", ["/nonexistent/g++", "false"])
def test_a_broken_compiler_gives_a_message_and_no_library(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CXX", compiler)
    source = _build.sources()[0]
    with pytest.raises(_build.BuildError, match="no C\\+\\+ compiler" if "/" in compiler else "exit status 1"):
        _build.build_library(source, tmp_path)
    assert _build.build_all(tmp_path) == []
    assert "PyTorch code runs instead" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_error_is_shown(tmp_path: Path):
    source = tmp_path / "wrong.cpp"
    source.write_text("int f( { return missing; }\n")
    with pytest.raises(_build.BuildError, match="error"):
        _build.build_library(source, tmp_path / "lib")
    assert list((tmp_path / "lib").iterdir()) == []


def test_a_new_source_replaces_the_old_library(tmp_path: Path):
    source = tmp_path / "sum.cpp"
    source.write_text('extern "C" int f() { return 1; }\n')
    first = _build.build_library(source, tmp_path / "lib")
    source.write_text('extern "C" int f() { return 2; }\n')
    assert _build.build_library(source, tmp_path / "lib") != first
    assert not first.exists()


def test_switched_off_by_the_environment():
    script = (
        "from aotrain import _build\nfrom aotrain.kernels._native import native_library\n"
        "assert _build.build_all() == []\nprint(native_library('adam'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "AOTRAIN_NO_NATIVE": "1"}, capture_output=True, text=True
    )
    assert "AOTRAIN_NO_NATIVE is set" in result.stdout, result.stderr
