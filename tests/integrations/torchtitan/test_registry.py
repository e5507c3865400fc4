"""Stock configs through torchtitan's own configuration manager, on the CPU."""

import pytest
from torchtitan.config import ConfigManager
from torchtitan.models.common.attention import FlexAttention

from aotrain.integrations.byte_tokenizer import byte_tokenizer_dir
from aotrain.integrations.torchtitan import registry
from aotrain.integrations.torchtitan.attention import DocumentSDPA
from aotrain.integrations.torchtitan.train import _train, single_process_environment

MODULE = "aotrain.integrations.torchtitan.registry"


@pytest.mark.parametrize("config", ["llama3.llama3_debugmodel", "llama3.llama3_debugmodel_varlen_attn"])
def test_a_stock_config_trains_with_our_overrides(config, tmp_path, capfd):
    (tmp_path / "text.json").write_text('{"text": "some text to learn, again and again. "}\n' * 200)
    arguments = [
        *("--module", MODULE, "--config", config),
        *("--training.steps", "2", "--training.local_batch_size", "1", "--training.seq_len", "64"),
        *("--dataloader.dataset", "c4_test", "--dataloader.dataset_path", str(tmp_path)),
        *("--hf_assets_path", str(byte_tokenizer_dir()), "--dump_folder", str(tmp_path / "out")),
        "--debug.no-enable_structured_logging",
        *("--override.imports", "aotrain.integrations.torchtitan.overrides.float8_linear"),
        *("aotrain.integrations.torchtitan.overrides.optimizer", "aotrain.integrations.torchtitan.overrides.metrics"),
    ]
    parsed = ConfigManager().parse_args(arguments)
    assert parsed.training.disable_cuda_graphs
    single_process_environment()
    _train(parsed)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_attention_is_replaced_and_keeps_its_place():
    config = registry.stock_config("llama3", "llama3_debugmodel")
    kinds = [type(layer.attention.inner_attention) for layer in config.model_spec.model.layers]
    assert kinds == [DocumentSDPA.Config] * 6
    assert not list(config.model_spec.model.traverse(FlexAttention.Config))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama9.llama9_8b", "no model 'llama9' in torchtitan"),
        ("llama3.llama3_9b", "no such function; llama3 has .*llama3_8b"),
    ],
    ids=["model", "function"],
)
def test_names_that_do_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        getattr(registry, name)()


def test_a_name_without_a_dot_is_no_config():
    with pytest.raises(AttributeError, match=r"want MODEL.FUNCTION, as llama3.llama3_8b"):
        registry.__getattr__("llama3_8b")
