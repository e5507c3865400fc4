"""The model of `aotrain.nn.roofline` beside the published facts that it is fitted to.

    python -m benchmarks.roofline               each fact and what the model says
    python -m benchmarks.roofline --fit SEED    random search for factors that miss the facts by less

Nothing is measured here, and no GPU is needed.
"""

import argparse
import dataclasses
import itertools
import random
from collections.abc import Iterator

from aotrain.gpus import GPUS
from aotrain.nn.filters import PUBLISHED_TOKENS, PUBLISHED_TOO_SMALL
from aotrain.nn.layer_times import layer_gain
from aotrain.nn.plan import MIN_GAIN
from aotrain.nn.roofline import Factors, Roofline
from aotrain.recipes import RECIPES

# (M, K, N) -> speed-up of one float8 tensorwise layer on H100, compiled: torchao's float8 README.
PUBLISHED_GAINS = {(1024, 2048, 1024): 0.80, (4096, 8192, 16384): 1.39}
SIZES = (1024, 2048, 4096, 8192, 16384)
# Where the search looks. int8 is fitted by hand to one step on A100, the bandwidth is taken as published.
_RANGES = {
    "bf16": (0.65, 0.80),
    "float8": (0.65, 0.90),
    "slow_accumulation": (0.6, 1.0),
    "row_scales": (0.6, 1.0),
    "fill": (0.0, 1000.0),
    "gemm_fixed": (2e-6, 1e-5),
    "kernel_fixed": (1e-6, 3e-6),
}
_TRIES = 3000


def filter_gains(times: Roofline) -> Iterator[tuple[str, int, int, float, bool]]:
    """(recipe, N, K, modelled gain, whether published as too small) of every size of torchao's filter."""
    for recipe, too_small in PUBLISHED_TOO_SMALL.items():
        for n, k in itertools.product(SIZES, SIZES):
            yield recipe, n, k, layer_gain(n, k, PUBLISHED_TOKENS, RECIPES[recipe], times), too_small(n, k)


def layer_gains(times: Roofline) -> Iterator[tuple[tuple[int, int, int], float, float]]:
    """((M, K, N), modelled gain, published gain)."""
    for (m, k, n), published in PUBLISHED_GAINS.items():
        yield (m, k, n), layer_gain(n, k, m, RECIPES["float8_tensorwise"], times), published


def miss(factors: Factors) -> float:
    """How far the model is from the facts: sizes on the wrong side weigh most."""
    times = Roofline(GPUS["H100"], factors)
    total = sum(abs(modelled - published) for _, modelled, published in layer_gains(times))
    for _, _, _, gain, small in filter_gains(times):
        beyond = gain - MIN_GAIN if small else MIN_GAIN - gain
        if beyond >= 0:
            total += 0.1 + 2 * beyond
    return total


def fit(seed: int) -> Factors:
    """The best factors of a random walk from the present ones."""
    generator = random.Random(seed)
    best, least = Factors(), miss(Factors())
    for i in range(_TRIES):
        width = 0.2 * (1 - i / _TRIES) + 0.01
        changes = {
            name: min(max(getattr(best, name) + generator.gauss(0, width) * (high - low), low), high)
            for name, (low, high) in _RANGES.items()
            if generator.random() < 0.4
        }
        candidate = dataclasses.replace(best, **changes)
        if (found := miss(candidate)) < least:
            best, least = candidate, found
    return best


def report(factors: Factors) -> str:
    """The facts, one per line."""
    times = Roofline(GPUS["H100"], factors)
    lines = [str(factors), f"distance from the facts {miss(factors):.3f}"]
    for (m, k, n), modelled, published in layer_gains(times):
        lines.append(f"float8_tensorwise M={m} K={k} N={n}: published x{published:.2f}, model x{modelled:.2f}")
    for recipe, n, k, gain, small in filter_gains(times):
        verdict = "too small" if small else "faster"
        wrong = "  WRONG SIDE" if (gain < MIN_GAIN) != small else ""
        lines.append(f"{recipe} M={PUBLISHED_TOKENS} N={n} K={k}: published {verdict}, model x{gain:.3f}{wrong}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fit", type=int, metavar="SEED", help="search for better factors")
    arguments = parser.parse_args()
    print(report(Factors() if arguments.fit is None else fit(arguments.fit)))


if __name__ == "__main__":
    main()
