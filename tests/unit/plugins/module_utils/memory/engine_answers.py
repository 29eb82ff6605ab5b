# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What llama-server 0.7.0 said of models on devices; tests/integration/record_memory.py wrote it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

MODELS = json.loads((Path(__file__).parents[3] / "fixtures/memory/engine.json").read_text(encoding="utf-8"))
CASES = [
    pytest.param(model["shape"], answer, model["loaded"], id=f"{name} {answer['layout']}")
    for name, model in MODELS.items()
    for answer in model["answers"]
]
MIB = 1 << 20


def devices(count):
    return [{"id": f"gpu{index}", "vendor": "emulated", "memory_mib": 8192} for index in range(count)]


def agree(predicted, found, exact):
    """Places with MiB: within 0.1 % or 0.05 MiB, or what is left of it where the engine dropped the fraction."""
    return {
        where: (predicted.get(where, 0), found.get(where, 0))
        for where in {*predicted, *found}
        if abs(predicted.get(where, 0) - found.get(where, 0)) > max(0.05, found.get(where, 0) / 1000)
        and not (not exact and -0.05 <= predicted.get(where, 0) - found.get(where, 0) < 1.05)
    } == {}
