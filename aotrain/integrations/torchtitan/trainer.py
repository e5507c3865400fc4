"""torchtitan's trainer, which counts tokens in a way that outlives a change of the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchtitan.trainer import Trainer


class RunTrainer(Trainer):
    """Saves the tokens that all ranks have seen; torchtitan saves those of one rank, which another number of ranks
    would multiply wrongly."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def state_dict(self) -> dict[str, Any]:
        """torchtitan's state, with the token count of all ranks together."""
        _, ranks = self._place()
        return {**Trainer.state_dict(self), "ntokens_seen": self.ntokens_seen * ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of the token count, so that the sum over ranks is the count."""
        rank, ranks = self._place()
        part, rest = divmod(state_dict["ntokens_seen"], ranks)
        Trainer.load_state_dict(self, {**state_dict, "ntokens_seen": part + (rank < rest)})

    def _place(self) -> tuple[int, int]:
        """This rank among those whose token counts are summed, and how many they are."""
        mesh = self.parallel_dims.get_optional_mesh("loss")
        return (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
