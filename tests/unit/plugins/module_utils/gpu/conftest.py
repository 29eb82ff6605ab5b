# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Recorded machines for the tests of the GPU collectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def machine(tmp_path: Path) -> Any:
    """A machine with nothing in it."""
    # This file is read before the collection can be imported.
    from ansible_collections.homelab.inference.tests.unit.plugins.module_utils.gpu.gpu_machine import Machine

    return Machine(tmp_path)
