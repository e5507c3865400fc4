"""Quantized embeddings: what transformers looks up is what training looked up; refused where readers do not."""

import json

import pytest
import torch
from safetensors.torch import load_file

from aotrain.export import describe_export, export
from aotrain.qat import prepare_qat
from aotrain.quantization import SCHEMES
from tests.export.checkpoints import tensors_of, write
from tests.export.models import logits, save_llama, transformers

TABLE = "model.embed_tokens"


@pytest.mark.parametrize("scheme", ["int2-g32", "int4-g32", "fp8-weight-only", "8da4w", "int8", "fp8"])
def test_transformers_looks_up_what_training_did(tmp_path, scheme: str):
    pytest.importorskip("torchao", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
    source = save_llama(tmp_path / "in")
    report = export(source, tmp_path / "out", scheme=scheme, format="torchao", embeddings=True)
    assert report.verified
    assert "14 linear layers and 1 embeddings" in str(report)
    trained = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    prepare_qat(trained, scheme, embeddings=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokens = torch.arange(64)[None]
    assert torch.equal(loaded.model.embed_tokens(tokens), trained.model.embed_tokens(tokens))
    assert not torch.equal(loaded.model.embed_tokens(tokens), trained.model.embed_tokens.weight[None])
    assert type(loaded.lm_head.weight.data) is torch.Tensor
    if SCHEMES[scheme].activation is None:  # torchao rounds activations by itself
        assert torch.equal(logits(loaded), logits(trained))


def test_the_grid_of_a_gguf_file(tmp_path):
    tensors = tensors_of(1)
    source = write(tmp_path / "in", tensors)
    report = export(source, tmp_path / "out", scheme="q4_0", format="gguf-grid", embeddings=True)
    table = load_file(tmp_path / "out/model.safetensors")[f"{TABLE}.weight"]
    assert torch.equal(table, SCHEMES["q4_0"].weight.values(tensors[f"{TABLE}.weight"].float()))
    assert "--token-embedding-type q4_0" in str(report)
    assert "1 embeddings" in describe_export(source, scheme="q4_0", format="gguf-grid", embeddings=True)


def test_an_excluded_embedding_stays_dense(tmp_path):
    tensors = tensors_of(1) | {"model.embed_positions.weight": torch.randn(32, 256).bfloat16()}
    source = write(tmp_path / "in", tensors)
    exclude = ("lm_head", "*.embed_positions")
    export(source, tmp_path / "out", scheme="int4-g32", format="torchao", embeddings=True, exclude=exclude)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(stored["model.embed_positions.weight"], tensors["model.embed_positions.weight"])
    assert f"{TABLE}._weight_qdata" in stored
    with pytest.raises(ValueError, match=r"model\.embed_positions may be embeddings of something else"):
        export(source, tmp_path / "no", scheme="int4-g32", format="torchao", embeddings=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int4-g32"}, "transformers 5.23 loads packed embeddings and then finds no weight"),
        ({"scheme": "fp8-block", "format": "float8-block"}, "its readers keep embeddings dense"),
    ],
    ids=["compressed-tensors", "float8-block"],
)
def test_refusals(tmp_path, arguments: dict, message: str):
    source = write(tmp_path / "in", tensors_of(1))
    with pytest.raises(ValueError, match=message):
        export(source, tmp_path / "out", embeddings=True, **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tie", ["config", "no output layer"])
def test_a_tied_embedding_is_refused(tmp_path, tie: str):
    tensors = tensors_of(1)
    if tie == "no output layer":
        del tensors["lm_head.weight"]
    source = write(tmp_path / "in", tensors, config={"tie_word_embeddings": tie == "config"})
    with pytest.raises(ValueError, match="ties lm_head to the embedding, and servers keep one dense tensor"):
        export(source, tmp_path / "out", scheme="int4-g32", format="torchao", embeddings=True)


def test_a_checkpoint_without_a_table(tmp_path):
    tensors = {key: tensor for key, tensor in tensors_of(1).items() if TABLE not in key}
    with pytest.raises(ValueError, match="no table of tokens"):
        export(write(tmp_path / "in", tensors), tmp_path / "out", scheme="int4-g32", format="torchao", embeddings=True)


def test_transformers_still_finds_no_weight_in_packed_embeddings(tmp_path, monkeypatch):
    """The reason of the refusal: when this fails, quantized embeddings can be exported."""
    pytest.importorskip("compressed_tensors", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
    from aotrain.export.table import FORMATS

    monkeypatch.setattr(FORMATS["compressed-tensors"], "refusal_of_embeddings", lambda scheme: None, raising=False)
    export(save_llama(tmp_path / "in"), tmp_path / "out", scheme="int4-g32", embeddings=True)
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["targets"].append("Embedding")
    path.write_text(json.dumps(config))
    with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'weight'"):
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))
