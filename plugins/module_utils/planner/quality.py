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
    "quant": (1.0, 0.997, 0.994, 0.991, 0.988, 0.985),
    "context": (1.0, 0.980, 0.970, 0.965, 0.960, 0.955),
    "kv": (1.0, 0.935, 0.932, 0.929, 0.926, 0.923),
    "slots": (1.0, 0.860, 0.857, 0.854, 0.851, 0.848),
}
AFTER_LAST = 0.999
# (with the least, with all of it) on the processor: experts, or whole layers.
FITS: dict[str, tuple[float, float]] = {
    "one_gpu": (1.0, 1.0),
    "split": (0.998, 0.998),
    "experts_on_cpu": (0.72, 0.70),
    "layers_on_cpu": (0.68, 0.64),
    "cpu": (0.60, 0.60),
}
# Taking turns, times the quality of where it runs when awake: the owner's first wish (keep: on-demand), or what he
# accepts where nothing else fits. Two that take turns are worth more than one that does not and one that is refused.
TURNS = {"wanted": 0.995, "accepted": 0.52}


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
    quant: int, context: int, kv: int, slots: int, where: str, share: float = 0.0, turns: str | None = None
) -> float:
    """Return the quality of a server, from 0 to 1: by its positions in the four lists, and by where and how it runs."""
    product = (
        step("quant", quant) * step("context", context) * step("kv", kv) * step("slots", slots) * fit(where, share)
    )
    return round(product * (TURNS[turns] if turns else 1.0), 6)
