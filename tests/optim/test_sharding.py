"""State of sharded parameters whose values are kept in host memory, on a mesh of GPUs."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from aotrain.optim import AdamW4bit, AdamW8bit, AdamWFp8
from aotrain.optim.sharding import local_of


@pytest.fixture
def cuda_mesh() -> Iterator[DeviceMesh]:
    """Two ranks with one GPU each, of which this process is the first; nothing is ever sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield DeviceMesh("cuda", torch.arange(2), _init_backend=False)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("optimizer_class", [AdamW8bit, AdamW4bit, AdamWFp8])
def test_state_stays_in_host_memory_with_its_parameter(optimizer_class: type, cuda_mesh: DeviceMesh):
    meta = TensorMeta(torch.Size((127, 130)), (130, 1), torch.float32)
    spec = DTensorSpec(cuda_mesh, (Shard(0),), meta)
    param = torch.nn.Parameter(DTensor(torch.randn(64, 130), spec, requires_grad=False))
    param.grad = DTensor(torch.randn(64, 130), spec, requires_grad=False)
    optimizer = optimizer_class([param])
    before = local_of(param.detach()).clone()
    optimizer.step()
    assert not torch.equal(local_of(param.detach()), before)
    state = {key: value for key, value in optimizer.state[param].items() if key != "step"}
    assert len(state) == 4
    for value in state.values():
        assert value.device_mesh == cuda_mesh
        assert value.shape[0] == 127
        assert local_of(value).device.type == "cpu"
