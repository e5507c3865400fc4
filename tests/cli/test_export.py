"""`aotrain export` as a user types it."""

import pytest

from aotrain.cli.main import main
from tests.export.checkpoints import tensors_of, write


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, arguments)])
    return stop.value.code


def test_export_and_its_report(tmp_path, capsys):
    source = write(tmp_path / "in", tensors_of())
    assert run(source, tmp_path / "out", "--scheme", "int4-g32", "--exclude", "*.0.mlp.*") == 0
    output = capsys.readouterr().out
    assert "5 linear layers" in output
    assert "excluded: lm_head, model.layers.0.mlp.down_proj" in output
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "int4g32"], "error: get_scheme got 'int4g32'; did you mean 'int4-g32'"),
        (["--scheme", "int4-g32", "--dtype", "fp16"], "error: --dtype got fp16"),
        (["--scheme", "int4-g32", "--weight-dtype", "bf16"], "error: --weight-dtype got bf16"),
    ],
    ids=["scheme", "dtype", "weight dtype"],
)
def test_mistakes_are_errors_that_write_nothing(tmp_path, capsys, arguments: list[str], message: str):
    source = write(tmp_path / "in", tensors_of())
    assert run(source, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_check_writes_nothing(tmp_path, capsys):
    source = write(tmp_path / "in", tensors_of())
    assert run(source, tmp_path / "out", "--scheme", "nvfp4", "--check") == 0
    output = capsys.readouterr().out
    assert "vLLM: CompressedTensorsW4A4Fp4" in output
    assert "self_attn: q_proj + k_proj (2 groups)" in output
    assert not (tmp_path / "out").exists()
