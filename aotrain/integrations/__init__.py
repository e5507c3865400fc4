"""Adapters that put aotrain into training engines other people wrote: torchtitan for pretraining, transformers' Trainer
and TRL for fine-tuning.

Each engine has its own sub-package, and only that sub-package imports the engine. Shared by all of them:
``config_file`` turns a YAML job file into a checked object, ``optimizers`` turns a name in it into a class,
``finetune`` is the recipe of fine-tuning jobs, ``byte_tokenizer`` and ``stdlib_source`` need no network.
"""
