"""The pretraining job file: defaults, aliases, rules that span keys, and batch arithmetic."""

import pytest

from aotrain.integrations.config_file import ConfigError
from aotrain.integrations.torchtitan.job import load_job
from aotrain.integrations.torchtitan.optim import TITAN_NAMES
from aotrain.recipes import RECIPE_ALIASES, RECIPES

from .conftest import CONFIGS

MINIMAL = "model: {size: debug}\ntraining: {steps: 5}\ndata: {global_batch_size: 8}\n"


@pytest.fixture
def load(tmp_path):
    def load_text(text: str = MINIMAL, *overrides: str):
        path = tmp_path / "myjob.yaml"
        path.write_text(text)
        return load_job(path, overrides)

    return load_text


def problem(load, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL, *overrides)
    (only,) = caught.value.problems
    return f"{only.key}: {only.message}"


def test_output_dir_defaults_to_the_name_of_the_file(load):
    assert load().output_dir == "runs/myjob"


def test_every_recipe_of_the_table_can_be_named(load):
    for name in [*RECIPES, *RECIPE_ALIASES]:
        recipe = load(MINIMAL, f"precision.recipe={name}").precision.recipe
        assert RECIPES[recipe] == RECIPES[RECIPE_ALIASES.get(name, name)]


def test_mx_weights_are_not_gathered_as_codes(load):
    message = problem(load, "precision.recipe=mxfp8", "precision.fsdp_float8_all_gather=true")
    assert "precision.fsdp_float8_all_gather: does not go with mxfp8" in message


def test_nvfp4_weights_are_neither_gathered_as_codes_nor_split(load):
    message = problem(load, "precision.recipe=nvfp4", "precision.fsdp_float8_all_gather=true")
    assert "precision.fsdp_float8_all_gather: does not go with nvfp4" in message
    message = problem(load, "precision.recipe=nvfp4", "parallelism.tp=2")
    assert "parallelism.tp: got 2, but nvfp4 layers cannot be split; want tp 1" in message
    assert load(MINIMAL + "precision: {recipe: nvfp4}\n").precision.recipe == "nvfp4"


def test_aliases_of_other_toolkits(load):
    job = load(MINIMAL + "optim: adamw_8bit\nfp8: {recipe_name: rowwise}\n")
    assert (job.optimizer.name, job.precision.recipe) == ("adamw_8bit", "float8_rowwise")
    assert load(MINIMAL + "optim: ao_adamw_fp8\n").optimizer.name == "adamw_fp8"


def test_optimizers_of_a_job_are_those_that_the_trainer_can_build(load):
    for name in TITAN_NAMES:
        assert load(MINIMAL, f"optimizer.name={name}").optimizer.name == name
    assert "want one of adamw, adamw_8bit" in problem(load, "optimizer.name=lion_8bit")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.global_batch_size=null"], "data.global_batch_size: is missing; give it, or data.batch_size per rank"),
        (["data.dataset=json"], "data.path: is missing; data.dataset 'json' needs it"),
        (["data.dataset=hub"], "data.path: is missing; data.dataset 'hub' needs it"),
        (["data.path=/tmp"], "data.path: is given but data.dataset 'stdlib' does not read it"),
        (["data.dataset=wikipedia"], "data.dataset: got 'wikipedia' (str), want one of stdlib, c4, hub"),
        (["precision.emulate=true"], "precision.emulate: is set but precision.recipe is null"),
        (
            ["precision.fsdp_float8_all_gather=true"],
            "precision.fsdp_float8_all_gather: is set but precision.recipe is null",
        ),
        (["precision.recipe=fp8"], "precision.recipe: got 'fp8' (str), want one of float8_tensorwise"),
        (["precision.experts=rowwise"], "precision.experts: is set but llama3 has no experts; name a recipe, or"),
        (
            ["precision.expert_dispatch=mxfp8"],
            "precision.expert_dispatch: got 'mxfp8', but llama3 has no experts; want null",
        ),
        (
            ["model.family=deepseek_v3", "precision.expert_dispatch=mxfp8"],
            "precision.expert_dispatch: got 'mxfp8', but with parallelism.ep 1 no token leaves its rank; want null, or",
        ),
        (
            ["model.family=deepseek_v3", "parallelism.ep=2", "precision.expert_dispatch=mxfp4"],
            "precision.expert_dispatch: got 'mxfp4' (str), want one of mxfp8, float8_rowwise",
        ),
        (["parallelism.ep=2"], "parallelism.ep: got 2, but llama3 has no experts; want 1"),
        (
            ["model.family=deepseek_v3", "parallelism.ep=4", "parallelism.dp_shard=2", "parallelism.tp=3"],
            "parallelism.ep: got 4, want a divisor of dp_shard * tp, 6 ranks",
        ),
        (["model.size=16b"], "model.size: got '16b', want one of debug, 1b, 8b, 70b of llama3"),
        (["model.family=qwen3_moe"], "model.size: got 'debug', want one of debugmodel, 30b, 235b of qwen3_moe"),
        (["model.family=mixtral"], "model.family: got 'mixtral' (str), want one of llama3, deepseek_v3, qwen3_moe"),
        (["tokenizer=gpt2"], "tokenizer: got 'gpt2', but model.size debug has 320 tokens"),
        (["optimizer.bf16_stochastic_round=true"], "optimizer.bf16_stochastic_round: is not offered by adamw"),
        (["optimizer.bits={norm: 32}"], "optimizer.bits: is not offered by adamw; want optimizer.name adamw_8bit"),
        (["optimizer.bits={'(': 8}"], "optimizer.bits: '(' is not a regular expression: missing )"),
        (["optimizer.betas=[0.9, 1.5]"], "optimizer.betas: got [0.9, 1.5], want two numbers in [0, 1)"),
        (["optimizer.lr=0"], "optimizer.lr: got 0 (int), want greater than 0"),
        (["checkpoint.keep=1"], "checkpoint.keep: got 1, want 0 (keep all) or at least 2"),
        (["checkpoint.init_from=/tmp"], "checkpoint.init_from: '/tmp' is not a checkpoint"),
        (["parallelism.dp_shard=0"], "parallelism.dp_shard: got 0, want -1"),
        (["training.steps=0"], "training.steps: got 0 (int), want greater than or equal to 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_rule_has_its_message(load, overrides, message):
    assert problem(load, *overrides).startswith(message)


@pytest.mark.parametrize(
    ("model", "keys"), [("llama3_debug", ["recipe"]), ("deepseek_v3_debug_moe", ["recipe", "experts"])]
)
def test_the_two_cpu_jobs_differ_only_in_the_recipe(model, keys):
    float8 = load_job(CONFIGS / f"{model}_float8_rowwise_cpu.yaml").to_dict()
    bf16 = load_job(CONFIGS / f"{model}_bf16_cpu.yaml").to_dict()
    for key in keys:
        assert float8["precision"].pop(key) == "float8_rowwise"
        assert bf16["precision"].pop(key) is None
    assert float8.pop("output_dir") != bf16.pop("output_dir")
    assert float8 == bf16
