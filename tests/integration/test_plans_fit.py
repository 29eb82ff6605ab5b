# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the planner calls fitting runs within what was planned: three of the registries of tests/fitting/run.py."""

from __future__ import annotations

from random import Random

import pytest

from tests.fitting import files, registries, run
from tests.fitting.execute import CGROUPS, Execution

SEED, FILES, WORK = 3, 5, 1e10


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[files.File]:
    return list(files.pool(Random(SEED), tmp_path_factory.mktemp("models"), FILES, WORK))


@pytest.mark.skipif(not CGROUPS.is_dir(), reason="the memory of containers is read from cgroup v1")
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_plan_holds_in_its_own_limits(pool: list[files.File], number: int) -> None:
    registry = registries.draw(Random(f"{SEED} {number}"), number, pool, bool(number % 2), WORK)
    outcome = Execution(registry).run()
    assert not outcome.problems, [*run.describe(registry), *outcome.problems]
    found = run.ratios(outcome)
    assert len(found) == len(registry.budgets())
    assert [one for one in found if not run.within(one[1], one[2])] == []
    if registry.emulated:
        # Less than was in use there does not do: a GPU gives nothing back.
        share = min(one.kept / one.planned for (_server, where), one in outcome.taken.items() if where != "host")
        less = Execution(registry, 0.95 * share, prompt_seconds=run.patience(outcome)).run()
        assert less.problems
