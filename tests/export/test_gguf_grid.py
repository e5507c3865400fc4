"""gguf-grid: the gguf package finds the codes of training in the exported weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aotrain.export import export
from aotrain.quantization import SCHEMES
from tests.export.checkpoints import tensors_of, write

gguf = pytest.importorskip("gguf", reason="needs the [oracles] extra: pip install -e '.[oracles]'")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantizing_the_export_loses_nothing(tmp_path, dtype: torch.dtype):
    tensors = tensors_of()
    # Scales below the normal range of float16, and below its smallest number.
    tensors["model.layers.0.mlp.down_proj.weight"][:2] *= 1e-6
    tensors["model.layers.0.mlp.down_proj.weight"][2:4] *= 1e-9
    report = export(write(tmp_path / "in", tensors), tmp_path / "out", scheme="q4_0", format="gguf-grid", dtype=dtype)
    stored = load_file(tmp_path / "out/model.safetensors")
    for layer in report.layers:
        weight = stored[f"{layer.name}.weight"]
        assert weight.dtype == dtype
        blocks = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q4_0)
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
        trained = SCHEMES["q4_0"].weight.values(tensors[f"{layer.name}.weight"].float())
        assert np.array_equal(values, trained.numpy())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["aotrain_grid"] == "q4_0"
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_an_export_can_be_exported_to_the_same_grid_but_no_other(tmp_path):
    export(write(tmp_path / "in", tensors_of()), tmp_path / "once", scheme="q4_0", format="gguf-grid")
    export(tmp_path / "once", tmp_path / "twice", scheme="q4_0", format="gguf-grid")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    with pytest.raises(ValueError, match="on the grid q4_0"):
        export(tmp_path / "once", tmp_path / "int4", scheme="int4-g32")


def test_values_beyond_float16_are_an_error(tmp_path):
    tensors = tensors_of()
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5
    source = write(tmp_path / "in", tensors)
    export(source, tmp_path / "out", scheme="q4_0", format="gguf-grid")
    with pytest.raises(ValueError, match=r"down_proj\.weight has values beyond the range of torch\.float16"):
        export(source, tmp_path / "half", scheme="q4_0", format="gguf-grid", dtype=torch.float16)
