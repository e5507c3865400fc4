"""torchtitan models built from config.json: the same function as transformers' and the same names, both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan.finetune_layout import ARCHITECTURES, Layout, mismatches, model_spec
from aotrain.integrations.torchtitan.finetune_weights import load_weights, model_shapes, save_weights, weight_shapes
from aotrain.testing import assert_bitwise_equal

from .tiny_checkpoint import LLAMA, LLAMA3, QWEN3, weights, write_checkpoint

CONFIGS = {"llama": LLAMA, "llama3 tied": LLAMA3, "qwen3": QWEN3, "qwen3 tied": QWEN3 | {"tie_word_embeddings": True}}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def loaded(config, folder):
    spec = model_spec(config, "sdpa")
    layout = Layout(config, spec)
    model = spec.model.build()
    model.init_weights()
    load_weights(model, layout, folder)
    return model.eval(), layout


@each_config
def test_logits_are_those_of_transformers(tmp_path, config):
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[hf]'")
    folder = write_checkpoint(tmp_path / "model", config)
    model, _ = loaded(config, folder)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(256, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = model(tokens), theirs(tokens).logits
    # Not bit for bit: heads are summed in another order, and rotations are products of complex numbers.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert want.std() > 0.3


@each_config
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, config):
    folder = write_checkpoint(tmp_path / "model", config)
    model, layout = loaded(config, folder)
    assert model_shapes(model, layout) == weight_shapes(folder)
    out = tmp_path / "out"
    out.mkdir()
    # Small files, so that there are several.
    save_weights(model, layout, out, config=config, others=[folder], dtype=torch.float32, largest_file=100_000)
    where = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(where.values())) > 2
    assert max((out / name).stat().st_size for name in set(where.values())) < 110_000
    for name, want in weights(config).items():
        assert_bitwise_equal(load_file(out / where[name])[name], want, what=name)
    assert where.keys() == weights(config).keys()
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "float32"}
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not list(out.glob(".*"))
    again, _ = loaded(config, out)
    for name, param in model.named_parameters():
        assert_bitwise_equal(again.get_parameter(name), param, what=name)


@each_config
def test_rows_are_those_of_torchtitans_own_adapter(config):
    spec = model_spec(config, "sdpa")
    layout = Layout(config, spec)
    theirs = spec.state_dict_adapter(spec.model, None).from_hf(weights(config))
    for name in weights(config):
        titan = next(
            titan
            for titan in theirs
            if titan.startswith(("layers", "norm", "tok", "lm")) and layout.hf_name(titan) == name
        )
        assert_bitwise_equal(layout.from_hf(titan, weights(config)[name]), theirs[titan], what=name)


def test_another_dtype_is_written_and_said(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    model, layout = loaded(LLAMA, folder)
    save_weights(model, layout, folder, config=LLAMA, others=[], dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type got 'gemma3', want one of llama, qwen3, or engine: trl"),
        ({"attention_bias": True}, "attention_bias got True, torchtitan's llama has False"),
        ({"hidden_act": "gelu"}, "hidden_act got 'gelu'"),
        ({"hidden_size": None}, "hidden_size got None, want a whole number"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantized already"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type got 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type got 'linear'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor got 0.5"),
    ],
)
def test_what_torchtitan_cannot_be_is_said(change, message):
    assert not list(mismatches(LLAMA))
    (found,) = mismatches(LLAMA | change)
    assert message in found


def test_keys_of_older_configurations():
    old = {key: value for key, value in LLAMA.items() if key not in ("rope_parameters", "head_dim")}
    old |= {"rope_theta": 5000.0, "rope_scaling": {**LLAMA3["rope_parameters"], "rope_type": "llama3"}}
    del old["rope_scaling"]["rope_theta"]
    assert not list(mismatches(old))
    rope = model_spec(old, "sdpa").model.layers[0].attention.rope
    assert (rope.theta, rope.scaling, rope.original_max_position_embeddings, rope.dim) == (5000.0, "llama", 32, 16)


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[hf]'")
    for kind, architecture in ARCHITECTURES.items():
        theirs = transformers.AutoConfig.for_model(kind)
        for key, value in (architecture.defaults | architecture.fixed).items():
            assert getattr(theirs, key) == value, (kind, key)


def test_weights_that_do_not_fit(tmp_path):
    tensors = weights(LLAMA)
    missing = {key: value for key, value in tensors.items() if key != "model.norm.weight"}
    reshaped = tensors | {"lm_head.weight": torch.zeros(8, 64)}
    with pytest.raises(JobError, match=r"has no tensor model\.norm\.weight"):
        loaded(LLAMA, write_checkpoint(tmp_path / "missing", LLAMA, missing))
    with pytest.raises(JobError, match=r"lm_head.weight got shape \[8, 64\], want \[259, 64\]"):
        loaded(LLAMA, write_checkpoint(tmp_path / "shape", LLAMA, reshaped))
    damaged = write_checkpoint(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(JobError, match="is damaged or incomplete"):
        weight_shapes(damaged)
    (damaged / "model.safetensors").unlink()
    with pytest.raises(JobError, match=r"has no \*.safetensors"):
        weight_shapes(damaged)
