"""Which linear layers of a model gain from a recipe, by how much, and why: before anything is trained.

    plan = make_plan(model, "float8_rowwise", tokens=16384)
    print(plan.summary())
    convert_to_float8_training(model, module_filter_fn=plan.filter, config=...)

A layer's time is that of its three products plus, with a recipe, the casts that `scaled_linear` makes. Where the times
come from is the `Times` object: this machine's GPU, or a data sheet (`aotrain.nn.roofline`, a model).

The rest of a step (attention, norms, activations, optimizer, communication, recomputation) is taken to be in proportion
to the layers' inputs and outputs, with one factor from a published run; see `OTHER_COPIES`. The experts of a mixture
are one row, because they are converted together; tokens are taken to spread evenly over them. Not seen at all: weight
casts that are kept over several forward passes, and what torch.compile fuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from aotrain.gpus import DEFAULT_GPU, find_gpu
from aotrain.kernels.nvfp4_mm import native_nvfp4_problem
from aotrain.nn.expert_work import Experts
from aotrain.nn.layer_times import ROUTERS, Layer, Shape, layer_seconds, shard, sides
from aotrain.nn.linear_work import Cast
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
# Not a row of RECIPES: its operands have two levels of scales, which no `Scaling` says.
_NVFP4 = "nvfp4"


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One layer. Times are seconds per forward and backward on one GPU, sizes those of its shard.

    Attributes:
        fqn: dotted name.
        n: output features; of experts, those of their first product.
        k: input features, likewise.
        experts: how many, of one GPU; 0 for a linear layer.
        bf16_seconds: its products in bfloat16.
        cast_seconds: the casts of the recipe.
        gemm_seconds: its products in the recipe.
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
    experts: int = 0

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
        """The `precision` section of a pretraining job: recipe, recipe of the experts if there are any, skip list."""
        section: dict[str, Any] = {"recipe": None}
        planned: list[PlanRow] = []
        for key, rows in (
            ("recipe", [row for row in self.rows if not row.experts]),
            ("experts", [row for row in self.rows if row.experts]),
        ):
            if any(row.decision == "convert" for row in rows):
                section[key] = self.recipe
                planned += rows
            elif rows:
                section[key] = None
        if planned:
            kept = [row.fqn for row in planned if row.decision == "keep"]
            section["skip"] = skip_patterns(kept, self.converted)
        return section

    def advice(self) -> list[str]:
        """What to know before using the plan; empty if nothing."""
        if self.problem is not None:
            what = "is not planned" if self.recipe == _NVFP4 else "does not run natively here"
            return [f"{self.recipe} {what}: {self.problem}. Use {_listed(self.alternatives)}."]
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
    model: torch.nn.Module | Sequence[Layer],
    recipe: str,
    *,
    tokens: int,
    tp: int = 1,
    ep: int = 1,
    gpu: str | None = None,
    times: Times | None = None,
    skip: Sequence[str] = (),
    save_for_backward: str = "high_precision",
    other_share: float | None = None,
) -> Plan:
    """Judge every linear layer of a model, and its experts.

    Args:
        model: a module, on the meta device if it is large, of which only the linear layers are seen; or linear layers
            as (name, N, K) and experts as `Experts`.
        recipe: name or alias, or nvfp4, of whose times there is no model yet: its plan only says where it runs.
        tokens: rows of x per forward pass on one GPU (of all ranks that split the layers together).
        tp: tensor-parallel ranks.
        ep: expert-parallel ranks, each of which brings `tokens` of its own.
        gpu: a name of `aotrain.gpus.GPUS`, for its data sheet; default the local GPU, measured, else H100's data sheet.
        times: overrides gpu.
        skip: layers to keep, as in a job's `precision.skip`.
        save_for_backward: as for `scaled_linear`.
        other_share: part of a bfloat16 step that is not linear layers; default the estimate described above.

    Raises:
        ValueError: unknown recipe or GPU, no linear layer, a skip that matches none, or a number out of range.
    """
    name = recipe if recipe == _NVFP4 else recipe_name(recipe)
    layers = list(linear_shapes(model) if isinstance(model, torch.nn.Module) else model)
    _check(layers, (("tokens", tokens), ("tp", tp), ("ep", ep)), skip, other_share)
    times = times_for(gpu) if times is None else times
    problem = _nvfp4_problem(times) if name == _NVFP4 else times.problem(RECIPES[name])
    rows = []
    layers = [shard(layer, tp, ep) for layer in layers]
    for layer in layers:
        reason = next((f"matches skip {pattern!r}" for pattern in skip if matches_skip(layer[0], pattern)), problem)
        rows.append(_judge(layer, tokens, None if problem else RECIPES[name], times, save_for_backward, reason))
    if other_share is not None:
        other = sum(row.bf16_seconds for row in rows) * other_share / (1 - other_share)
    else:
        copies = (Cast(*side, None, False) for layer in layers for side in sides(layer, tokens))
        other = OTHER_COPIES * sum(times.cast(copy) for copy in copies)
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
        notes=() if problem else (*_routing(layers), *times.notes(RECIPES[name])),
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


def _judge(
    layer: Layer, tokens: int, recipe: LinearRecipe | None, times: Times, save_for_backward: str, kept: str | None
) -> PlanRow:
    """The row of a layer; `kept` is a reason to keep it whatever its times are."""
    fqn, n, k = (layer.fqn, *layer.products[0][1:]) if isinstance(layer, Experts) else layer
    experts = layer.experts if isinstance(layer, Experts) else 0
    _, bf16 = layer_seconds(layer, tokens, None, times)
    if recipe is None:
        return PlanRow(fqn, n, k, bf16, 0.0, 0.0, "keep", kept or "", experts)
    casts, products = layer_seconds(layer, tokens, recipe, times, save_for_backward)
    reason = kept or _why_not(bf16, casts, products)
    if reason is not None:
        return PlanRow(fqn, n, k, bf16, casts, products, "keep", reason, experts)
    saved = f"saves {1e3 * (bf16 - casts - products):.3f} ms"
    return PlanRow(fqn, n, k, bf16, casts, products, "convert", saved, experts)


def _why_not(bf16: float, casts: float, products: float) -> str | None:
    """Why a layer with these times stays in bfloat16; None if it is converted."""
    if bf16 >= MIN_GAIN * (casts + products):
        return None
    if products >= bf16:
        return "its products are too small to be faster in 8 bits"
    if casts + products >= bf16:
        return f"casts cost {1e3 * casts:.3f} ms, faster products save {1e3 * (bf16 - products):.3f}"
    return f"gains less than {100 * (MIN_GAIN - 1):.0f} %"


def _check(
    layers: Sequence[Layer], counts: Sequence[tuple[str, int]], skip: Sequence[str], other_share: float | None
) -> None:
    for name, value in counts:
        if value < 1:
            raise ValueError(f"{name} got {value}; want at least 1.")
    if other_share is not None and not 0 <= other_share < 1:
        raise ValueError(f"other_share got {other_share}; want a number in [0, 1).")
    if not layers:
        raise ValueError("The model has no linear layer to plan.")
    for pattern in skip:
        if not any(matches_skip(layer[0], pattern) for layer in layers):
            names = ", ".join(layer[0] for layer in layers[:6])
            raise ValueError(f"skip: {pattern!r} matches no linear layer; the model has {names}, ...")


def _nvfp4_problem(times: Times) -> str:
    """Where NVFP4 products run natively, and that nothing here times them."""
    if isinstance(times, Measured):
        problem = native_nvfp4_problem(times.device)
    elif isinstance(times, Roofline):
        name, capability = times.gpu.name, times.gpu.capability or (0, 0)
        problem = None if (10, 0) <= capability < (11, 0) else f"{name} has no NVFP4 products, B200 has"
    else:
        problem = None
    return problem or (
        "its layers are not timed yet, where the products are native; `python -m benchmarks.run nvfp4` does"
    )


def _routing(layers: Sequence[Layer]) -> list[str]:
    if any(isinstance(layer, Experts) for layer in layers):
        return []
    if not any(layer[0].rpartition(".")[2] in ROUTERS for layer in layers):
        return []
    return ["the model routes tokens to experts, whose products are not part of this plan"]


def _listed(names: Sequence[str]) -> str:
    return " or ".join(names) if names else "bfloat16"
