"""Layers in torchtitan's model train with the values that the exported file has, in every kind of scheme."""

import json

import pytest
import torch

from aotrain.export import export
from aotrain.export.base import Layer
from aotrain.export.compressed_tensors import CompressedTensors
from aotrain.integrations.finetune import run
from aotrain.quantization import get_scheme
from aotrain.testing import assert_bitwise_equal

from .tiny_checkpoint import LLAMA3, weights
from .tiny_finetune import auto_model, loader, read_weights


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


def trainer_of(recipe):
    """A trainer with the weights that a recipe's run left, its process group started."""
    from aotrain.integrations.torchtitan.finetune import _prepare
    from aotrain.integrations.torchtitan.finetune_build import build_trainer
    from aotrain.integrations.torchtitan.train import single_process_environment

    single_process_environment()
    job = _prepare(recipe)
    return build_trainer(recipe, job.keys, job.sources, job.device, job.rows), job


@pytest.fixture
def _no_group():
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_no_group")
@pytest.mark.parametrize("scheme", ["int4-g32", "fp8-block", "nvfp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_train_with_the_values_that_are_exported(load, scheme, dtype, tmp_path):
    """Layer by layer: the values that training multiplies by are those of the file, with rows where the file has them.

    fp8-block has scales of 128 rows, nvfp4 one for q, k and v together.
    """
    from aotrain.integrations.torchtitan.finetune_build import layout_of
    from aotrain.integrations.torchtitan.finetune_qat import FakeQuantizedLinear
    from aotrain.integrations.torchtitan.finetune_weights import save_weights

    recipe = load(f"quantize.scheme={scheme}", f"model.dtype={dtype}", f"trainer.bf16={dtype == 'bfloat16'}".lower())
    trainer, job = trainer_of(recipe)
    layout, out = layout_of(job.sources), tmp_path / "dense"
    out.mkdir()
    save_weights(trainer.model, layout, out, config=LLAMA3, others=[], dtype=getattr(torch, dtype))
    report = export(out, tmp_path / "exported", scheme=scheme, verify=True)
    assert report.verified
    assert len(report.layers) == 14
    decoded = decoded_weights(tmp_path / "exported", scheme, getattr(torch, dtype))
    trainer.model.unshard()
    for layer in trainer.model.layers.values():
        layer.unshard()
    seen = 0
    for fqn, module in trainer.model.named_modules():
        if isinstance(module, FakeQuantizedLinear):
            plain = f"{fqn}.weight".replace("_checkpoint_wrapped_module.", "")
            values = module.weight_fake_quantizer(module.weight.detach())
            assert_bitwise_equal(layout.to_hf(plain, values), decoded[layout.hf_name(plain)], what=fqn)
            seen += 1
    assert seen == len(decoded) == 14


def decoded_weights(folder, scheme: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of an exported folder as a server multiplies by them."""
    tensors = read_weights(folder)
    names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    shapes = {name: weight.shape for name, weight in weights(LLAMA3).items()}
    layers = [Layer(name, tuple(shapes[f"{name}.weight"]), dtype) for name in names]
    decode, served = CompressedTensors().decode, get_scheme(scheme, scale_dtype=dtype)
    return {layer.key: decode(layer, served, tensors.__getitem__, slice(0, layer.shape[0])) for layer in layers}


def test_bfloat16_products_are_saved_and_served_in_bfloat16(load):
    reader = auto_model()
    recipe = load("trainer.bf16=true")
    nll = run(recipe)["nll"]
    saved = read_weights(recipe.output_dir)
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert json.loads((recipe.output_dir / "config.json").read_text())["dtype"] == "bfloat16"
    served = reader.from_pretrained(recipe.export.path, dtype=torch.bfloat16)
    served(torch.zeros(1, 4, dtype=torch.long))  # decompresses
    scheme = get_scheme(recipe.quantize.scheme, scale_dtype=torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    assert_bitwise_equal(served.get_parameter(name).detach(), scheme.weight.values(saved[name]))
    assert nll["exported"] == pytest.approx(nll["qat"], abs=2e-2)
