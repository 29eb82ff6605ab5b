# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What CI leaves out: it has 45 minutes, and runs others of the same kind. ./lab test runs them all."""

from __future__ import annotations

import os

import pytest

long = pytest.mark.skipif("CI" in os.environ and "LAB_LONG" not in os.environ, reason="long; set LAB_LONG=1")
