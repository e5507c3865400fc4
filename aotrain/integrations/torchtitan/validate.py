"""torchtitan's validator, which also measures after the last step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchtitan.components.validate import Validator


class RunValidator(Validator):
    """Measures at step 1, every ``freq`` steps and at the end, so that a run always has a first and a final loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        last_step: int | None = None
        """Length of the run; None: no extra measurement."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        Validator.__init__(self, config, **kwargs)
        self._last_step = config.last_step

    def should_validate(self, step: int) -> bool:
        return Validator.should_validate(self, step) or step == self._last_step
