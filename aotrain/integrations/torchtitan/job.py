"""The pretraining job file: every key, its unit, its default and why.

``load_job`` reads a YAML file into a ``PretrainJob`` or raises one ``ConfigError`` with all problems. Nothing here
imports torch or torchtitan, so a mistake in a job is shown within a second.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from aotrain.integrations.config_file import Section, load_config
from aotrain.integrations.optimizers import ALIASES as OPTIMIZER_ALIASES
from aotrain.integrations.torchtitan.families import FAMILIES
from aotrain.integrations.torchtitan.job_rules import LOCAL_DATASETS, broken_rules

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]

# Short recipe names that users of other toolkits have in their files.
_RECIPE_PREFIX = "float8_"

# Other spellings of a key, so that a section of someone's existing file can be pasted.
ALIASES = {"optim": "optimizer.name", "fp8.recipe_name": "precision.recipe"}


class Model(Section):
    """Which network. Sizes are torchtitan's own, except `debug`."""

    # deepseek_v3 and qwen3_moe are mixtures of experts.
    family: Literal["llama3", "deepseek_v3", "qwen3_moe"] = "llama3"
    # llama3: debug, 1b, 8b, 70b. deepseek_v3: debug, debugmodel, 16b, 236b, 671b. qwen3_moe: debugmodel, 30b, 235b.
    # debug: dim 128, 4 layers, 0.9 M parameters (1.8 M with experts), learns visibly in 20 s on two CPU cores.
    # debugmodel: torchtitan's, 2048 tokens. Others: as published.
    size: str
    # auto: masked SDPA on CPU, FlexAttention on GPU. All of them keep packed documents apart. sdpa builds a mask of
    # batch * seq_len^2 bytes, which is too much for long sequences.
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"

    @field_validator("size")
    @classmethod
    def _size_of_family(cls, value: str, info: Any) -> str:
        family = info.data.get("family")
        if family is not None and value not in FAMILIES[family].sizes:
            raise ValueError(f"got {value!r}, want one of {', '.join(FAMILIES[family].sizes)} of {family}")
        return value


RecipeName = Literal[
    "float8_tensorwise",
    "float8_rowwise",
    "float8_rowwise_with_gw_hp",
    "float8_blockwise",
    "int8_rowwise",
    "mxfp8",
    "mxfp8_gw_hp",
    "mxfp4",
    "nvfp4",
]
# mxfp4 is not for groups of rows.
ExpertsRecipeName = Literal[
    "float8_tensorwise",
    "float8_rowwise",
    "float8_rowwise_with_gw_hp",
    "float8_blockwise",
    "int8_rowwise",
    "mxfp8",
    "mxfp8_gw_hp",
    "nvfp4",
]


class Precision(Section):
    """Number formats of the matrix products and of the master copy that FSDP gathers."""

    # null: every product in param_dtype. Otherwise the format of the three products of each converted linear layer.
    recipe: RecipeName | None = None
    # The same for the experts of a mixture of experts, whose products are independent of `recipe`.
    experts: ExpertsRecipeName | None = None
    # Format of tokens on their way to experts on other ranks (parallelism.ep), and of the gradients of what comes back;
    # what travels the other way is summed and stays in param_dtype. Experts in mxfp8 round these rows to mxfp8 anyway.
    # null: param_dtype.
    expert_dispatch: Literal["mxfp8", "float8_rowwise"] | None = None
    # Layers that stay in param_dtype: globs, or any part of the layer's name ("layers.0.", "feed_forward.w2",
    # "experts"). The output layer is kept because its input gradient decides the loss most directly. The gates of
    # routers always are. With nvfp4 keep the last 15 % of the blocks too, as its paper does; of 32 blocks:
    # [lm_head, "layers.2[7-9].*", "layers.3[01].*"].
    skip: list[str] = Field(default=["lm_head"])
    # True: round to float8 values but multiply in high precision. Same recipe on hardware without float8, but slow.
    # CPU runs always emulate.
    emulate: bool = False
    # True: FSDP gathers the converted layers' weights as codes, one byte per element instead of param_dtype's two, with
    # the same losses bit for bit.
    fsdp_float8_all_gather: bool = False
    # Format of gathered parameters and activations; master weights and reductions are always float32.
    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def recipes(self) -> dict[str, str]:
        """The keys that name a recipe, with it."""
        named = {"recipe": self.recipe, "experts": self.experts}
        return {key: recipe for key, recipe in named.items() if recipe is not None}

    @field_validator("recipe", "experts", mode="before")
    @classmethod
    def _long_name(cls, value: Any) -> Any:
        short = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise")
        return _RECIPE_PREFIX + value if value in short else value


class Optimizer(Section):
    """The update rule. Defaults are those of the Llama papers."""

    # adamw_8bit and adamw_fp8 keep both moments in 8 bits per value with one scale per block: 4 times less state.
    # adamw_4bit in 4 bits: 7 times less, and a slightly slower descent. adamw_32bit is adamw with
    # bf16_stochastic_round.
    name: Literal["adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8", "adamw_32bit"] = "adamw"
    # Peak learning rate, after warmup.
    lr: Annotated[float, Field(gt=0)] = 3e-4
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    # Decoupled; multiplied with the current learning rate.
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    # Round bf16 parameters stochastically in the update; no effect on float32 master weights.
    bf16_stochastic_round: bool = False
    # State of the token embedding: 32 (safest: rarely seen rows), 8, 4, fp8, or own for what all others have.
    embedding_bits: Literal[32, 8, 4, "fp8", "own"] = 32
    # Regular expression -> state of the parameters whose name it matches: 32, 8, 4 or fp8. The first match wins, and
    # wins over embedding_bits.
    bits: dict[str, Literal[32, 8, 4, "fp8"]] = Field(default_factory=dict)

    @field_validator("name", mode="before")
    @classmethod
    def _our_name(cls, value: Any) -> Any:
        return OPTIMIZER_ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("bits")
    @classmethod
    def _patterns(cls, value: dict[str, int | str]) -> dict[str, int | str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value

    @field_validator("betas")
    @classmethod
    def _unit_interval(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"got {list(value)}, want two numbers in [0, 1)")
        return value


class Schedule(Section):
    """Learning rate over the run: linear warmup, an optional flat part, decay."""

    # Steps from 0 to the peak rate; cut to the length of the schedule, with a warning, if that is shorter.
    warmup_steps: NonNegative = 200
    decay: Literal["linear", "cosine", "sqrt"] = "cosine"
    # Part of total_steps that decays; null: everything after warmup.
    decay_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    # Rate at the end as a part of the peak rate.
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    # Length of the schedule; null: training.steps. Give it when a run is continued beyond its first length.
    total_steps: Positive | None = None


class Data(Section):
    """Text, and how it is cut into batches."""

    # stdlib: the Python standard library's source (11 MB, no network). c4: allenai/c4, streamed from the hub.
    # hub: any dataset id of the Hugging Face hub in `path`. text / json / parquet: local files in `path`.
    dataset: Literal["stdlib", "c4", "hub", "text", "json", "parquet"] = "stdlib"
    # A file, a folder or a glob for local text; a dataset id for hub.
    path: str | None = None
    # Files for validation; null: one document in twenty is held out (for hub: its "validation" split is used).
    validation_path: str | None = None
    # Column that holds the text (json, parquet, hub).
    text_field: str = "text"
    # Configuration of a hub dataset, such as "en".
    hub_config: str | None = None
    # Tokens per sequence.
    seq_len: Positive = 2048
    # Sequences per optimizer step, all ranks together; null: batch_size * data-parallel ranks of the first start. A
    # continued run keeps it, whatever the number of ranks.
    global_batch_size: Positive | None = None
    # Sequences per rank and forward pass; null: global_batch_size / data-parallel ranks of the first start, without
    # accumulation, and later no more than that.
    batch_size: Positive | None = None
    # sequence: ranks take turns in one global stream of sequences; every rank tokenizes everything. document: the
    # documents are dealt onto many streams, and a rank reads only some; for large data. With both, a step sees the same
    # text with any number of ranks.
    shard_by: Literal["sequence", "document"] = "sequence"
    # 1: read and tokenize in a background process. 0: in the training process; repeatable and light for small data.
    workers: Annotated[int, Field(ge=0, le=1)] = 0

    @field_validator("path", "validation_path")
    @classmethod
    def _exists(cls, value: str | None, info: Any) -> str | None:
        dataset = info.data.get("dataset")
        if value is None or dataset not in LOCAL_DATASETS:
            return value
        if not glob.glob(value, recursive=True):
            raise ValueError(f"no such file: {value!r} (looked from {Path.cwd()}); want a file, a folder or a glob")
        return value


class Training(Section):
    """Length and mechanics of the run."""

    # Optimizer steps.
    steps: Positive
    # Of weights and data order; the same job with the same seed repeats bit for bit.
    seed: NonNegative = 0
    # Gradients are scaled down to this global 2-norm.
    max_norm: Annotated[float, Field(gt=0)] = 1.0
    # torch.compile of each transformer block and of the loss. Pays on GPUs; costs a minute at the start.
    compile: bool = False
    # none: fastest. selective: recompute cheap operations. full: recompute whole blocks, least memory.
    activation_checkpoint: Literal["none", "selective", "full"] = "none"
    # auto: the GPU if torch sees one.
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Parallelism(Section):
    """How the ranks of torchrun are laid out. Their product is the number of ranks."""

    # Groups of ranks that hold full copies (HSDP).
    dp_replicate: Positive = 1
    # Ranks that share one copy (FSDP2). -1: all that are left.
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    # Ranks that split each layer.
    tp: Positive = 1
    # Ranks that share the experts of a layer, each with whole ones; tokens are sent to them. Taken out of
    # dp_shard * tp, which it divides.
    ep: Positive = 1

    @field_validator("dp_shard")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("got 0, want -1 (all ranks that are left) or a positive number")
        return value


class Checkpoint(Section):
    """Full training state (weights, optimizer, data position) in `output_dir`/checkpoint, in torch DCP format."""

    enabled: bool = True
    # Steps between two checkpoints; the last step is always saved.
    every: Positive = 500
    # Newest ones to keep; 0 keeps all. Not 1: the newest may be half written when the machine dies.
    keep: NonNegative = 2
    # auto: continue from the newest complete checkpoint of output_dir. never: refuse an output_dir that holds a run.
    resume: Literal["auto", "never"] = "auto"
    # Write in a background thread while training goes on.
    async_: bool = Field(default=False, alias="async")
    # A checkpoint folder (.../step-N) whose weights this run starts from, with fresh optimizer and data.
    init_from: str | None = None

    @field_validator("keep")
    @classmethod
    def _not_one(cls, value: int) -> int:
        if value == 1:
            raise ValueError("got 1, want 0 (keep all) or at least 2: the newest may be incomplete after a crash")
        return value

    @field_validator("init_from")
    @classmethod
    def _is_checkpoint(cls, value: str | None) -> str | None:
        if value is not None and not (Path(value) / ".metadata").is_file():
            raise ValueError(f"{value!r} is not a checkpoint: want a folder such as runs/NAME/checkpoint/step-100")
        return value


class Validation(Section):
    """Loss on held-out text."""

    # Steps between two measurements; also at step 1 and at the end. null: never.
    every: Positive | None = 100
    # Global batches per measurement: as many sequences with any number of ranks.
    steps: Positive = 10


class Wandb(Section):
    """Weights & Biases. `offline` needs no account; upload later with `wandb sync`."""

    project: str = "aotrain"
    mode: Literal["online", "offline"] = "online"
    # Name of the run; null: the name of output_dir.
    name: str | None = None


class Metrics(Section):
    """What is recorded. `output_dir`/metrics.jsonl is always written."""

    # Steps between two records.
    every: Positive = 10
    tensorboard: bool = True
    wandb: Wandb | None = None


class PretrainJob(Section):
    """One pretraining run."""

    model: Model
    precision: Precision = Precision()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    data: Data = Data()
    # byte: 256 bytes and 3 specials, built here. Otherwise a local folder with tokenizer.json, or a hub id.
    tokenizer: str = "byte"
    training: Training
    parallelism: Parallelism = Parallelism()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    metrics: Metrics = Metrics()
    # Everything the run writes; null: runs/NAME of the job file.
    output_dir: str | None = None


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> PretrainJob:
    """Read and check a pretraining job file.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` strings, applied in order.

    Raises:
        ConfigError: naming every problem with file, line, key and remedy.
    """
    job = load_config(path, PretrainJob, overrides, aliases=ALIASES, check=broken_rules)
    if job.output_dir is None:
        job = job.model_copy(update={"output_dir": str(Path("runs") / Path(path).stem)})
    return job
