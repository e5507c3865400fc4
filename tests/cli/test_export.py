"""`aotrain export` as a user types it."""

import pytest

from tests.cli.test_commands import aotrain
from tests.export.checkpoints import tensors_of, write


def test_export_and_its_report(tmp_path):
    source = write(tmp_path / "in", tensors_of())
    result = aotrain("export", source, tmp_path / "out", "--scheme", "int4-g32", "--exclude", "*.0.mlp.*")
    assert result.returncode == 0, result.stderr
    assert "5 linear layers" in result.stdout
    assert "excluded: lm_head, model.layers.0.mlp.down_proj" in result.stdout
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "int4g32"], "did you mean 'int4-g32'"),
        (["--scheme", "int4-g32", "--dtype", "fp16"], "--dtype got fp16"),
    ],
    ids=["scheme", "dtype"],
)
def test_mistakes_are_shown_without_a_traceback(tmp_path, arguments: list[str], message: str):
    source = write(tmp_path / "in", tensors_of())
    result = aotrain("export", source, tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
