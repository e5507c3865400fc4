"""The house: imports only run from right to left of DESIGN, and files and functions stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "aotrain"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import, besides itself.
ALLOWED = {
    "_build": set(),
    "formats": set(),
    "gpus": set(),
    "recipes": {"formats"},
    "kernels": {"formats", "_build"},
    "ops": {"formats", "recipes", "kernels"},
    "nn": {"gpus", "formats", "recipes", "kernels", "ops"},
    "quantization": {"formats", "recipes", "kernels", "ops", "nn"},
    "qat": {"formats", "recipes", "kernels", "ops", "nn", "quantization"},
    "export": {"formats", "recipes", "kernels", "ops", "nn", "quantization"},
    "optim": {"formats", "kernels"},
    "testing": {"formats"},
    "integrations": {
        *("gpus", "formats", "recipes", "kernels", "ops", "nn", "optim", "quantization", "qat", "export"),
    },
    "cli": {
        *("gpus", "formats", "recipes", "kernels", "ops", "nn", "optim", "quantization", "qat", "export"),
        "integrations",
    },
}
# Packages that only one folder may import.
CONFINED = {
    "triton": ("kernels/triton/", "testing/interpreter.py"),
    "torchtitan": ("integrations/torchtitan/",),
    "datasets": ("integrations/torchtitan/", "integrations/huggingface/", "integrations/finetune/rows.py"),
    "tokenizers": ("integrations/byte_tokenizer.py",),
    "transformers": ("integrations/huggingface/",),
    "trl": ("integrations/huggingface/",),
    "accelerate": ("integrations/huggingface/",),
    "peft": ("integrations/huggingface/",),
    "matplotlib": ("integrations/torchtitan/",),
    "tyro": ("cli/",),
}
NEVER = {"torchao", "bitsandbytes", "transformer_engine", "deepspeed"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import in the file, those inside functions included, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append((node.module or "", node.lineno))
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path):
    part = part_of(path)
    relative = path.relative_to(PACKAGE).as_posix()
    for module, line in imports(path):
        top, *rest = module.split(".")
        where = f"{relative}:{line}: import {module}"
        assert top not in NEVER, f"{where}: peers are not dependencies"
        if top in CONFINED:
            assert relative.startswith(CONFINED[top]), f"{where}: belongs into {CONFINED[top]}"
        if top == "aotrain" and part != "__init__":
            target = rest[0] if rest else "__init__"
            assert target == part or target in ALLOWED[part], f"{where}: {part} may import {sorted(ALLOWED[part])}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = MAX_KERNEL_LINES if "kernels/triton" in path.as_posix() else MAX_FUNCTION_LINES
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{node.name} has {length} lines, want <= {limit}: split it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
    assert path.read_text().isascii()


def test_every_part_of_the_package_has_a_place_in_the_order():
    parts = {part_of(path) for path in FILES} - {"__init__"}
    assert parts <= set(ALLOWED), f"add {sorted(parts - set(ALLOWED))} to the layer order, and to the design"
