"""Constructor arguments that bitsandbytes' optimizers take besides torch's: accepted where they ask for what we do.

Whatever would change the update, or where the state lives, is refused with what to do instead; nothing is ignored
silently. None of them has an effect, so none becomes an option of parameter groups.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

from aotrain.optim.state import MIN_QUANTIZED_NUMEL, check_bits


class BitsandbytesArguments(TypedDict, total=False):
    """Keyword arguments of bitsandbytes' optimizers, with their defaults there.

    Attributes:
        optim_bits: 32, the placeholder of its 8-bit classes, or the bits of this class.
        args: None.
        min_8bit_size: 4096, the size below which state is float32 here too.
        percentile_clipping: 100, no clipping.
        block_wise: True.
        is_paged: False.
    """

    optim_bits: int
    args: None
    min_8bit_size: int
    percentile_clipping: int
    block_wise: bool
    is_paged: bool


# What is accepted, besides `optim_bits`, and what to do for anything else.
_ACCEPTED: dict[str, tuple[Any, str]] = {
    "args": (None, "pass the options themselves as keyword arguments"),
    "min_8bit_size": (
        MIN_QUANTIZED_NUMEL,
        "choose by name, AdamW8bit(precision_groups(model, {'pattern': 32})), or with bits=32 in a parameter group",
    ),
    "percentile_clipping": (100, "clip before the step, torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)"),
    "block_wise": (True, "scales are per block, of `block_size` elements"),
    "is_paged": (False, "keep the state in host memory, CPUOffloadOptimizer(params, AdamW8bit, ...)"),
}


def check_bitsandbytes_arguments(optimizer: str, bits: int | str, arguments: Mapping[str, Any]) -> None:
    """Raise unless these arguments ask for what the optimizer does.

    Args:
        optimizer: name of its class, for messages.
        bits: of its state.
        arguments: keyword arguments that the optimizer does not have itself.

    Raises:
        TypeError: a name that bitsandbytes does not have either.
        ValueError: a value that asks for something else; the message says how to get it.
    """
    for name, value in arguments.items():
        if name == "optim_bits":
            if value not in (32, check_bits(bits)):
                raise ValueError(
                    f"{optimizer} got optim_bits={value!r}, want {bits!r}, or 32, which bitsandbytes ignores too; for "
                    "another state format use its class, for example AdamW8bit, or bits=."
                )
        elif name not in _ACCEPTED:
            raise TypeError(f"{optimizer} got an unexpected keyword argument {name!r}")
        else:
            want, remedy = _ACCEPTED[name]
            if value != want:
                raise ValueError(f"{optimizer} got {name}={value!r}, want {want!r}; {remedy}.")
