"""export as a whole: files, bits, memory, refusals, and that nothing is left half written."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import aotrain.export.exporter as module
from aotrain.export import FORMATS, export, formats_for
from aotrain.export.parts import encode_in_parts
from aotrain.formats import MappingType, integer_format
from aotrain.quantization import SCHEMES, Scheme, get_scheme
from aotrain.quantization.schemes import AffineScheme
from tests.export.checkpoints import tensors_of, write

CARRIED = [(name, format) for name, scheme in SCHEMES.items() for format in formats_for(scheme)]


@pytest.mark.parametrize(("scheme", "format"), CARRIED, ids=["-".join(pair) for pair in CARRIED])
def test_every_scheme_in_every_format_reads_back(tmp_path, scheme: str, format: str):
    tensors = tensors_of()
    source = write(tmp_path / "in", tensors, shards=3)
    report = export(source, tmp_path / "out", scheme=scheme, format=format)
    assert report.verified
    assert len(report.layers) == 6
    assert min(layer.sqnr_db for layer in report.layers) > 5
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    stored = {}
    for shard in sorted(set(index["weight_map"].values())):
        loaded = load_file(tmp_path / "out" / shard)
        assert all(index["weight_map"][name] == shard for name in loaded)
        stored |= loaded
    assert set(stored) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values()) == report.bytes_after
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(stored[name].bfloat16(), tensors[name])
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_parts_of_rows_give_the_same_bits():
    weight = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, scheme in SCHEMES.items():
        given = torch.tensor([0.01]) if name == "nvfp4" else None
        parts = encode_in_parts(scheme.weight, weight, None, given)
        whole = scheme.weight.encode(weight, global_scale=given)
        assert torch.equal(parts.data, whole.data)
        assert torch.equal(parts.scale.view(torch.uint8), whole.scale.view(torch.uint8))


def test_masters_are_encoded_as_they_are_with_scales_in_the_served_dtype(tmp_path):
    tensors = tensors_of(dtype=torch.float32) | {"model.router_bias": torch.randn(4).double()}
    source = write(tmp_path / "in", tensors)
    report = export(source, tmp_path / "out", scheme="int4-g32", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out/model.safetensors")
    key = "model.layers.0.mlp.down_proj"
    encoded = get_scheme("int4-g32", scale_dtype=torch.bfloat16).weight.encode(tensors[f"{key}.weight"])
    assert torch.equal(stored[f"{key}.weight_scale"], encoded.scale)
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert stored["model.router_bias"].dtype == torch.float64  # in a dtype of its own
    assert report.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("scheme", ["int4-g32", "nvfp4", "fp8"])
def test_masters_are_encoded_in_the_dtype_in_which_layers_saw_them(tmp_path, scheme: str):
    tensors = tensors_of(dtype=torch.float32)
    source = write(tmp_path / "in", tensors)
    report = export(source, tmp_path / "out", scheme=scheme, weight_dtype=torch.bfloat16)
    assert (report.verified, report.dtype) == (True, torch.bfloat16)
    rounded = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    export(write(tmp_path / "rounded", rounded), tmp_path / "same", scheme=scheme)
    export(source, tmp_path / "other", scheme=scheme, dtype=torch.bfloat16)
    out, same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "same", "other"))
    assert out.keys() == same.keys()
    assert all(torch.equal(out[key].view(torch.uint8), same[key].view(torch.uint8)) for key in out)
    assert not all(torch.equal(out[key].view(torch.uint8), other[key].view(torch.uint8)) for key in out)


def test_learned_scales_are_used(tmp_path):
    tensors = tensors_of(1)
    key = "model.layers.0.mlp.down_proj.weight"
    learned = SCHEMES["int4-g32"].weight.encode(tensors[key]).scale * 0.9
    source = write(tmp_path / "in", tensors)
    export(source, tmp_path / "out", scheme="int4-g32", scales={key: learned})
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[f"{key}_scale"], learned)
    with pytest.raises(ValueError, match="scales for nothing"):
        export(source, tmp_path / "other", scheme="int4-g32", scales={"nothing": learned})


def test_the_report_as_text(tmp_path):
    text = str(export(write(tmp_path / "in", tensors_of()), tmp_path / "out", scheme="int4-g32"))
    assert "6 linear layers" in text
    assert "bit for bit" in text
    assert "excluded: lm_head" in text
    assert "embedding: model.embed_tokens" in text


def test_experts_by_key_and_dense_routers(tmp_path):
    tensors = tensors_of(1)
    for expert in range(2):
        tensors[f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"] = torch.randn(64, 256).bfloat16()
    tensors["model.layers.0.mlp.gate.weight"] = torch.randn(2, 256).bfloat16()
    source = write(tmp_path / "in", tensors)
    report = export(source, tmp_path / "out", scheme="int4-g32")
    assert sum("experts" in layer.name for layer in report.layers) == 2
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
    for scheme, format in (("int8", "compressed-tensors"), ("nvfp4", "compressed-tensors"), ("int4-g32", "torchao")):
        with pytest.raises(ValueError, match=r"transformers .* experts"):
            export(source, tmp_path / "no", scheme=scheme, format=format)
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.randn(2, 64, 256).bfloat16()
    stacked = write(tmp_path / "stacked", tensors)
    with pytest.raises(ValueError, match="several experts each"):
        export(stacked, tmp_path / "no", scheme="int4-g32")
    export(stacked, tmp_path / "dense", scheme="int4-g32", exclude=("lm_head", "*.experts.*"))


def asymmetric() -> Scheme:
    return Scheme("int4-asymmetric", AffineScheme(integer_format(4, group_size=32, mapping=MappingType.ASYMMETRIC)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int4g32"}, "did you mean 'int4-g32'"),
        ({"scheme": "int4-g32", "format": "torch-ao"}, "did you mean 'torchao'"),
        ({"scheme": asymmetric()}, "asymmetric integers are refused: transformers loads"),
        ({"scheme": asymmetric(), "format": "torchao"}, "asymmetric integer weights are refused"),
        ({"scheme": "int3-g32"}, "3-bit integers are refused: .* carry this scheme: torchao"),
        ({"scheme": "8da4w"}, "symmetric activations only"),
        ({"scheme": "int4-g32-a8", "format": "torchao"}, "carry this scheme: compressed-tensors"),
        ({"scheme": "int4-g32", "format": "gguf-grid"}, "q4_0 only"),
        ({"scheme": "int4-g32", "format": "float8-block"}, "fp8-block only"),
        ({"scheme": "q4_0", "format": "gguf-grid", "dtype": torch.bfloat16}, "rounds the scales of Q4_0"),
        ({"scheme": "int4-g32", "dtype": torch.float64}, "want float32, bfloat16 or float16"),
        ({"scheme": "int4-g32", "weight_dtype": torch.int8}, "weight_dtype torch.int8; want float32"),
        ({"scheme": get_scheme("int4-g32", torch.float32)}, "servers round scales"),
        ({"scheme": "int4-g32", "exclude": ("*",)}, "no linear layer"),
        ({"scheme": "int4-g32", "exclude": ("lm_head", "*.0.*q_proj")}, "part of 1 groups"),
        ({"scheme": "int4-g32", "exclude": "lm_head"}, "want a list of patterns"),
        ({"scheme": "int4-g32", "exclude": ("lm_head", "*.q_porj")}, r"'\*\.q_porj' matches none"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_refusals(tmp_path, arguments: dict, message: str):
    source = write(tmp_path / "in", tensors_of())
    with pytest.raises(ValueError, match=message):
        export(source, tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_layers_that_the_group_does_not_divide_are_listed_together(tmp_path):
    tensors = tensors_of() | {f"model.layers.{layer}.odd.weight": torch.randn(8, 40) for layer in range(2)}
    with pytest.raises(ValueError, match=r"2 of 8 layers(.|\n)*layers\.0\.odd.*40.*group size 32(.|\n)*layers\.1\.odd"):
        export(write(tmp_path / "in", tensors), tmp_path / "out", scheme="int4-g32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, config: config.update(quantization_config={"quant_method": "gptq"}), "quantized already"),
        (lambda tensors, config: config.update(aotrain_grid="q4_0"), "on the grid q4_0"),
        (lambda tensors, config: tensors.update(x_fake_quantizer_scale=torch.ones(1)), "learns its ranges"),
        (
            lambda tensors, config: tensors.update({"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}),
            "want a dense|float32, bfloat16 or float16",
        ),
        (lambda tensors, config: tensors["model.layers.1.mlp.down_proj.weight"].fill_(float("nan")), "NaN"),
        (lambda tensors, config: tensors.pop("lm_head.weight"), None),
    ],
    ids=["quantized", "grid", "learned", "float8", "nan", "tied"],
)
def test_sources_that_are_refused(tmp_path, change, message: str | None):
    tensors, config = tensors_of(), {}
    change(tensors, config)
    source = write(tmp_path / "in", tensors, config=config)
    if message is None:  # tied: fine as long as the output layer is excluded
        export(source, tmp_path / "out", scheme="int4-g32")
        ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
        assert ignored == ["lm_head"]
        with pytest.raises(ValueError, match="ties lm_head"):
            export(source, tmp_path / "other", scheme="int4-g32", exclude=())
        return
    with pytest.raises(ValueError, match=message):
        export(source, tmp_path / "out", scheme="int4-g32")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("scheme", ["int2-g32", "int4-g32", "int4-g128", "mxfp4", "nvfp4"])
def test_a_snapped_model_is_refused_unless_its_grid_is_found_again(tmp_path, scheme: str):
    weight = get_scheme(scheme).weight
    tensors = tensors_of(1)
    snapped = {key: weight.values(tensor) if "proj" in key else tensor for key, tensor in tensors.items()}
    source = write(tmp_path / "in", snapped)
    with pytest.raises(ValueError, match="lies on a quantized grid already"):
        export(source, tmp_path / "out", scheme="int4-g32")
    assert not (tmp_path / "out").exists()
    if scheme == "int4-g32":
        scales = {key: weight.encode(tensor).scale for key, tensor in tensors.items() if "proj" in key}
        report = export(source, tmp_path / "out", scheme=scheme, scales=scales)
        assert all(layer.sqnr_db == float("inf") for layer in report.layers)


def test_sparse_and_constant_weights_are_not_taken_for_snapped_ones(tmp_path):
    tensors = tensors_of(1)
    tensors["model.layers.0.self_attn.q_proj.weight"].mul_(torch.rand(128, 256) < 0.1)
    tensors["model.layers.0.self_attn.k_proj.weight"].zero_()
    export(write(tmp_path / "in", tensors), tmp_path / "out", scheme="int4-g32")


@pytest.mark.parametrize("damage", ["truncated", "header", "missing shard", "missing index", "pickled", "nothing"])
def test_damaged_sources(tmp_path, damage: str):
    source = write(tmp_path / "in", tensors_of(), shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "header":
        shard.write_bytes(b"\xff" * 200)
    elif damage == "missing index":
        (source / "model.safetensors.index.json").unlink()
    else:
        shard.unlink()
    if damage in ("pickled", "nothing"):
        for path in source.glob("model*"):
            path.unlink()
    if damage == "pickled":
        (source / "pytorch_model.bin").write_bytes(b"x")
    message = {
        "truncated": "00002-of-00002.safetensors is damaged or incomplete",
        "header": "00002-of-00002.safetensors is damaged or incomplete",
        "missing shard": "misses 1 of 2 shards: model-00002",
        "missing index": "neither model.safetensors nor model.safetensors.index.json",
        "pickled": "pickled weights only",
        "nothing": "has no .*safetensors",
    }[damage]
    with pytest.raises(ValueError, match=message):
        export(source, tmp_path / "out", scheme="int4-g32")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_half_written_and_nothing_overwritten(tmp_path, monkeypatch):
    source = write(tmp_path / "in", tensors_of())
    export(source, tmp_path / "out", scheme="int4-g32", verify=False)
    with pytest.raises(ValueError, match="out exists; want a new folder"):
        export(source, tmp_path / "out", scheme="int4-g32")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_copy_other_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "other", scheme="int4-g32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("name", list(FORMATS))
def test_verification_finds_a_wrong_bit(tmp_path, monkeypatch, name: str):
    chosen = FORMATS[name]
    pack = chosen.pack

    def wrong(layer, scheme, encoded):
        if layer.name.endswith("1.mlp.down_proj"):
            data = encoded.data.clone()
            data.view(torch.uint8)[5, 7] ^= 1
            encoded = encoded._replace(data=data)
        return pack(layer, scheme, encoded)

    monkeypatch.setattr(chosen, "pack", wrong, raising=False)
    scheme = {"gguf-grid": "q4_0", "float8-block": "fp8-block"}.get(name, "int4-g32")
    source = write(tmp_path / "in", tensors_of())
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp.down_proj.weight reads back"):
        export(source, tmp_path / "out", scheme=scheme, format=name)
    assert not (tmp_path / "out").exists()


def test_float16_that_overflows_is_an_error(tmp_path):
    tensors = tensors_of()
    tensors["lm_head.weight"][0, 0] = 1e5
    source = write(tmp_path / "in", tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight has values beyond the range of float16"):
        export(source, tmp_path / "out", scheme="q4_0", format="gguf-grid", dtype=torch.float16)


MEASURE = """
import json, sys
from pathlib import Path
from aotrain.export import export

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))

root, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
export(root / "small", root / "small_out", **arguments)  # loads what is loaded once
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = status("VmRSS")
export(root / "large", root / "large_out", **arguments)
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(
    "arguments",
    [{"scheme": "int4-g32"}, {"scheme": "nvfp4"}, {"scheme": "q4_0", "format": "gguf-grid"}],
    ids=lambda arguments: arguments["scheme"],
)
def test_no_more_than_one_shard_in_memory_even_where_a_tensor_is_one(tmp_path, arguments: dict):
    write(tmp_path / "small", tensors_of(), shards=2)
    large = {"model.embed_tokens.weight": torch.randn(2**14, 1024).bfloat16()}
    large |= {"model.layers.0.up_proj.weight": torch.randn(2**14, 1024).bfloat16()}
    write(tmp_path / "large", large, shards=2)
    shard = (tmp_path / "large/model-00001-of-00002.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE, str(tmp_path), json.dumps(arguments)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 1_000_000 < peak <= shard


def test_schemes_without_a_name_are_carried_by_what_they_are(tmp_path):
    weight = AffineScheme(replace(integer_format(4, group_size=64), mapping=MappingType.SYMMETRIC_NO_CLIPPING_ERR))
    report = export(write(tmp_path / "in", tensors_of()), tmp_path / "out", scheme=Scheme("", weight))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert "AffineScheme" in report.scheme
