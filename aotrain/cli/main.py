"""`aotrain COMMAND`: one subcommand per job."""

import sys
from collections.abc import Sequence

from aotrain.cli.launch import NOT_INSTALLED


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `aotrain` script; exits with the status of what it ran."""
    try:
        import tyro
    except ImportError:
        sys.exit(NOT_INSTALLED)
    from aotrain.cli.curves import curves
    from aotrain.cli.export import export
    from aotrain.cli.finetune import finetune, keys_as_options
    from aotrain.cli.plan import plan
    from aotrain.cli.pretrain import pretrain

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["finetune"]:
        arguments = ["finetune", *keys_as_options(arguments[1:])]
    command = tyro.extras.subcommand_cli_from_dict(
        {"pretrain": pretrain, "finetune": finetune, "plan": plan, "curves": curves, "export": export},
        prog="aotrain",
        description="Low-precision training for PyTorch.",
        args=arguments,
        config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff),
    )
    sys.exit(command)
