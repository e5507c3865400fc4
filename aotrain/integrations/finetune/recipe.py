"""The fine-tuning recipe: every key, its unit, its default and why.

``load_recipe`` reads a YAML file into a ``Recipe`` or raises one ``ConfigError`` with all problems. Both engines take
the same recipe. Nothing here imports torch, so a mistake is shown within a second; what only the libraries know (the
keys of `trainer`, the model's layers) is checked by ``aotrain finetune FILE --check`` and again before training.

Sections are frozen dataclasses, so a recipe can be written in Python too:

    Recipe(model=Model(path="Qwen/Qwen3-0.6B"), data=Data(path="trl-lib/Capybara"), trainer={"output_dir": "out"},
           optimizer=Optimizer(name="adamw_8bit", lr=2e-5), quantize=Quantize(scheme="int4-g32"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from aotrain.integrations.config_file import STRICT, Check, load_config
from aotrain.integrations.finetune.names import EXPORT_FORMATS, SCHEMES, float8_recipe, one_of, optimizer_name
from aotrain.integrations.finetune.rules import check_recipe

# The built-in offline data: docstrings and functions of Python's standard library.
STDLIB_PAIRS = "stdlib-pairs"

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]

# Other spellings of a key, so that lines of someone's existing file can be pasted.
ALIASES = {
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "model.torch_dtype": "model.dtype",
    "qat.fake_quant_after_n_steps": "quantize.start_step",
    "qat.quantize_embedding": "quantize.embeddings",
    "fp8.recipe_name": "float8",
    "optim": "optimizer.name",
    "optimizer": "optimizer.name",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "output_dir": "trainer.output_dir",
    "num_epochs": "trainer.num_train_epochs",
    "num_train_epochs": "trainer.num_train_epochs",
    "max_steps": "trainer.max_steps",
    "micro_batch_size": "trainer.per_device_train_batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "lr_scheduler_type": "trainer.lr_scheduler_type",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class Model(_Section):
    """The network. Keys beyond these go to `AutoModelForCausalLM.from_pretrained` as they are."""

    # A folder or a hub id; null: random weights, of the architecture in `config`.
    path: str | None = None
    # Of the weights while they are trained; auto: that of the checkpoint.
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    # With path null: {model_type: llama, hidden_size: 128, ...}, the keys of the transformers configuration.
    # vocab_size and the special tokens are the tokenizer's.
    config: dict[str, Any] | None = None
    # A folder, a hub id or byte (256 bytes and 3 specials, built here); null: that of path.
    tokenizer: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data(_Section):
    """Rows as TRL takes them: text, prompt and completion, or messages. Other keys go to `datasets.load_dataset`."""

    # The first argument of load_dataset (a hub id, or json with data_files, ...), or stdlib-pairs: the first paragraph
    # of a docstring as prompt and the source of its function as completion, from Python's standard library.
    path: str
    split: str = "train"
    # Only the first rows; null: all.
    max_rows: Positive | None = None
    # stdlib-pairs: leave out pairs of more characters.
    max_chars: Positive | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantize(_Section):
    """Quantization-aware training: forward sees the values that the exported checkpoint will have."""

    # A name of `aotrain.quantization.SCHEMES`.
    scheme: Annotated[str, AfterValidator(one_of(SCHEMES))]
    # Patterns of layer names (fnmatch) that keep their precision.
    exclude: tuple[str, ...] = ("lm_head",)
    # Optimizer steps without fake quantization first; an untrained model needs some, a pretrained one few or none.
    start_step: NonNegative = 0
    # Optimizer steps over which it is then turned on gradually; 0: at once.
    anneal_steps: NonNegative = 0
    # Token embeddings too.
    embeddings: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer(_Section):
    """The update rule. Options of the class beyond these are `trainer.optim_args`: "block_size=128,seed=1"."""

    # adamw: torch's own. adamw_8bit and the others of `aotrain.integrations.optimizers`, or class names.
    name: Annotated[str, AfterValidator(optimizer_name)] = "adamw"
    # Peak learning rate.
    lr: Annotated[float, Field(gt=0)]
    # Decoupled; biases and norms are not decayed.
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    # cpu: state and arithmetic in host memory. Not under FSDP2, whose own offload does that.
    offload: Literal["cpu"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora(_Section):
    """Low-rank adapters, by peft. With `quantize`, training sees W + scale * B A quantized, as it is served."""

    # Rank.
    r: Positive = 16
    # The update is scaled by alpha / r.
    alpha: Annotated[float, Field(gt=0)] = 32
    # Names of layers, or all-linear: all but the output layer.
    targets: str | tuple[str, ...] = "all-linear"
    # These two not with quantize: neither is part of the weight that is served.
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_dora: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Export(_Section):
    """The quantized checkpoint that is written after training."""

    # compressed-tensors: vLLM, SGLang, transformers. torchao: transformers and ExecuTorch. gguf-grid: dense weights on
    # the grid of llama.cpp's Q4_0, whose conversion loses nothing. float8-block: fp8-block as DeepSeek's checkpoints.
    format: Annotated[str, AfterValidator(one_of(EXPORT_FORMATS))] = "compressed-tensors"
    # A folder that does not exist yet.
    path: str
    # Read the file again and compare it bit for bit.
    verify: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate(_Section):
    """Perplexities on text that was held out, in a table and in `output_dir`/summary.json."""

    # A part of the rows below 1, or a number of rows. With stdlib-pairs whole files are held out.
    heldout: Annotated[float, Field(gt=0)] = 0.05
    # Train a second time, same steps and data, without fake quantization: what quantization costs, and how much of it
    # the training recovers, is only known against that.
    control: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(_Section):
    """One fine-tuning run."""

    model: Model
    data: Data
    # null: no quantization-aware training.
    quantize: Quantize | None = None
    # Products of linear layers in float8: a recipe of `convert_to_float8_training`. lm_head keeps its precision.
    float8: Annotated[str, AfterValidator(float8_recipe)] | None = None
    optimizer: Optimizer
    # null: all weights are trained.
    lora: Lora | None = None
    # `trl.SFTConfig`, as it is; engine torchtitan takes some of its keys and refuses the others. output_dir is needed;
    # learning rate, betas and so on are those of `optimizer`.
    trainer: dict[str, Any]
    export: Export | None = None
    evaluate: Evaluate | None = None
    # trl: every causal model of transformers. torchtitan: Llama and Qwen3, under FSDP2 on any number of ranks.
    engine: Literal["trl", "torchtitan"] = "trl"

    @property
    def output_dir(self) -> Path:
        """The folder of everything that the run writes."""
        return Path(self.trainer["output_dir"])


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check: Check = check_recipe) -> Recipe:
    """Read and check a fine-tuning recipe.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` strings, applied in order.
        check: rules that span several keys. `engines.problems` asks the engine's libraries too, and loads them.

    Raises:
        ConfigError: naming every problem with file, line, key and remedy.
    """
    return load_config(path, Recipe, overrides, aliases=ALIASES, check=check, flag="--")
