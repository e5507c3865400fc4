"""The keys of `trainer` that fine-tuning on torchtitan has a meaning for, by the names and with the defaults of TRL.

A recipe is the same for both engines, so its `trainer` section has the keys of `trl.SFTConfig`. Those below are mapped;
any other is refused by name, because a setting that is silently left out is a different run. Neither torch nor
torchtitan is imported.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from aotrain.integrations.config_file import STRICT, JobError

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerKeys:
    """What `trainer` may hold."""

    __pydantic_config__ = STRICT

    output_dir: str
    # Optimizer steps; -1: num_train_epochs decides.
    max_steps: int = -1
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    # Sequences per rank and forward pass.
    per_device_train_batch_size: Positive = 8
    per_device_eval_batch_size: Positive = 8
    # Forward passes per optimizer step.
    gradient_accumulation_steps: Positive = 1
    # Tokens; longer rows are cut.
    max_length: Annotated[int, Field(ge=2)] = 1024
    # Several rows per sequence. bfd: whole rows, which do not see each other. wrapped: one long text, cut anywhere.
    packing: bool = False
    packing_strategy: Literal["bfd", "wrapped"] = "bfd"
    # null: where rows have a prompt and a completion.
    completion_only_loss: bool | None = None
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    # Optimizer steps, or below 1 a part of them.
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    # Norm that gradients are clipped to; 0: not at all.
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    # Products in bfloat16; weights and their updates stay in model.dtype.
    bf16: bool = True
    # Of whole blocks; two names for the same.
    gradient_checkpointing: bool = True
    activation_checkpointing: bool | None = None
    torch_compile: bool = False
    logging_steps: Positive = 10
    save_strategy: Literal["no", "steps"] = "steps"
    save_steps: Positive = 500
    save_total_limit: Annotated[int, Field(ge=2)] | None = None
    resume_from_checkpoint: bool = False
    seed: NonNegative = 42
    use_cpu: bool = False
    report_to: Literal["none", "tensorboard"] = "none"
    # There is a progress bar on a terminal only.
    disable_tqdm: bool = False
    # torchtitan always shards by FSDP2.
    fsdp: Literal[True, "full_shard", "full_shard auto_wrap"] = True
    # Options of our optimizers, "key=value,key=value".
    optim_args: str | None = None

    @property
    def recompute(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self.gradient_checkpointing if self.activation_checkpointing is None else self.activation_checkpointing

    def warmup(self, total: int) -> int:
        """Optimizer steps of warmup among `total`; a part is rounded up, as transformers has it."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else -int(-total * self.warmup_steps // 1)


NAMES = tuple(field.name for field in fields(TrainerKeys))


def trainer_keys(recipe: Recipe) -> TrainerKeys:
    """The checked section.

    Raises:
        JobError: keys that have no meaning here.
    """
    for key, message in trainer_problems(recipe.trainer):
        raise JobError(f"{key}: {message}")
    return _validated(recipe.trainer)


def trainer_problems(section: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, message) of everything in `trainer` that this engine cannot do."""
    for key in section:
        if key not in NAMES:
            near = difflib.get_close_matches(key, NAMES, n=1, cutoff=0.8)
            hint = f"; did you mean 'trainer.{near[0]}'?" if near else "; remove it, or use engine: trl"
            yield f"trainer.{key}", f"has no meaning for engine torchtitan, which takes {', '.join(NAMES)}{hint}"
    try:
        _validated({key: value for key, value in section.items() if key in NAMES})
    except ValidationError as error:
        # A union reports each of its members; the value is wrong once.
        wrong = {str(each["loc"][0]): each for each in reversed(error.errors())}
        for key, each in wrong.items():
            yield f"trainer.{key}", f"{each['msg']} (got {each['input']!r}); engine torchtitan takes no other"


def _validated(section: dict[str, Any]) -> TrainerKeys:
    # As JSON: from Python objects, strict validation takes a dataclass only as an instance of it.
    return TypeAdapter(TrainerKeys).validate_json(json.dumps(section, default=str))


def recipe_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(dotted key, message) of everything in a recipe that this engine cannot do, whatever the model."""
    yield from trainer_problems(recipe.trainer)
    for key in recipe.model.kwargs:
        yield f"model.{key}", "is for from_pretrained, which engine torchtitan does not call; remove it"
    if recipe.model.dtype == "float16":
        yield "model.dtype", "got 'float16', whose gradients need loss scaling; want bfloat16, float32 or auto"
    if recipe.lora is not None:
        yield (
            "lora",
            "is not offered by engine torchtitan: its adapters are dropped when it saves, and they would train "
            "beside a weight that is not the one served; want engine: trl",
        )
    if recipe.optimizer.offload:
        yield (
            "optimizer.offload",
            "does not go with FSDP2, by which torchtitan always shards; remove it, start more ranks, or engine: trl",
        )
    if recipe.quantize is not None and recipe.quantize.embeddings:
        yield (
            "quantize.embeddings",
            "is not offered by engine torchtitan, whose embedding looks up in a way of its own; want engine: trl",
        )
