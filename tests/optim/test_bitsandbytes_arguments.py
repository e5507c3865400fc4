"""Constructor arguments of bitsandbytes: accepted where they mean what we do, refused with a remedy where not."""

import inspect

import pytest
import torch
from torch import nn

from aotrain.optim import Adam8bit, AdamW4bit, AdamW8bit, AdamW32bit, Lion8bit
from aotrain.testing import assert_bitwise_equal

# What bitsandbytes' documentation and older versions of it give as defaults.
DEFAULTS = {
    "optim_bits": 32,
    "args": None,
    "min_8bit_size": 4096,
    "percentile_clipping": 100,
    "block_wise": True,
    "is_paged": False,
}
by_name = {"ids": lambda value: getattr(value, "__name__", None)}


def trained(cls, **options) -> torch.Tensor:
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    optimizer = cls(layer.parameters(), lr=1e-2, **options)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()
    assert not DEFAULTS.keys() & optimizer.param_groups[0].keys()
    return layer.weight.detach()


@pytest.mark.parametrize("cls", [AdamW8bit, Adam8bit, AdamW32bit, Lion8bit], **by_name)
def test_their_defaults_change_nothing(cls):
    assert_bitwise_equal(trained(cls, **DEFAULTS), trained(cls))


def test_bits_of_the_class_can_be_named():
    assert_bitwise_equal(trained(AdamW8bit, optim_bits=8), trained(AdamW8bit))
    assert_bitwise_equal(trained(AdamW32bit, bits="8", optim_bits=8), trained(AdamW8bit))


@pytest.mark.parametrize(
    ("cls", "option", "message"),
    [
        (AdamW8bit, {"optim_bits": 4}, r"AdamW8bit got optim_bits=4, want 8, or 32.*its class.*bits="),
        (AdamW32bit, {"optim_bits": 8}, r"AdamW32bit got optim_bits=8, want 32.*AdamW8bit"),
        (AdamW4bit, {"optim_bits": 8}, r"AdamW4bit got optim_bits=8, want 4"),
        (AdamW8bit, {"args": object()}, r"got args=<object.*, want None; pass the options themselves"),
        (AdamW8bit, {"min_8bit_size": 16384}, r"got min_8bit_size=16384, want 4096; .*precision_groups.*bits=32"),
        (Adam8bit, {"percentile_clipping": 5}, r"Adam8bit got percentile_clipping=5, want 100; .*clip_grad_norm_"),
        (AdamW8bit, {"block_wise": False}, r"got block_wise=False, want True; .*block_size"),
        (Lion8bit, {"is_paged": True}, r"Lion8bit got is_paged=True, want False; .*CPUOffloadOptimizer"),
    ],
)
def test_what_would_change_the_update_is_refused(cls, option, message: str):
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.zeros(64, 128))], **option)


def test_unknown_names_stay_errors():
    with pytest.raises(TypeError, match="AdamW8bit got an unexpected keyword argument 'min_8bit_sizes'"):
        AdamW8bit([nn.Parameter(torch.zeros(64, 128))], min_8bit_sizes=4096)


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit", "AdamW32bit", "Adam32bit", "Lion8bit"])
def test_every_argument_of_the_installed_bitsandbytes_is_known(name: str):
    """By keyword with their default; by position as far as the order is the same."""
    theirs = pytest.importorskip("bitsandbytes", reason="a peer: pip install bitsandbytes").optim
    from aotrain import optim

    parameters = list(inspect.signature(getattr(theirs, name)).parameters.values())[1:]
    getattr(optim, name)([nn.Parameter(torch.zeros(64, 128))], **{p.name: p.default for p in parameters})
    ours = list(inspect.signature(getattr(optim, name)).parameters)[1:]
    shared = [p.name for p in parameters if p.name not in DEFAULTS]
    assert shared == ours[: len(shared)]
