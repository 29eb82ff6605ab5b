# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much is sent at a time."""

from __future__ import annotations

import pytest
from ansible_collections.homelab.inference.plugins.action.model_volume import PIECE_LEAST, PIECE_MOST, next_piece

MIB = 1 << 20


@pytest.mark.parametrize(
    ("piece", "seconds", "after"),
    [
        (4 * MIB, 0.1, 8 * MIB),
        (4 * MIB, 2.0, 4 * MIB),
        (4 * MIB, 5.0, 2 * MIB),
        (PIECE_MOST, 0.1, PIECE_MOST),
        (PIECE_LEAST, 60.0, PIECE_LEAST),
    ],
)
def test_next_piece(piece, seconds, after):
    assert next_piece(piece, seconds) == after
