"""`python -m aotrain.cli`: the aotrain command where its script is not on the path."""

from aotrain.cli.main import main

main()
