"""Every shipped job becomes a Trainer.Config; what the config says where torch versions and devices differ."""

from pathlib import Path

import pytest
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.trainer import Trainer

from aotrain.integrations.byte_tokenizer import BYTE_VOCAB_SIZE
from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan import compat
from aotrain.integrations.torchtitan.attention import DocumentSDPA
from aotrain.integrations.torchtitan.build import build_config
from aotrain.integrations.torchtitan.checkpointing import SelectiveProducts
from aotrain.integrations.torchtitan.dispatcher import QuantizedTokenDispatcher, quantize_dispatch
from aotrain.integrations.torchtitan.job import load_job
from aotrain.integrations.torchtitan.linear import Float8Linear
from aotrain.integrations.torchtitan.models import vocab_size

from .conftest import CONFIGS

# Job file -> ranks and what one of them holds per forward pass.
SHIPPED = {
    "llama3_debug_bf16_cpu": (1, 8),
    "llama3_debug_float8_rowwise_cpu": (1, 8),
    "llama3_1b_float8_tensorwise_1xh200": (1, 8),
    "llama3_8b_float8_rowwise_8xh100": (8, 1),
    "llama3_70b_float8_rowwise_256xh100": (256, 4),
    "deepseek_v3_debug_moe_bf16_cpu": (1, 8),
    "deepseek_v3_debug_moe_float8_rowwise_cpu": (1, 8),
    "deepseek_v3_debug_moe_mxfp8_cpu": (1, 8),
    "deepseek_v3_16b_moe_float8_blockwise_8xh200": (8, 4),
    "deepseek_v3_16b_moe_mxfp8_8xb200": (8, 4),
    "qwen3_30b_moe_float8_rowwise_8xh200": (8, 2),
}


def build(name: str, *overrides: str, num_ranks: int = 1, device_type: str | None = None) -> Trainer.Config:
    job = load_job(CONFIGS / f"{name}.yaml", overrides)
    device_type = device_type or ("cpu" if name.endswith("cpu") else "cuda")
    return build_config(job, device_type=device_type, num_ranks=num_ranks, tokenizer_dir=Path("unused"))


def test_no_job_is_forgotten():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_job_builds(name):
    num_ranks, local_batch = SHIPPED[name]
    config = build(name, num_ranks=num_ranks)
    assert config.training.local_batch_size == local_batch
    precision = load_job(CONFIGS / f"{name}.yaml").precision
    model = config.model_spec.model
    found = {node.recipe for _, node, _, _ in model.traverse(Float8Linear.Config)}
    assert found == ({precision.recipe} if precision.recipe else set())
    found = {getattr(node, "recipe", None) for _, node, _, _ in model.traverse(GroupedExperts.Config)}
    assert found == ({precision.experts} if "moe" in name else set())
    assert config.to_dict()["dataloader"]["data"]["dataset"] in ("stdlib", "c4")


def test_parameter_counts_are_those_of_the_published_models():
    import torch

    counts = {}
    for family, sizes in {
        "llama3": ("debug", "1b", "8b"),
        "deepseek_v3": ("debug", "16b"),
        "qwen3_moe": ("30b",),
    }.items():
        for size in sizes:
            overrides = (f"model.family={family}", f"model.size={size}", "data.seq_len=64")
            config = build("llama3_debug_bf16_cpu", *overrides, device_type="cuda")
            with torch.device("meta"):
                model = config.model_spec.model.build()
            counts[f"{family}_{size}"] = sum(p.numel() for p in model.parameters())
    assert counts == {
        "llama3_debug": 935_040,
        "llama3_1b": 1_235_814_400,
        "llama3_8b": 8_030_261_248,
        "deepseek_v3_debug": 1_831_296,
        "deepseek_v3_16b": 15_706_484_224,
        "qwen3_moe_30b": 30_532_122_624,
    }


def test_the_debug_vocabulary_holds_the_byte_tokenizer():
    size = vocab_size(build("llama3_debug_bf16_cpu").model_spec)
    assert size >= BYTE_VOCAB_SIZE
    assert size % 64 == 0


def test_cpu_and_gpu_choose_their_attention(monkeypatch):
    monkeypatch.setattr(compat, "flex_attention_works", lambda: True)
    kinds = {}
    for device_type in ("cpu", "cuda"):
        config = build("llama3_debug_bf16_cpu", device_type=device_type)
        kinds[device_type] = type(config.model_spec.model.layers[0].attention.inner_attention)
    assert kinds == {"cpu": DocumentSDPA.Config, "cuda": FlexAttention.Config}
    config = build("llama3_8b_float8_rowwise_8xh100", "model.attention=sdpa", num_ranks=8)
    assert all(type(layer.attention.inner_attention) is DocumentSDPA.Config for layer in config.model_spec.model.layers)


@pytest.mark.parametrize(
    ("version", "loss", "backend", "attention", "no_graphs"),
    [
        ("2.11.0+cu130", CrossEntropyLoss, "partial_dtensor", DocumentSDPA, True),
        ("2.13.1", ChunkedLossWrapper, "partial_dtensor", FlexAttention, True),
        ("2.15.0a0+git12", ChunkedLossWrapper, "spmd_types", FlexAttention, False),
    ],
    ids=["2.11", "2.13", "2.15"],
)
def test_each_torch_gets_what_works_on_it(monkeypatch, version, loss, backend, attention, no_graphs):
    monkeypatch.setattr("torch.__version__", version)
    config = build("llama3_8b_float8_rowwise_8xh100", num_ranks=8)
    assert type(config.loss) is loss.Config
    assert config.parallelism.spmd_backend == backend
    assert type(config.model_spec.model.layers[0].attention.inner_attention) is attention.Config
    assert config.training.disable_cuda_graphs is no_graphs
    assert isinstance(config.activation_checkpoint, SelectiveAC.Config)
    assert compat.torch_version() == tuple(map(int, version.split(".")[:2]))


MOE = "deepseek_v3_debug_moe_float8_rowwise_cpu"


def test_expert_parallelism_is_set_and_checked(monkeypatch):
    for attention in ("flex", "sdpa", "varlen"):
        config = build(MOE, "parallelism.ep=4", f"model.attention={attention}", num_ranks=8)
        assert config.parallelism.expert_parallel_degree == 4
    monkeypatch.setattr("torch.__version__", "2.15.0")
    config = build(MOE, "parallelism.ep=4", "training.device=cuda", num_ranks=8, device_type="cuda")
    assert config.training.disable_cuda_graphs
    with pytest.raises(JobError, match=r"parallelism.ep: got 4, want a divisor of dp_shard \* tp, 2 ranks"):
        build(MOE, "parallelism.ep=4", num_ranks=2)
    with pytest.raises(JobError, match=r"parallelism.ep: got 16, want a divisor of the 8 experts of layers.1.moe"):
        build(MOE, "parallelism.ep=16", "data.global_batch_size=16", num_ranks=16)
    monkeypatch.setattr("torch.__version__", "2.11.0")
    with pytest.raises(JobError, match=r"parallelism.ep: got 4, but torchtitan's expert parallelism needs torch 2.13"):
        build(MOE, "parallelism.ep=4", num_ranks=8)


@pytest.mark.parametrize("payload", [None, "mxfp8", "float8_rowwise"])
def test_tokens_travel_as_the_job_says(monkeypatch, payload):
    monkeypatch.setattr(compat, "expert_parallel_works", lambda: True)
    keys = ("parallelism.ep=2", f"precision.expert_dispatch={payload or 'null'}")
    for model in ((), ("model.family=qwen3_moe", "model.size=30b")):
        config = build(MOE, "precision.experts=null", *keys, *model, num_ranks=2)
        nodes = [node for _, node, _, _ in config.model_spec.model.traverse(QuantizedTokenDispatcher.Config)]
        assert {node.payload for node in nodes} == ({payload} if payload else set())
        assert len(nodes) == (0 if payload is None else 48 if model else 3)


def test_a_model_whose_tokens_do_not_travel_is_an_error():
    with pytest.raises(ValueError, match="has no experts with the standard all-to-all dispatcher; set it to null"):
        quantize_dispatch(build("llama3_debug_bf16_cpu").model_spec.model, "mxfp8")


def test_experts_alone_have_a_recipe():
    config = build(MOE, "precision.recipe=null", "training.activation_checkpoint=selective")
    assert not list(config.model_spec.model.traverse(Float8Linear.Config))
    assert isinstance(config.activation_checkpoint, SelectiveProducts.Config)
    with pytest.raises(JobError, match=r"precision.experts float8_rowwise: no layer was converted"):
        build(MOE, "precision.skip=[experts]")


def test_shims_add_only_what_is_missing(monkeypatch):
    import torch

    assert compat.install() == []
    monkeypatch.delattr(torch.distributed, "set_timeout")
    monkeypatch.delattr(torch.compiler, "_is_non_strict_tracing", raising=False)
    monkeypatch.delattr(torch.distributed.fsdp, "DataParallelMeshDims", raising=False)
    assert compat.install() == [
        "torch.distributed.set_timeout",
        "torch.distributed.fsdp.DataParallelMeshDims",
        "torch.compiler._is_non_strict_tracing",
    ]
    dims = torch.distributed.fsdp.DataParallelMeshDims(shard="fsdp", replicate=None)
    assert dims.shard == "fsdp"
    assert torch.compiler._is_non_strict_tracing() is False


def test_a_skip_that_matches_nothing_is_a_job_error():
    with pytest.raises(JobError, match=r"precision.skip: 'w9' matches no linear layer"):
        build("llama3_debug_float8_rowwise_cpu", "precision.skip=[w9]")
