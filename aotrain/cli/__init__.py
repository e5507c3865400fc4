"""The `aotrain` command: thin, no logic of its own."""
