"""Benchmarks: `python -m benchmarks.run NAME`. Every claim about speed has a row in benchmarks/results."""
