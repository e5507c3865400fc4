"""Recipes: every shipped one loads without torch, and every mistake is said at once, with its place and remedy."""

import subprocess
import sys
from pathlib import Path

import pytest

from aotrain.integrations.config_file import ConfigError, JobError
from aotrain.integrations.finetune import Data, Model, Optimizer, Quantize, Recipe, engines, load_recipe, run
from aotrain.integrations.finetune.names import EXPORT_FORMATS, FLOAT8_RECIPES, SCHEMES, export_problem, float8_recipe
from aotrain.integrations.optimizers import OPTIMIZERS

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs" / "finetune").glob("*.yaml"))

PLAIN = """\
model: {path: some/model}
data: {path: some/rows}
quantize: {scheme: int4-g32}
optimizer: {name: adamw_8bit, lr: 2e-5}
trainer: {output_dir: out}
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write_file


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return [str(problem).replace(f"{path}:", "") for problem in caught.value.problems]


def test_every_shipped_recipe_is_valid_and_nothing_heavy_is_loaded():
    script = (
        "import sys\nfrom aotrain.integrations.finetune import load_recipe\n"
        "recipes = [load_recipe(path) for path in sys.argv[1:]]\n"
        "assert len(recipes) >= 7\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'tyro'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script, *map(str, CONFIGS)], check=True)


def test_names_are_those_of_the_tables():
    from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
    from aotrain.quantization import SCHEMES as table
    from aotrain.recipes import RECIPE_ALIASES

    assert list(SCHEMES) == list(table)
    assert set(FLOAT8_RECIPES) == set(FLOAT8_LINEAR_RECIPES)
    for alias, name in RECIPE_ALIASES.items():
        assert float8_recipe(alias) == name


def test_a_written_recipe_is_the_loaded_one(write):
    want = Recipe(
        model=Model(path="some/model", kwargs={"attn_implementation": "sdpa"}),
        data=Data(path="some/rows", kwargs={"name": "en"}),
        quantize=Quantize(scheme="int4-g32", exclude=("lm_head", "*.gate")),
        optimizer=Optimizer(name="adamw_8bit", lr=2e-5, betas=(0.9, 0.95)),
        trainer={"output_dir": "out", "max_steps": 10},
    )
    text = PLAIN.replace("2e-5", "2e-5, betas: [0.9, 0.95]").replace("rows}", "rows, name: en}")
    text = text.replace("model}", "model, attn_implementation: sdpa}").replace("out}", "out, max_steps: 10}")
    text = text.replace("int4-g32}", 'int4-g32, exclude: [lm_head, "*.gate"]}')
    assert load_recipe(write(text)) == want
    assert want.output_dir == Path("out")


@pytest.mark.parametrize("text", ["2e-5", "2.0e-5", "2E-5", "0.00002", ".2e-4"])
def test_a_learning_rate_is_a_number_however_it_is_written(write, text: str):
    assert load_recipe(write(PLAIN.replace("2e-5", text))).optimizer.lr == 2e-5
    assert load_recipe(write(PLAIN), [f"optimizer.lr={text}"]).optimizer.lr == 2e-5


@pytest.mark.parametrize("name", [*OPTIMIZERS, "AdamW8bit", "adamw8bit", "adamw_torch_8bit", "adamw", "adamw_torch"])
def test_optimizers_by_every_name(write, name: str):
    found = load_recipe(write(PLAIN), [f"optimizer.name={name}"]).optimizer.name
    assert found in (*OPTIMIZERS, "adamw")


def test_lines_of_other_toolkits_can_be_pasted(write):
    text = """\
base_model: some/model
data: {path: some/rows}
qat: {fake_quant_after_n_steps: 100, quantize_embedding: true}
quantize: {scheme: int4-g32}
optimizer: adamw_torch_8bit
learning_rate: 2e-5
micro_batch_size: 4
num_epochs: 1
output_dir: out
fp8: {recipe_name: rowwise}
"""
    found = problems(write(text))
    assert found == ["10: float8: does not go with quantize: one of them decides what a product sees; remove one"]
    recipe = load_recipe(write(text.replace("fp8: {recipe_name: rowwise}\n", "")), ["optimizer.eps=1e-6"])
    assert recipe.model.path == "some/model"
    assert (recipe.quantize.start_step, recipe.quantize.embeddings) == (100, True)
    assert recipe.optimizer == Optimizer(name="adamw_8bit", lr=2e-5, eps=1e-6)
    assert recipe.trainer == {"output_dir": "out", "per_device_train_batch_size": 4, "num_train_epochs": 1}


def test_all_mistakes_at_once_with_their_lines(write):
    path = write(
        "model: {path: some/model, dtyp: bfloat16}\n"
        "data: {path: some/rows}\n"
        "quantize:\n"
        "  scheme: int4g32\n"
        "  star_step: 5\n"
        "  start_step: -1\n"
        "optimizer: {name: adamw_9bit, lr: '2e-5'}\n"
        "engin: trl\n"
        "trainer: {output_dir: out}\n"
    )
    found = problems(path, "optimizer.eps=small")
    assert len(found) == 8
    for expected in (
        "1: model.dtyp: unknown key; did you mean 'model.dtype'?",
        "5: quantize.star_step: unknown key; did you mean 'quantize.start_step'?",
        "6: quantize.start_step: got -1 (int), want greater than or equal to 0",
        "7: optimizer.lr: got '2e-5' (str), want a valid number",
        "8: engin: unknown key; did you mean 'engine'?",
        "--optimizer.eps: optimizer.eps: got 'small' (str), want a valid number",
    ):
        assert expected in found
    assert any(line.startswith("4: quantize.scheme: got 'int4g32'") and "mean 'int4-g32'?" in line for line in found)
    assert any(line.startswith("7: optimizer.name: unknown optimizer 'adamw_9bit'") for line in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.path": "null", "model.tokenizer": "byte"},
            "model.path: is null, so model.config has to say",
        ),
        ({"model.path": "./nowhere"}, "model.path: no such folder: './nowhere'"),
        ({"model.tokenizer": "/nowhere"}, "model.tokenizer: no such folder"),
        ({"model.config": "{model_type: llama}"}, "model.config: is given beside model.path"),
        ({"data.path": "json", "data.data_files": "./no.jsonl"}, "data.data_files: no such file: './no.jsonl'"),
        ({"data.max_chars": "100"}, "data.max_chars: is only for stdlib-pairs"),
        (
            {"data.path": "stdlib-pairs", "data.name": "en"},
            "data.name: is for load_dataset",
        ),
        ({"float8": "rowwise"}, "float8: does not go with quantize"),
        ({"quantize.start_step": "10", "trainer.max_steps": "10"}, "trainer.max_steps: got 10, want more than"),
        ({"lora": "{dropout: 0.1}"}, "lora.dropout: does not go with quantize"),
        ({"lora": "{use_dora: true}"}, "lora.use_dora: does not go with quantize"),
        ({"lora": "{r: 4}", "quantize": "null", "float8": "rowwise"}, "float8: does not go with lora"),
        ({"optimizer.name": "adamw", "optimizer.offload": "cpu"}, "optimizer.offload: is not offered by adamw"),
        ({"optimizer.name": "adamw", "trainer.optim_args": "seed=1"}, "trainer.optim_args: are options of our"),
        ({"trainer": "{}"}, "trainer.output_dir: is missing"),
        ({"trainer.learning_rate": "1"}, "trainer.learning_rate: is set by optimizer.lr"),
        ({"export": "{path: o}", "quantize": "null"}, "export: needs quantize"),
        (
            {"export": "{path: o}", "quantize.scheme": "8da4w"},
            "export.format: got 'compressed-tensors', which does not",
        ),
        (
            {"export": "{path: o, format: gguf-grid}"},
            "export.format: got 'gguf-grid', which does not carry int4-g32; want",
        ),
        ({"export": "{path: o}", "quantize.scheme": "int3-g32"}, "does not carry int3-g32; readers disagree"),
        ({"export": "{path: .}"}, "export.path: . exists already"),
        ({"evaluate.heldout": "2.5"}, "evaluate.heldout: got 2.5, want a part below 1 or a whole number"),
        ({"evaluate.control": "true", "quantize": "null"}, "evaluate.control: is the run without quantization"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_said_before_anything_is_loaded(write, change: dict[str, str], message: str):
    found = problems(write(PLAIN), *(f"{key}={value}" for key, value in change.items()))
    assert len(found) == 1
    assert message in found[0]


def test_every_scheme_has_a_format():
    for scheme in SCHEMES:
        assert any(export_problem(scheme, name) is None for name in EXPORT_FORMATS), scheme
    assert {scheme for carried in EXPORT_FORMATS.values() for scheme in carried} == set(SCHEMES)
    assert export_problem("8da4w", "compressed-tensors").endswith("int4-g32-a8 is the symmetric scheme; want torchao")


def test_an_engine_that_is_not_there_says_what_to_do(write, monkeypatch):
    recipe = load_recipe(write(PLAIN))
    monkeypatch.setitem(engines._ENGINES, "trl", ("no_such_package.module", "hf"))
    with pytest.raises(JobError, match=r"engine: trl needs no_such_package: pip install 'aotrain\[hf\]'"):
        run(recipe)
