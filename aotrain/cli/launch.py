"""Start a job's worker processes under torchrun."""

import os
import shlex
import subprocess
import sys

NOT_INSTALLED = "the aotrain command needs its command-line packages: pip install 'aotrain[titan]'"


def torchrun_command(module: str, arguments: list[str], nproc: int) -> list[str]:
    """The torchrun command line that runs `python -m module arguments` on `nproc` local processes."""
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(nproc)]
    return [*launcher, "-m", module, *arguments]


def run(command: list[str]) -> int:
    """Print a torchrun command as one can type it, run it with this interpreter's torchrun, return its exit status.

    Ctrl-C reaches the workers through the process group; torchrun then takes them down.
    """
    # Many spinning threads per rank are far slower than one; torchrun itself only sets this for several ranks.
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    shown = shlex.join(command)
    if "OMP_NUM_THREADS" not in os.environ:
        shown = f"OMP_NUM_THREADS=1 {shown}"
    print(f"+ {shown}", file=sys.stderr, flush=True)
    executable = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    process = subprocess.Popen(executable, env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()
