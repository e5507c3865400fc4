"""Model families and sizes that a job can name, and what torchtitan calls them.

Imports neither torch nor torchtitan, so that a job is checked within a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Networks of one architecture."""

    # In `torchtitan.models`.
    package: str
    # Size in a job -> flavor of the package; "debug" is a size of ours.
    sizes: dict[str, str] = field(default_factory=dict)
    # Whether there are experts.
    is_moe: bool = False


DEBUG = "debug"

FAMILIES = {
    "llama3": Family(package="llama3", sizes={DEBUG: DEBUG, "1b": "1B", "8b": "8B", "70b": "70B"}),
    "deepseek_v3": Family(
        package="deepseek_v3",
        sizes={DEBUG: DEBUG, "debugmodel": "debugmodel", "16b": "16B", "236b": "236B", "671b": "671B"},
        is_moe=True,
    ),
    "qwen3_moe": Family(
        package="qwen3",
        sizes={"debugmodel": "debugmodel_moe", "30b": "30B-A3B", "235b": "235B-A22B"},
        is_moe=True,
    ),
}
