"""The table of optimizer names that all engines share."""

import subprocess
import sys

import pytest

from aotrain import optim
from aotrain.integrations.optimizers import ALIASES, OPTIMIZERS, canonical_name, optimizer_class


@pytest.mark.parametrize("name", [*OPTIMIZERS, *ALIASES])
def test_every_name_is_a_class(name: str):
    cls = optimizer_class(name)
    assert cls is getattr(optim, OPTIMIZERS[canonical_name(name)])
    assert str(cls.state_bits) in name.lower()
    assert cls.__name__.lower().startswith(canonical_name(name).partition("_")[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamw_8bits", r"unknown optimizer 'adamw_8bits'; want one of adamw_8bit, .*did you mean 'adamw_8bit'"),
        ("sgd", r"unknown optimizer 'sgd'; want one of adamw_8bit, adamw_4bit, .*lion_8bit$"),
        ("paged_adamw_8bit", r"not paged here\. Want 'adamw_8bit'.*CPUOffloadOptimizer"),
    ],
)
def test_unknown_names_are_answered_with_the_valid_ones(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        optimizer_class(name)


def test_names_are_known_without_torch():
    script = "import sys; import aotrain.integrations.optimizers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
