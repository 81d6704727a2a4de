"""Sixteen mixed requests: two packs, both modes, every `apply`, several scales, some unsteered."""

import random

STEERING = [
    None,
    {"pack": "one"},
    {"pack": "two"},
    {"pack": "one", "scale": 0.5},
    {"pack": "two", "scale": -1.0, "apply": "last"},
    {"pack": "one", "apply": "all"},
    {"pack": "two", "mode": "fv"},
    None,
    {"pack": "one", "mode": "fv", "scale": 2.0, "apply": "last"},
    {"pack": "two", "mode": "fv", "apply": "all"},
    {"pack": "one", "mode": "fv", "layer": 1},
    {"pack": "two", "scale": 2.5, "apply": "generation"},
    {"pack": "one", "scale": 1.25, "apply": "last"},
    None,
    {"pack": "two", "mode": "fv", "layer": 0, "scale": 0.75},
    {"pack": "one", "scale": 3.0, "apply": "all"},
]


def prompts(vocabulary=49000, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(20, vocabulary) for _ in range(rng.choice([3, 17, 33, 64, 70]))] for _ in STEERING]
