# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The documented labs are planned as their reviewed plans say."""

from __future__ import annotations

import pytest

from tests.plans import plans


@pytest.mark.parametrize("name", plans.SCENARIOS)
def test_a_lab_is_planned_as_reviewed(name: str, pytestconfig: pytest.Config) -> None:
    path = plans.HERE / f"{name}.plan.txt"
    planned = plans.render(plans.SCENARIOS[name])
    if pytestconfig.getoption("--rewrite-plans"):
        path.write_text(planned, encoding="utf-8")
    assert planned == path.read_text(encoding="utf-8")
