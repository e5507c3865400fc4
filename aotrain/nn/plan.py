"""Which linear layers of a model gain from a recipe, by how much, and why: before anything is trained.

    plan = make_plan(model, "float8_rowwise", tokens=16384)
    print(plan.summary())
    convert_to_float8_training(model, module_filter_fn=plan.filter, config=...)

A layer's time is that of its three products plus, with a recipe, the casts that `scaled_linear` makes. Where the times
come from is the `Times` object: this machine's GPU, or a data sheet (`aotrain.nn.roofline`, a model).

The rest of a step (attention, norms, activations, optimizer, communication, recomputation) is taken to be in proportion
to the layers' inputs and outputs, with one factor from a published run; see `OTHER_COPIES`. Not seen at all: weight
casts that are kept over several forward passes, experts of a mixture, and what torch.compile fuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from aotrain.gpus import DEFAULT_GPU, find_gpu
from aotrain.nn.linear_work import Cast, linear_casts, linear_gemms
from aotrain.nn.measure import Measured
from aotrain.nn.roofline import Roofline, Times
from aotrain.nn.skips import matches_skip, skip_patterns
from aotrain.recipes import RECIPES, LinearRecipe, recipe_name

# A layer is converted from this gain on, and a model should be: less is within what a model can miss.
MIN_GAIN = 1.03
# The rest of a step takes as long as this many copies of the inputs and outputs of its linear layers in 1-byte codes.
# From torchao's float8 README: Llama 3 8B in bfloat16 on 8 H100, batch 1 x 8192 tokens, FSDP2, compiled, selective
# activation checkpointing, 6150 tokens/s per GPU = 1.33 s per step, of which the model gives 0.64 s to linear layers.
OTHER_COPIES = 51

# (dotted name, out_features N, in_features K)
Shape = tuple[str, int, int]

# Layers whose input is split by tensor parallelism, by the last part of their name; the output of all others is.
_ROW_PARALLEL = {"wo", "w2", "o_proj", "out_proj", "down_proj", "c_proj", "fc2", "dense_4h_to_h", "proj_out"}
# Layers that every rank holds whole: routers, and the down-projections of latent attention.
_ROUTERS = {"gate", "router"}
_REPLICATED = {*_ROUTERS, "wq_a", "wkv_a", "q_a_proj", "kv_a_proj_with_mqa"}


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One layer. Times are seconds per forward and backward on one GPU, sizes those of its shard.

    Attributes:
        fqn: dotted name.
        n: output features.
        k: input features.
        bf16_seconds: its three products in bfloat16.
        cast_seconds: the casts of the recipe.
        gemm_seconds: its three products in the recipe.
        decision: "convert" or "keep".
        reason: why.
    """

    fqn: str
    n: int
    k: int
    bf16_seconds: float
    cast_seconds: float
    gemm_seconds: float
    decision: Literal["convert", "keep"]
    reason: str

    @property
    def gain(self) -> float:
        """How many times faster the recipe is than bfloat16; 1 where it cannot run."""
        total = self.cast_seconds + self.gemm_seconds
        return self.bf16_seconds / total if total else 1.0

    @property
    def planned_seconds(self) -> float:
        """As decided."""
        return self.cast_seconds + self.gemm_seconds if self.decision == "convert" else self.bf16_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A decision for each linear layer, and what they come to.

    Attributes:
        recipe: name of the recipe.
        tokens: rows of every product.
        tp: ranks that split each layer.
        times: which GPU, and whether modelled or measured.
        rows: one per layer, in model order.
        other_seconds: estimate of the rest of a step.
        problem: why the GPU does not run the recipe natively; None if it does.
        alternatives: recipes that it does run.
        notes: what the times take for granted that is not so yet.
    """

    recipe: str
    tokens: int
    tp: int
    times: str
    rows: tuple[PlanRow, ...]
    other_seconds: float
    problem: str | None = None
    alternatives: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the layers to convert."""
        return tuple(row.fqn for row in self.rows if row.decision == "convert")

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the layers to leave in bfloat16."""
        return tuple(row.fqn for row in self.rows if row.decision == "keep")

    @property
    def bf16_seconds(self) -> float:
        """All linear layers in bfloat16."""
        return sum(row.bf16_seconds for row in self.rows)

    @property
    def planned_seconds(self) -> float:
        """All linear layers as decided."""
        return sum(row.planned_seconds for row in self.rows)

    @property
    def linear_gain(self) -> float:
        """How many times faster the linear layers get."""
        return self.bf16_seconds / self.planned_seconds

    @property
    def step_gain(self) -> float:
        """How many times faster a step gets, with `other_seconds` unchanged."""
        return (self.bf16_seconds + self.other_seconds) / (self.planned_seconds + self.other_seconds)

    @property
    def other_share(self) -> float:
        """Part of the bfloat16 step that is not linear layers."""
        return self.other_seconds / (self.bf16_seconds + self.other_seconds)

    @property
    def worth_it(self) -> bool:
        """Whether the step gains enough to convert at all."""
        return self.step_gain >= MIN_GAIN

    def filter(self, module: Any, fqn: str) -> bool:
        """The decision as a `module_filter_fn`."""
        return fqn in self.converted

    def precision(self) -> dict[str, Any]:
        """The `precision` section of a pretraining job: recipe and skip list."""
        if not self.converted:
            return {"recipe": None}
        return {"recipe": self.recipe, "skip": skip_patterns(self.kept, self.converted)}

    def advice(self) -> list[str]:
        """What to know before using the plan; empty if nothing."""
        if self.problem is not None:
            return [f"{self.recipe} does not run natively here: {self.problem}. Use {_listed(self.alternatives)}."]
        if self.worth_it:
            return list(self.notes)
        percent = 100 * (self.step_gain - 1)
        return [
            f"a step gains {percent:.1f} %, less than {100 * (MIN_GAIN - 1):.0f} %: train in bfloat16, or give each "
            "GPU more tokens per forward pass, or split layers over fewer ranks.",
            *self.notes,
        ]

    def summary(self) -> str:
        """One line: counts, gains and where the times come from."""
        return (
            f"{self.recipe} on {self.times}, {self.tokens} tokens, tp {self.tp}: convert {len(self.converted)} of "
            f"{len(self.rows)} layers; linear layers x{self.linear_gain:.2f}, step x{self.step_gain:.2f} if "
            f"{100 * self.other_share:.0f} % of it is not linear layers"
        )


def make_plan(
    model: torch.nn.Module | Sequence[Shape],
    recipe: str,
    *,
    tokens: int,
    tp: int = 1,
    gpu: str | None = None,
    times: Times | None = None,
    skip: Sequence[str] = (),
    save_for_backward: str = "high_precision",
    other_share: float | None = None,
) -> Plan:
    """Judge every linear layer of a model.

    Args:
        model: a module, on the meta device if it is large, or its linear layers as (name, N, K).
        recipe: name or alias.
        tokens: rows of x per forward pass on one GPU (of all ranks that split the layers together).
        tp: tensor-parallel ranks.
        gpu: a name of `aotrain.gpus.GPUS`, for its data sheet; default the local GPU, measured, else H100's data sheet.
        times: overrides gpu.
        skip: layers to keep, as in a job's `precision.skip`.
        save_for_backward: as for `scaled_linear`.
        other_share: part of a bfloat16 step that is not linear layers; default the estimate described above.

    Raises:
        ValueError: unknown recipe or GPU, no linear layer, a skip that matches none, or a number out of range.
    """
    name = recipe_name(recipe)
    shapes = linear_shapes(model) if isinstance(model, torch.nn.Module) else list(model)
    _check(shapes, tokens, tp, skip, other_share)
    times = times_for(gpu) if times is None else times
    problem = times.problem(RECIPES[name])
    rows = []
    for fqn, n, k in shapes:
        n, k = shard(fqn, n, k, tp)
        reason = next((f"matches skip {pattern!r}" for pattern in skip if matches_skip(fqn, pattern)), problem)
        rows.append(_judge((fqn, n, k), tokens, None if problem else RECIPES[name], times, save_for_backward, reason))
    linear = sum(row.bf16_seconds for row in rows)
    if other_share is not None:
        other = linear * other_share / (1 - other_share)
    else:
        copies = (times.cast(Cast(tokens, size, None, False)) for row in rows for size in (row.n, row.k))
        other = OTHER_COPIES * sum(copies)
    alternatives = tuple(other_name for other_name in RECIPES if times.problem(RECIPES[other_name]) is None)
    return Plan(
        recipe=name,
        tokens=tokens,
        tp=tp,
        times=times.label,
        rows=tuple(rows),
        other_seconds=other,
        problem=problem,
        alternatives=alternatives,
        notes=() if problem else (*_routing(shapes), *times.notes(RECIPES[name])),
    )


def times_for(gpu: str | None, *, refresh: bool = False) -> Times:
    """The named GPU's data sheet; without a name the local GPU, measured, or else the default GPU's data sheet.

    Args:
        gpu: a name of `aotrain.gpus.GPUS`, or None.
        refresh: measure again what the local GPU's file has.
    """
    if gpu is None and torch.cuda.is_available():
        return Measured(torch.device("cuda", torch.cuda.current_device()), refresh=refresh)
    return Roofline(find_gpu(gpu or DEFAULT_GPU))


def linear_shapes(model: torch.nn.Module) -> list[Shape]:
    """(name, N, K) of every `nn.Linear`, shared ones once."""
    return [
        (fqn, module.out_features, module.in_features)
        for fqn, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


def shard(fqn: str, n: int, k: int, tp: int) -> tuple[int, int]:
    """N and K of one of `tp` ranks, judged by the layer's name; what does not divide is rounded up."""
    last = fqn.rpartition(".")[2]
    if last in _REPLICATED:
        return n, k
    return (n, -(-k // tp)) if last in _ROW_PARALLEL else (-(-n // tp), k)


def layer_seconds(
    n: int, k: int, tokens: int, recipe: LinearRecipe | None, times: Times, save_for_backward: str = "high_precision"
) -> tuple[float, float]:
    """(casts, products) of one forward and backward; recipe None is bfloat16."""
    products = sum(times.gemm(gemm) for gemm in linear_gemms(tokens, n, k, recipe))
    if recipe is None:
        return 0.0, products
    return sum(times.cast(cast) for cast in linear_casts(tokens, n, k, recipe, save_for_backward)), products


def layer_gain(n: int, k: int, tokens: int, recipe: LinearRecipe, times: Times) -> float:
    """How many times faster the recipe makes a layer."""
    return sum(layer_seconds(n, k, tokens, None, times)) / sum(layer_seconds(n, k, tokens, recipe, times))


def _judge(
    shape: Shape, tokens: int, recipe: LinearRecipe | None, times: Times, save_for_backward: str, kept: str | None
) -> PlanRow:
    """The row of a layer; `kept` is a reason to keep it whatever its times are."""
    fqn, n, k = shape
    _, bf16 = layer_seconds(n, k, tokens, None, times)
    if recipe is None:
        return PlanRow(fqn, n, k, bf16, 0.0, 0.0, "keep", kept or "")
    casts, products = layer_seconds(n, k, tokens, recipe, times, save_for_backward)
    if kept is not None:
        return PlanRow(fqn, n, k, bf16, casts, products, "keep", kept)
    if bf16 >= MIN_GAIN * (casts + products):
        saved = bf16 - casts - products
        return PlanRow(fqn, n, k, bf16, casts, products, "convert", f"saves {1e3 * saved:.3f} ms")
    if products >= bf16:
        reason = "its products are too small to be faster in 8 bits"
    elif casts + products >= bf16:
        reason = f"casts cost {1e3 * casts:.3f} ms, faster products save {1e3 * (bf16 - products):.3f}"
    else:
        reason = f"gains less than {100 * (MIN_GAIN - 1):.0f} %"
    return PlanRow(fqn, n, k, bf16, casts, products, "keep", reason)


def _check(shapes: Sequence[Shape], tokens: int, tp: int, skip: Sequence[str], other_share: float | None) -> None:
    for name, value in (("tokens", tokens), ("tp", tp)):
        if value < 1:
            raise ValueError(f"{name} got {value}; want at least 1.")
    if other_share is not None and not 0 <= other_share < 1:
        raise ValueError(f"other_share got {other_share}; want a number in [0, 1).")
    if not shapes:
        raise ValueError("The model has no linear layer to plan.")
    for pattern in skip:
        if not any(matches_skip(fqn, pattern) for fqn, _, _ in shapes):
            names = ", ".join(fqn for fqn, _, _ in shapes[:6])
            raise ValueError(f"skip: {pattern!r} matches no linear layer; the model has {names}, ...")


def _routing(shapes: Sequence[Shape]) -> list[str]:
    if not any(fqn.rpartition(".")[2] in _ROUTERS for fqn, _, _ in shapes):
        return []
    return ["the model routes tokens to experts, whose products are not part of this plan"]


def _listed(names: Sequence[str]) -> str:
    return " or ".join(names) if names else "bfloat16"
