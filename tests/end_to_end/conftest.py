# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What several tests of the box start from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from test_answers import BOX, LAB


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Return the box's registry, its paths filled in."""
    found = copy.deepcopy(LAB["lab_models"])
    for model in found.values():
        if "file" in model["source"]:
            model["source"]["file"] = str(BOX / "models" / Path(model["source"]["file"]).name)
    return found
