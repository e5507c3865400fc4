"""Pretraining on torchtitan 0.3.0's own Trainer.

``job`` is the schema of a job file, ``build`` turns a job into a ``Trainer.Config``, ``train`` is the entry point
(``torchrun -m aotrain.integrations.torchtitan.train --job FILE``), ``overrides`` and ``converters`` bring our linear
layers and optimizers into any stock torchtitan config, ``registry`` is for ``python -m torchtitan.train --module``.
Nothing is imported here: ``compat.install`` has to run before torchtitan is imported on older torch.
"""
