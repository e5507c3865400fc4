"""One rank of tiny deepseek_v3 runs with different token dispatchers, one run after the other.

    python -m tests.integrations.torchtitan.expert_parallel_worker CASES.json

CASES.json: a list of {"port", "out", "arguments"}, or {"port", "out", "job", "settings"} for a job file, with rank and
world size in the environment.
"""

import json
import os
import sys
from pathlib import Path

import torch


def main() -> None:
    torch.set_num_threads(1)
    from aotrain.integrations.torchtitan import compat

    compat.install()
    import torchtitan.trainer
    from torchtitan.config import ConfigManager

    from aotrain.integrations.torchtitan.job import load_job
    from aotrain.integrations.torchtitan.train import _train, run

    torchtitan.trainer.time.sleep = lambda seconds: None  # 2 s at the end of every run
    for case in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(case["port"])
        if "job" in case:
            run(load_job(case["job"], [*case["settings"], f"output_dir={case['out']}"]))
        else:
            _train(ConfigManager().parse_args([*case["arguments"], "--dump_folder", case["out"]]))


if __name__ == "__main__":
    main()
