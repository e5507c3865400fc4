"""From a job to torchtitan's ``Trainer.Config``.

Nothing is built and no device is touched: every shipped job can be turned into a config on a laptop. Call
``compat.install`` first, as everything here imports torchtitan.
"""

from __future__ import annotations

import os
from pathlib import Path

from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.config import CommConfig, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.protocols.model_spec import ModelSpec

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan import compat
from aotrain.integrations.torchtitan.batch import BatchSizes, SavedData, batch_sizes
from aotrain.integrations.torchtitan.checkpoint import CheckedCheckpoints
from aotrain.integrations.torchtitan.checkpointing import SelectiveProducts
from aotrain.integrations.torchtitan.data import TextDataLoader
from aotrain.integrations.torchtitan.fsdp import with_plain_sum
from aotrain.integrations.torchtitan.job import PretrainJob
from aotrain.integrations.torchtitan.metrics import RunMetrics
from aotrain.integrations.torchtitan.models import model_spec, vocab_size
from aotrain.integrations.torchtitan.optim import optimizer_config
from aotrain.integrations.torchtitan.run_dir import CHECKPOINTS
from aotrain.integrations.torchtitan.trainer import RunTrainer
from aotrain.integrations.torchtitan.validate import RunValidator
from aotrain.integrations.torchtitan.weight_init import name_parameter_inits

# A vocabulary from which on the logits are worth computing in pieces.
_LARGE_VOCAB = 32768


def build_config(
    job: PretrainJob, *, device_type: str, num_ranks: int, tokenizer_dir: Path, saved: SavedData | None = None
) -> RunTrainer.Config:
    """The trainer's config.

    Args:
        job: a checked job with its output_dir.
        device_type: "cpu" or "cuda".
        num_ranks: processes of the run.
        tokenizer_dir: from ``resolve_tokenizer``.
        saved: of the checkpoint that the run continues from.

    Raises:
        JobError: sizes that do not divide; a recipe or a skip that matches no layer.
    """
    assert job.output_dir is not None
    sizes = batch_sizes(job, num_ranks, saved)
    spec = _model_spec(job, device_type)
    _check_experts(job, spec, num_ranks)
    return RunTrainer.Config(
        model_spec=spec,
        hf_assets_path=str(tokenizer_dir),
        dump_folder=job.output_dir,
        loss=loss_config(spec),
        optimizer=optimizer_config(job.optimizer),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=job.schedule.warmup_steps,
            total_steps=job.schedule.total_steps,
            decay_ratio=job.schedule.decay_ratio,
            decay_type=job.schedule.decay,
            min_lr_factor=job.schedule.min_lr_ratio,
        ),
        training=TrainingConfig(
            local_batch_size=sizes.local,
            global_batch_size=sizes.total,
            seq_len=job.data.seq_len,
            max_norm=job.training.max_norm,
            steps=job.training.steps,
            mixed_precision_param=job.precision.param_dtype,
            # How many tokens another rank sends is known on the host only.
            disable_cuda_graphs=device_type == "cpu" or not compat.cuda_graphs_work() or job.parallelism.ep > 1,
        ),
        parallelism=ParallelismConfig(
            data_parallel_replicate_degree=job.parallelism.dp_replicate,
            data_parallel_shard_degree=job.parallelism.dp_shard,
            tensor_parallel_degree=job.parallelism.tp,
            expert_parallel_degree=job.parallelism.ep,
            spmd_backend=compat.spmd_backend(),
        ),
        dataloader=_train_data(job, spec, sizes, saved),
        validator=_validator(job, spec, sizes),
        metrics=_metrics(job),
        checkpoint=_checkpoint(job),
        activation_checkpoint=_activation_checkpoint(job),
        compile=CompileConfig(enable=job.training.compile),
        # The default 100 s between two collectives is short for a checkpoint to slow storage.
        comm=CommConfig(init_timeout_seconds=600, train_timeout_seconds=600),
        debug=DebugConfig(seed=job.training.seed, enable_structured_logging=False),
    )


def _model_spec(job: PretrainJob, device_type: str) -> ModelSpec:
    attention = job.model.attention
    if attention == "auto":
        attention = "flex" if device_type != "cpu" and compat.flex_attention_works() else "sdpa"
    spec = model_spec(job.model.family, job.model.size, attention)
    if job.precision.recipes:
        from aotrain.integrations.torchtitan.converters import Float8Converter

        converter = Float8Converter.Config(
            recipe=job.precision.recipe,
            experts=job.precision.experts,
            skip=list(job.precision.skip),
            emulate=job.precision.emulate,
            fsdp_float8_all_gather=job.precision.fsdp_float8_all_gather,
            model_compile_enabled=job.training.compile,
        )
        try:
            spec.model = converter.build().convert(spec.model)
        except ValueError as error:
            raise JobError(f"precision.{error}") from error
    if job.precision.expert_dispatch is not None:
        from aotrain.integrations.torchtitan.dispatcher import quantize_dispatch

        try:
            quantize_dispatch(spec.model, job.precision.expert_dispatch)
        except ValueError as error:
            raise JobError(f"precision.expert_dispatch: {error}") from error
    if device_type == "cpu":
        spec.parallelize_fn = with_plain_sum(spec.parallelize_fn)
        name_parameter_inits(spec.model, job.training.seed)
    return spec


def _check_experts(job: PretrainJob, spec: ModelSpec, num_ranks: int) -> None:
    ep, sharers = job.parallelism.ep, num_ranks // job.parallelism.dp_replicate
    if ep > 1 and not compat.expert_parallel_works():
        raise JobError(f"parallelism.ep: got {ep}, but torchtitan's expert parallelism needs torch 2.13; want 1")
    if sharers % ep:
        raise JobError(f"parallelism.ep: got {ep}, want a divisor of dp_shard * tp, {sharers} ranks")
    for fqn, experts, _, _ in spec.model.traverse(GroupedExperts.Config):
        assert isinstance(experts, GroupedExperts.Config)
        if experts.num_experts % ep:
            raise JobError(f"parallelism.ep: got {ep}, want a divisor of the {experts.num_experts} experts of {fqn}")


def loss_config(spec: ModelSpec) -> BaseLoss.Config:
    """Cross entropy, in pieces where the vocabulary makes logits large."""
    plain = CrossEntropyLoss.Config(global_vocab_size=vocab_size(spec))
    if vocab_size(spec) < _LARGE_VOCAB or not compat.chunked_loss_works():
        return plain
    return ChunkedLossWrapper.Config(loss_fn=plain)


def _train_data(job: PretrainJob, spec: ModelSpec, sizes: BatchSizes, saved: SavedData | None) -> TextDataLoader.Config:
    return TextDataLoader.Config(
        data=job.data,
        split="train",
        seed=job.training.seed,
        vocab_size=vocab_size(spec),
        global_batch=sizes.total,
        largest_batch=sizes.largest,
        num_streams=saved.num_streams if saved else None,
        num_workers=job.data.workers,
    )


def _validator(job: PretrainJob, spec: ModelSpec, sizes: BatchSizes) -> RunValidator.Config:
    return RunValidator.Config(
        enable=job.validation.every is not None,
        freq=job.validation.every or 1,
        # The trainer counts forward passes.
        steps=job.validation.steps * sizes.passes,
        last_step=job.training.steps,
        dataloader=TextDataLoader.Config(
            data=job.data,
            split="validation",
            seed=job.training.seed,
            vocab_size=vocab_size(spec),
            global_batch=sizes.total,
        ),
    )


def _metrics(job: PretrainJob) -> RunMetrics.Config:
    return RunMetrics.Config(
        log_freq=job.metrics.every,
        enable_tensorboard=job.metrics.tensorboard,
        enable_wandb=job.metrics.wandb is not None,
        disable_color_printing=True,
        total_steps=job.training.steps,
        low_precision=bool(job.precision.recipes),
    )


def _checkpoint(job: PretrainJob) -> CheckedCheckpoints.Config:
    init_from = job.checkpoint.init_from
    return CheckedCheckpoints.Config(
        enable=job.checkpoint.enabled,
        folder=CHECKPOINTS,
        interval=job.checkpoint.every,
        keep_latest_k=job.checkpoint.keep,
        # The last step is a full checkpoint too: a finished run can be continued.
        last_save_model_only=False,
        async_mode="async" if job.checkpoint.async_ else "disabled",
        initial_load_path=os.path.abspath(init_from) if init_from else None,
        initial_load_model_only=init_from is not None,
    )


def _activation_checkpoint(job: PretrainJob) -> SelectiveAC.Config | FullAC.Config | None:
    selective = SelectiveProducts.Config() if job.precision.recipes else SelectiveAC.Config()
    choices = {"none": None, "selective": selective, "full": FullAC.Config()}
    return choices[job.training.activation_checkpoint]
