"""float8-block: the file's tensors are the iterator's, transformers reads them, and nothing is collected."""

import pytest
import torch
from safetensors.torch import load_file

from aotrain.export import export, float8_block_weights
from aotrain.quantization import SCHEMES
from tests.export.checkpoints import tensors_of, write


class Sharded(torch.Tensor):
    """Stands for a DTensor: holds a shard, and gathers."""

    gathered = 0

    def full_tensor(self) -> torch.Tensor:
        Sharded.gathered += 1
        return self.as_subclass(torch.Tensor)


def test_the_iterator_gives_what_the_file_holds(tmp_path):
    tensors = tensors_of() | {"model.layers.0.odd.weight": torch.randn(130, 200).bfloat16()}
    export(write(tmp_path / "in", tensors), tmp_path / "out", scheme="fp8-block", format="float8-block")
    stored = load_file(tmp_path / "out/model.safetensors")
    streamed = dict(float8_block_weights(tensors))
    assert stored.keys() == streamed.keys()
    for name, tensor in stored.items():
        assert streamed[name].dtype == tensor.dtype
        assert torch.equal(streamed[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert stored["model.layers.0.odd.weight_scale_inv"].shape == (2, 2)


def test_modules_pairs_and_mappings():
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.LayerNorm(256))
    expected = dict(float8_block_weights(model))
    assert list(expected) == ["0.weight", "0.weight_scale_inv", "0.bias", "1.weight", "1.bias"]
    for source in (model.state_dict(), iter(model.state_dict().items())):
        streamed = dict(float8_block_weights(source))
        assert all(torch.equal(streamed[name].float(), tensor.float()) for name, tensor in expected.items())
    values = expected["0.weight"].float() * expected["0.weight_scale_inv"].repeat_interleave(128, 0)
    assert torch.equal(values, SCHEMES["fp8-block"].weight.values(model[0].weight))
    narrow = dict(float8_block_weights(model, dtype=torch.bfloat16))
    assert narrow["0.bias"].dtype == torch.bfloat16
    assert narrow["0.weight_scale_inv"].dtype == torch.float32
    assert "0.weight_scale_inv" not in dict(float8_block_weights(model, exclude=("0",)))


def test_one_tensor_at_a_time_gathered_when_its_turn_comes():
    drawn = []

    def parameters():
        for index in range(3):
            drawn.append(index)
            yield f"layers.{index}.weight", torch.randn(128, 128).as_subclass(Sharded)

    Sharded.gathered = 0
    stream = float8_block_weights(parameters())
    assert drawn == []
    for count in range(1, 4):
        name, data = next(stream)
        assert name == f"layers.{count - 1}.weight"
        assert type(data) is torch.Tensor
        next(stream)
        assert len(drawn) == Sharded.gathered == count


def test_what_cannot_be_streamed():
    with pytest.raises(ValueError, match="several experts each"):
        list(float8_block_weights({"mlp.experts.down_proj": torch.randn(2, 128, 128)}))
    with pytest.raises(ValueError, match="want float32, bfloat16 or float16"):
        list(float8_block_weights({"a.weight": torch.zeros(2, 2, dtype=torch.int8)}))


def test_transformers_reads_it_experts_too(tmp_path):
    from tests.export.models import assert_same_weights, logits, save_mixture, served_model, transformers

    source = save_mixture(tmp_path / "in")
    export(source, tmp_path / "out", scheme="fp8-block", format="float8-block")
    expected = served_model(source, "fp8-block", torch.bfloat16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same_weights(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))


def test_dtensors_of_a_mesh_are_gathered():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        streamed = dict(float8_block_weights([("a.weight", sharded)]))
    finally:
        torch.distributed.destroy_process_group()
    expected = dict(float8_block_weights([("a.weight", weight)]))
    for name, tensor in expected.items():
        assert type(streamed[name]) is torch.Tensor
        assert torch.equal(streamed[name].view(torch.uint8), tensor.view(torch.uint8))
