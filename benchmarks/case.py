"""One thing to measure."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing to time.

    Attributes:
        name: operation and variant.
        shape: as printed, e.g. "16384x4096".
        run: does the work once; its result is dropped.
        check: raises AssertionError when the result is wrong.
        bytes_moved: the least a perfect implementation reads and writes.
        flops: floating-point operations of its matrix products, 0 without any.
        elements: what to give the time per, such as parameters of an optimizer; 0 for nothing.
        bytes_kept: memory held between runs, such as an optimizer's state.
        first_ms: time of the very first run, with whatever it compiles and allocates.
        group: cases of one group that follow each other are timed in turns, so that whatever else the machine does
            slows all of them; "" for a case of its own.
    """

    name: str
    shape: str
    run: Callable[[], object]
    check: Callable[[], None]
    bytes_moved: int
    flops: int = 0
    elements: int = 0
    bytes_kept: int = 0
    first_ms: float = 0.0
    group: str = ""
