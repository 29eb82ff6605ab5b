# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a server is worth by how it runs: the one table that planner, exact solver, baselines and docs/quality.md use.

The steps are made so that what an owner gives up first costs least: the whole list of quants costs less than one step
of context, both together less than one step of the KV type, all three less than one step of slots, and the four
together less than leaving the GPU. The value of a plan is the sum of priority x quality of its servers.
"""

from __future__ import annotations

# By position in the owner's list, or in the default one. The numbers go on falling by a thousandth after the last.
STEPS: dict[str, tuple[float, ...]] = {
    "quant": (1.0, 0.994, 0.988, 0.982, 0.976, 0.970),
    "context": (1.0, 0.965, 0.940, 0.920, 0.905, 0.895),
    "kv": (1.0, 0.860, 0.855, 0.850, 0.845, 0.840),
    "slots": (1.0, 0.720, 0.715, 0.710, 0.705, 0.700),
}
AFTER_LAST = 0.999
# (with the least, with all of it) on the processor: experts, or whole layers.
FITS: dict[str, tuple[float, float]] = {
    "one_gpu": (1.0, 1.0),
    "split": (0.995, 0.995),
    "experts_on_cpu": (0.50, 0.44),
    "layers_on_cpu": (0.40, 0.30),
    "cpu": (0.25, 0.25),
}
# Times the quality of where it runs when it is awake.
TURNS = 0.2


def step(name: str, position: int) -> float:
    """Return the factor for one list, by the position of what was taken from it."""
    row = STEPS[name]
    if position < len(row):
        return row[position]
    return row[-1] * AFTER_LAST ** (position - len(row) + 1)


def fit(name: str, share: float = 0.0) -> float:
    """Return the factor for where a server runs; C(share) is the part of the experts or layers on the processor."""
    least, all_of_it = FITS[name]
    return least - (least - all_of_it) * share


def quality(
    quant: int, context: int, kv: int, slots: int, where: str, share: float = 0.0, turns: bool = False
) -> float:
    """Return the quality of a server, from 0 to 1: by its positions in the four lists, and by where and how it runs."""
    product = (
        step("quant", quant) * step("context", context) * step("kv", kv) * step("slots", slots) * fit(where, share)
    )
    return round(product * (TURNS if turns else 1.0), 6)
