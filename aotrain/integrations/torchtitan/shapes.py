"""Linear layers and experts of torchtitan's models, from their config trees: no model is built.

Names are checked without importing torchtitan or torch: families are folders of the package, sizes the keys of the
table in their source.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from aotrain.integrations.torchtitan.families import DEBUG, FAMILIES

if TYPE_CHECKING:
    from torchtitan.models.common.moe import MoE
    from torchtitan.protocols.model_spec import ModelSpec

    from aotrain.nn.expert_work import Experts
    from aotrain.nn.layer_times import Layer


def families() -> dict[str, tuple[str, ...]]:
    """Sizes of each model family that the installed torchtitan has.

    Raises:
        ImportError: torchtitan is not installed.
    """
    spec = importlib.util.find_spec("torchtitan")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("no torchtitan; pip install 'aotrain[titan]'")
    models = Path(spec.submodule_search_locations[0]) / "models"
    found = {path.parent.name: _sizes(path) for path in sorted(models.glob("*/__init__.py"))}
    for name, family in FAMILIES.items():
        if DEBUG in family.sizes:  # ours
            found[name] = (DEBUG, *found.get(name, ()))
    return {family: sizes for family, sizes in found.items() if sizes}


def layer_shapes(family: str, size: str) -> list[Layer]:
    """Every plain linear layer that may be converted, which gates of routers may not; then all experts.

    Raises:
        ValueError: the family needs a package that is not installed.
    """
    from aotrain.integrations.torchtitan import compat

    compat.install()
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter

    model = _spec(family, size).model
    linears = [
        (fqn, linear.out_features, linear.in_features)
        for fqn, linear, parent, _ in model.traverse(Linear.Config)
        if type(linear) is Linear.Config and not isinstance(parent, TokenChoiceTopKRouter.Config)
    ]
    mixtures = ((fqn, moe) for fqn, moe, _, _ in model.traverse(MoE.Config) if isinstance(moe, MoE.Config))
    return [*linears, *(_experts(fqn, moe) for fqn, moe in mixtures)]


def _experts(fqn: str, moe: MoE.Config) -> Experts:
    import torch

    from aotrain.nn.expert_work import Experts

    config = moe.routed_experts.inner_experts
    with torch.device("meta"):
        weights = {name: weight.shape for name, weight in config.build().named_parameters() if weight.dim() == 3}
    products = tuple((name, n, k) for name, (_, n, k) in weights.items())
    return Experts(f"{fqn}.routed_experts.inner_experts", products, config.num_experts, moe.router.top_k)


def _spec(family: str, size: str) -> ModelSpec:
    from aotrain.integrations.torchtitan.models import model_spec

    if size == DEBUG:
        return model_spec(family, size, "sdpa")
    try:
        return importlib.import_module(f"torchtitan.models.{family}").model_registry(size)
    except ImportError as error:
        raise ValueError(f"model {family}/{size}: torchtitan's {family} cannot be loaded: {error}") from error


def _sizes(source: Path) -> tuple[str, ...]:
    """String keys of the module's `..._configs = {...}`, if it can be asked for a size."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    if not any(isinstance(node, ast.FunctionDef) and node.name == "model_registry" for node in tree.body):
        return ()
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or not target.id.endswith("_configs"):
            continue
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            keys = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
            return tuple(key for key in keys if isinstance(key, str))
    return ()
