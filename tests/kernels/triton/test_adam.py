"""The Triton Adam kernel against the reference step, bit for bit, under the interpreter; GPU twins at the end."""

import math
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from aotrain import optim
from aotrain.formats import BFLOAT16, philox_bits16, round_stochastic
from aotrain.formats.codebook import _boundaries
from aotrain.kernels import adam as op
from aotrain.kernels.adam import AdamScalars
from aotrain.kernels.triton import _adam_launch as launch
from aotrain.optim.state import Dynamic4bitMoment, Dynamic8bitMoment, Float8Moment, Float32Moment
from aotrain.optim.step import adam_scalars, adam_update
from aotrain.testing import assert_bitwise_equal

FORMATS = {"dynamic8": Dynamic8bitMoment, "dynamic4": Dynamic4bitMoment, "float8_e4m3fn": Float8Moment}
STATES = [*FORMATS, "float32"]
DTYPES = [torch.float32, torch.bfloat16]


def scalars_of(step: int, *, lr: float = 1e-3, decoupled: bool = True, **overrides: Any) -> AdamScalars:
    common = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, **overrides}
    return adam_scalars(lr=lr, decoupled=decoupled, step=step, **common)


def same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal bits, but NaNs of any payload are equal: IEEE 754 leaves it open which operand's payload survives."""
    if actual.is_floating_point():
        actual, expected = (torch.where(x.isnan(), torch.full_like(x, torch.nan), x) for x in (actual, expected))
    assert_bitwise_equal(actual, expected, what=what)


class Model:
    """Parameters and state stepped by the reference and by the kernel."""

    def __init__(self, params: Sequence[torch.Tensor], state: str, block_size: int = 256, device: str = "cpu") -> None:
        self.state, self.block_size, self.device = state, block_size, device
        if state == "float32":
            self.moments = Float32Moment("m"), Float32Moment("v")
        else:
            self.moments = FORMATS[state]("m", True, block_size), FORMATS[state]("v", False, block_size)
        self.want = [
            [param.clone(), *self._encode(torch.zeros(param.shape), torch.zeros(param.shape))] for param in params
        ]
        self.got = [[x.clone().to(device) for x in tensors] for tensors in self.want]

    def _encode(self, m: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        if self.state == "float32":
            return [m, v]
        return [x for moment, value in zip(self.moments, (m, v), strict=True) for x in moment.encode(value)]

    def _decode(self, state: list[torch.Tensor], shape: torch.Size) -> list[torch.Tensor]:
        if self.state == "float32":
            return state
        pairs = zip(self.moments, (state[:2], state[2:]), strict=True)
        return [moment.decode(*codes_scale, shape) for moment, codes_scale in pairs]

    def step(
        self,
        grads: Sequence[torch.Tensor],
        scalars: AdamScalars,
        *,
        maximize: bool = False,
        keys: Sequence[int] = (),
        indices: Sequence[tuple[int, int]] = (),
    ) -> None:
        for i, grad in enumerate(grads):
            param, *state = self.want[i]
            sign = -1 if maximize else 1
            values = self._decode(state, param.shape)
            updated, new = adam_update(param.float(), sign * grad.float(), values, scalars)
            if keys:
                updated = self._round(updated, keys[i], indices[i])
            self.want[i] = [updated.to(param.dtype), *self._encode(*new)]
        columns = list(zip(*self.got, strict=True))
        params, m, m_scale, v, v_scale = columns if len(columns) == 5 else (columns[0], columns[1], [], columns[2], [])
        launch.adam_(
            params, [grad.to(self.device) for grad in grads], m, m_scale, v, v_scale,
            state_format=self.state, block_size=self.block_size, maximize=maximize, **scalars._asdict(),
            rounding_keys=keys, first_indices=[i for i, _ in indices], row_strides=[s for _, s in indices],
        )  # fmt: skip

    @staticmethod
    def _round(updated: torch.Tensor, key: int, index: tuple[int, int]) -> torch.Tensor:
        rows = updated.view(updated.shape[0], -1)
        at = index[0] + torch.arange(rows.shape[0])[:, None] * index[1] + torch.arange(rows.shape[1])
        rounded = round_stochastic(rows, BFLOAT16, philox_bits16(key, at)).float()
        return torch.where(rows.isfinite(), rounded, rows).view(updated.shape)

    def check(self) -> None:
        for i, (got, want) in enumerate(zip(self.got, self.want, strict=True)):
            for j, (x, y) in enumerate(zip(got, want, strict=True)):
                same(x.cpu(), y, f"tensor {j} of parameter {i}")


# A parameter whose rows end with a block, several of them, and rows that end inside a block, of even and odd length.
SHAPES = [(4, 512), (2, 3, 256), (1, 4352), (3, 300), (5, 64), (1, 257), (3, 301), (2, 7, 5)]
MAGNITUDES = [0.0, 1e-45, 1e-40, 1e-30, 1e-20, 1e-13, 1e-7, 1e15, 1e25, 1e36, 3e38, math.inf, math.nan]


def check_many_steps(state: str, param_dtype: torch.dtype, grad_dtype: torch.dtype, device: str) -> None:
    model = Model([torch.randn(shape).to(param_dtype) for shape in SHAPES], state, device=device)
    for step in (1, 2):
        # Magnitudes over many decades, so that all of the maps are used.
        grads = [torch.randn(shape) * torch.exp(torch.randn(shape) * 3) for shape in SHAPES]
        model.step([grad.to(grad_dtype) for grad in grads], scalars_of(step))
        model.check()


def check_extreme_gradients(state: str, dtype: torch.dtype, device: str) -> None:
    """One row of blocks per magnitude: all elements, and a single one."""
    shape = (2 * len(MAGNITUDES), 300)
    model = Model([torch.randn(shape).to(dtype)], state, 128, device=device)
    for step in (1, 2):
        grad = torch.randn(shape).clamp(-1, 1)
        for row, magnitude in enumerate(MAGNITUDES):
            grad[2 * row] *= magnitude
            grad[2 * row + 1, 250] = -magnitude
            grad[2 * row + 1, :50] *= 1e-38  # moments that are encoded as a negative zero, and stay one
        model.step([grad.to(dtype)], scalars_of(step))
        model.check()


def check_midpoints(state: str, top: float, device: str) -> None:
    """Gradients become moments unchanged (beta = 0), so any value can be encoded."""
    bits = 4 if state == "dynamic4" else 8
    values = torch.cat([_boundaries(signed, torch.device("cpu"), bits) for signed in (True, False)])
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    for _ in range(3):
        nearby = [values.nextafter(torch.tensor(end)) for end in (-math.inf, math.inf)]
        values = torch.cat([values, *nearby]).unique()
    values = torch.cat([values, -values, torch.rand(2048), torch.exp(-20 * torch.rand(2048))]) * top
    rows = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    grad = torch.nn.functional.pad(rows, (0, 1), value=top).contiguous()
    for first in (grad, grad.abs().sqrt()):
        model = Model([torch.randn(grad.shape)], state, device=device)
        model.step([first], scalars_of(1, betas=(0.0, 0.0)))
        model.check()


def check_stochastic(state: str, device: str) -> None:
    """Indices of a whole parameter, of rows split between ranks, of columns split between ranks, and at odd places."""
    shapes = [(4, 512), (2, 256), (3, 264), (3, 301), (2, 256), (2, 2, 256)]
    indices = [(0, 512), (2**33, 256), (264, 2 * 264), (7, 301), (3, 999), (2**40, 1024)]
    params = [torch.randn(shape).bfloat16() for shape in shapes]
    params[0][0, :8] = torch.tensor([math.nan, math.inf, -math.inf, 3.38e38, -3.38e38, 0.0, -0.0, 1e-40])
    model = Model(params, state, device=device)
    for step in (1, 2):
        keys = [(i * 0x9E3779B97F4A7C15 + step) % 2**64 - 2**63 for i in range(len(shapes))]
        model.step([torch.randn(shape) for shape in shapes], scalars_of(step, lr=1e-2), keys=keys, indices=indices)
        model.check()


def check_options(state: str, overrides: dict[str, Any], maximize: bool, device: str) -> None:
    model = Model([torch.randn(3, 300), torch.randn(2, 256)], state, 64, device=device)
    for step in (1, 2):
        grads = [torch.randn(3, 300), torch.randn(2, 256)]
        model.step(grads, scalars_of(step, **overrides), maximize=maximize)
        model.check()


OVERRIDES = {"coupled": {"decoupled": False}, "no-decay": {"weight_decay": 0.0}, "eps": {"eps": 0.0}}


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("state", STATES)
    def test_many_steps(self, state: str, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
        check_many_steps(state, param_dtype, grad_dtype, "cpu")

    @pytest.mark.parametrize("block_size", [1, 2, 16, 64, 2048, 8192])
    @pytest.mark.parametrize("state", FORMATS)
    def test_block_sizes(self, state: str, block_size: int) -> None:
        if state == "dynamic4" and block_size == 1:
            pytest.skip("blocks of one element share bytes; adam_problem says so")
        shapes = [(2, 100), (2, 64), (1, 8192)] if block_size > 16 else [(2, 33), (2, 64)]
        model = Model([torch.randn(shape) for shape in shapes], state, block_size)
        model.step([torch.randn(shape) for shape in shapes], scalars_of(1))
        model.check()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("state", STATES)
    def test_extreme_gradients(self, state: str, dtype: torch.dtype) -> None:
        check_extreme_gradients(state, dtype, "cpu")

    @pytest.mark.parametrize("top", [1.0, 0.37, 3.1e-5, 1e20, 3.3e38, 1e-13])
    @pytest.mark.parametrize("state", FORMATS)
    def test_every_midpoint_and_its_neighbours(self, state: str, top: float) -> None:
        check_midpoints(state, top, "cpu")

    @pytest.mark.parametrize("state", STATES)
    def test_stochastic_rounding(self, state: str) -> None:
        check_stochastic(state, "cpu")

    @pytest.mark.parametrize("maximize", [False, True])
    @pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
    @pytest.mark.parametrize("state", ["dynamic8", "float32"])
    def test_options(self, state: str, overrides: dict[str, Any], maximize: bool) -> None:
        check_options(state, overrides, maximize, "cpu")

    def test_parameters_at_any_address(self) -> None:
        model = Model([torch.randn(3, 512).bfloat16()], "dynamic8")
        storage = torch.zeros(3 * 512 + 1, dtype=torch.bfloat16)
        storage[1:] = model.got[0][0].flatten()
        model.got[0][0] = storage[1:].view(3, 512)
        model.step([torch.randn(3, 512)], scalars_of(1))
        model.check()

    def test_nothing_to_do(self) -> None:
        model = Model([torch.randn(0, 512), torch.randn(3, 0)], "dynamic8")
        model.step([torch.randn(0, 512), torch.randn(3, 0)], scalars_of(1))
        model.check()
        launch.adam_([], [], [], [], [], [], state_format="dynamic8", block_size=256, **scalars_of(1)._asdict())

    def test_mixed_dtypes_are_an_error(self) -> None:
        model = Model([torch.randn(2, 256), torch.randn(2, 256).bfloat16()], "dynamic8")
        with pytest.raises(ValueError, match="one dtype"):
            model.step([torch.randn(2, 256)] * 2, scalars_of(1))


class TestTables:
    """On the host; the kernel is replaced by a list of its launches."""

    @pytest.fixture
    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []

        class Kernel:
            def __getitem__(self, grid: tuple[int]) -> Any:
                return lambda *args, **options: made.append(
                    {"grid": grid, "table": args[0], "tiles": args[1], **options}
                )

        monkeypatch.setattr(launch, "adam_kernel", Kernel())
        return made

    def test_one_launch_for_a_model(self, launches: list[dict[str, Any]]) -> None:
        model = Model([torch.randn(8, 512) for _ in range(20)], "dynamic8")
        model.step([torch.randn(8, 512)] * 20, scalars_of(1))
        assert [each["grid"] for each in launches] == [(20,)]

    def test_a_table_is_kept_while_addresses_and_shapes_stay(self, launches: list[dict[str, Any]]) -> None:
        model = Model([torch.randn(8, 512) for _ in range(3)], "dynamic8")
        grads = [torch.randn(8, 512) for _ in range(3)]
        for _ in range(2):
            model.step(grads, scalars_of(1))
        model.step([grads[0], grads[1], torch.randn(8, 512)], scalars_of(1))
        first, again, other = (each["table"] for each in launches)
        assert first is again
        assert other is not first
        assert launches[2]["tiles"] is launches[0]["tiles"]

    def test_each_tile_belongs_to_one_parameter(self, launches: list[dict[str, Any]]) -> None:
        shapes = [(100, 4096), (1, 256), (37, 512), (0, 256), (64, 64 * 256)]
        model = Model([torch.randn(shape) for shape in shapes], "dynamic8")
        model.step([torch.randn(shape) for shape in shapes], scalars_of(1))
        assert launches[0]["tiles"].bincount().tolist() == [100, 1, 5, 256]
        assert launches[0]["table"].view(-1, launch.NUM_COLUMNS)[:, 9].tolist() == [0, 100, 101, 106]

    def test_host_time_of_a_step(self, launches: list[dict[str, Any]]) -> None:
        """300 parameters take 0.6 ms with a table and 1.5 ms without on an idle core; the bounds are for a busy one."""
        model = Model([torch.randn(2, 256) for _ in range(300)], "dynamic8")
        grads = [torch.randn(2, 256) for _ in range(300)]
        columns = [*zip(*model.got, strict=True)]
        arguments = (columns[0], grads, *columns[1:])
        options = {"state_format": "dynamic8", "block_size": 256, **scalars_of(1)._asdict()}
        cold, warm = [], []
        for _ in range(5):
            launch._launches.cache_clear()
            for times in (cold, warm):
                start = time.perf_counter()
                launch.adam_(*arguments, **options)
                times.append(time.perf_counter() - start)
        print(f"{min(cold) * 1e3:.2f} ms without a table, {min(warm) * 1e3:.2f} with")
        assert min(cold) < 30e-3
        assert min(warm) < 10e-3


@pytest.mark.parametrize(("block_size", "state"), [(100, "dynamic8"), (16384, "float8_e4m3fn")])
def test_block_sizes_that_the_kernel_declines(block_size: int, state: str) -> None:
    assert "power of two" in str(op._cuda_problem(torch.device("cuda"), state, block_size))


@pytest.mark.gpu
class TestCompiled:
    @pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("state", STATES)
    def test_many_steps(self, state: str, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
        check_many_steps(state, param_dtype, grad_dtype, "cuda")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("state", STATES)
    def test_extreme_gradients(self, state: str, dtype: torch.dtype) -> None:
        check_extreme_gradients(state, dtype, "cuda")

    @pytest.mark.parametrize("top", [1.0, 0.37, 3.1e-5, 3.3e38, 1e-13])
    @pytest.mark.parametrize("state", FORMATS)
    def test_every_midpoint_and_its_neighbours(self, state: str, top: float) -> None:
        check_midpoints(state, top, "cuda")

    @pytest.mark.parametrize("state", STATES)
    def test_stochastic_rounding(self, state: str) -> None:
        check_stochastic(state, "cuda")

    @pytest.mark.parametrize("maximize", [False, True])
    @pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
    def test_options(self, overrides: dict[str, Any], maximize: bool) -> None:
        check_options("dynamic8", overrides, maximize, "cuda")

    def test_a_graph_replays_a_step(self) -> None:
        params, grads = [[torch.randn(4, 512), torch.randn(3, 300)] for _ in range(2)]
        direct, captured = (Model(params, "dynamic8", device="cuda") for _ in range(2))
        grads = [grad.cuda() for grad in grads]
        options = {"state_format": "dynamic8", "block_size": 256, **scalars_of(1)._asdict()}

        def step(model: Model) -> None:
            tensors = [*zip(*model.got, strict=True)]
            launch.adam_(tensors[0], grads, *tensors[1:], **options)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(direct)
            step(direct)
            step(captured)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                step(captured)
            graph.replay()
        stream.synchronize()
        for got, want in zip(captured.got, direct.got, strict=True):
            for x, y in zip(got, want, strict=True):
                assert_bitwise_equal(x.cpu(), y.cpu())


OPTIMIZERS = ["AdamW8bit", "Adam8bit", "AdamW4bit", "AdamWFp8", "AdamW32bit"]


def check_optimizer(name: str, dtype: torch.dtype, stochastic: bool, device: str) -> None:
    """Every parameter takes the kernel, and gets the bits of the reference on CPU."""
    shapes = [(16, 256), (41, 100), (512,), (64, 65), (2, 32, 64)]
    initial = [torch.randn(shape).to(dtype) for shape in shapes]
    options = {"lr": 1e-2, "weight_decay": 0.1, "bf16_stochastic_round": stochastic, "seed": 5}
    fused, reference = (
        getattr(optim, name)([torch.nn.Parameter(x.clone().to(place)) for x in initial], **options)
        for place in (device, "cpu")
    )
    reference._step_fused = lambda steps: steps
    fused._step_reference = lambda step: pytest.fail("a step did not take the kernel")
    pairs = list(zip(*(each.param_groups[0]["params"] for each in (fused, reference)), strict=True))
    for _ in range(2):
        for got, want in pairs:
            want.grad = torch.randn(want.shape).to(dtype)
            got.grad = want.grad.to(device)
        fused.step()
        reference.step()
    for got, want in pairs:
        assert_bitwise_equal(got.detach().cpu(), want.detach(), what=f"parameter {tuple(want.shape)}")
        for key, value in reference.state[want].items():
            assert_bitwise_equal(fused.state[got][key].cpu(), value, what=f"{key} of {tuple(want.shape)}")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("name", "stochastic"),
    [("AdamW8bit", True), ("Adam8bit", False), ("AdamW4bit", True), ("AdamWFp8", False), ("AdamW32bit", True)],
)
def test_whole_optimizers_interpreted(name: str, stochastic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aotrain, "adam_", launch.adam_)
    monkeypatch.setattr(optim.fused, "adam_problem", lambda *args, **options: None)
    check_optimizer(name, torch.bfloat16, stochastic, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_optimizers_compiled(name: str, dtype: torch.dtype, stochastic: bool) -> None:
    check_optimizer(name, dtype, stochastic, "cuda")
