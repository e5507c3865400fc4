"""The token count of a run, on any number of ranks."""

from types import SimpleNamespace

import pytest

from aotrain.integrations.torchtitan.trainer import RunTrainer


def trainer(rank: int, ranks: int) -> RunTrainer:
    """A trainer that has only what its state needs."""
    mesh = SimpleNamespace(get_local_rank=lambda: rank, size=lambda: ranks)
    bare = RunTrainer.__new__(RunTrainer)
    bare.parallel_dims = SimpleNamespace(get_optional_mesh=lambda name: mesh if ranks > 1 else None)
    bare.step, bare.ntokens_seen = 0, 0
    return bare


@pytest.mark.parametrize("saving", [1, 2, 3])
@pytest.mark.parametrize("loading", [1, 2, 3, 4])
def test_tokens_seen_is_a_sum_over_ranks(saving, loading):
    first = trainer(0, saving)
    first.step, first.ntokens_seen = 7, 10
    state = first.state_dict()
    assert state == {"step": 7, "ntokens_seen": 10 * saving}
    ranks = [trainer(rank, loading) for rank in range(loading)]
    for one in ranks:
        one.load_state_dict(state)
    assert {one.step for one in ranks} == {7}
    assert sum(one.ntokens_seen for one in ranks) == 10 * saving
