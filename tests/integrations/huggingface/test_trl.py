"""Our optimizers in TRL's SFTTrainer: full fine-tuning, LoRA, and resumption."""

import pytest

pytest.importorskip("trl", reason="needs the [hf] extra: pip install -e '.[hf]'")

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from aotrain.integrations.huggingface import optimizer_cls_and_kwargs
from aotrain.testing import assert_bitwise_equal
from tests.integrations.huggingface.tiny import VOCABULARY, losses, tiny_llama

WORDS = [f"w{number}" for number in range(VOCABULARY - 3)]


def sft_trainer(folder, peft_config=None, **options) -> SFTTrainer:
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    texts = [" ".join(WORDS[(start + i) % len(WORDS)] for i in range(16)) for start in range(0, 96, 3)]
    settings = {
        "learning_rate": 3e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "optim": "adamw_torch_4bit",
        "optim_args": "bf16_stochastic_round=true",
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_length": 32,
    }
    args = SFTConfig(output_dir=str(folder), **settings | options)
    return SFTTrainer(
        tiny_llama(),
        args=args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=fast,
        peft_config=peft_config,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(None, args),
    )


def test_fine_tuning_and_resumption(tmp_path):
    whole = sft_trainer(tmp_path / "whole")
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    assert {group["bits"] for group in whole.optimizer.param_groups} == {4, 32}
    resumed = sft_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert_bitwise_equal(resumed.model.state_dict()[name], value, what=name)


def test_lora_has_state_of_adapters_only(tmp_path):
    trained = sft_trainer(tmp_path, LoraConfig(r=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    trained.train()
    names = [name for group in trained.optimizer.param_groups for name in group["param_names"]]
    assert len(names) == 4
    assert all(".lora_" in name for name in names)
    assert len(trained.optimizer.state) == 4
