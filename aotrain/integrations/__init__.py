"""Adapters that put aotrain into training engines other people wrote: torchtitan for pretraining.

Each engine has its own sub-package, and only that sub-package imports the engine. ``config_file`` is shared by all of
them: it turns a YAML job file into a checked object.
"""
