# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A tool that hangs does not hang us."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.gpu.command import run
from ansible_collections.homelab.inference.plugins.module_utils.gpu.facts import gather
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils.gpu.gpu_machine import Machine

FREEZER = Path("/sys/fs/cgroup/freezer")

needs_freezer = pytest.mark.skipif(
    not os.access(FREEZER / "cgroup.procs", os.W_OK),
    reason=f"needs a cgroup v1 freezer that this user may write to: {FREEZER}",
)


def test_answer() -> None:
    """Exit status and both streams."""
    answer = run(
        [sys.executable, "-c", "import sys; print('a', flush=True); print('b', file=sys.stderr); sys.exit(3)"], 10
    )
    assert (answer.rc, answer.output, answer.hung) == (3, "a\nb\n", None)


def test_more_output_than_a_pipe_holds() -> None:
    """Nothing waits for a reader."""
    assert len(run([sys.executable, "-c", "print('x' * 1_000_000)"], 10).output) == 1_000_001


def test_no_such_tool(tmp_path: Path) -> None:
    """A tool that cannot be started is an answer too."""
    answer = run([str(tmp_path / "nvidia-smi"), "-q"], 10)
    assert answer.rc is None
    assert "No such file" in answer.output


def test_slow_tool_is_killed() -> None:
    """What can be killed is killed, at the deadline."""
    start = time.monotonic()
    answer = run(["sleep", "60"], 0.2)
    assert time.monotonic() - start < 5
    assert answer.hung == "sleep gave no answer in 0.2 s"
    assert answer.rc == -9


@pytest.fixture
def freezer() -> Iterator[Path]:
    """A group whose processes freeze, as those stuck in a driver do: they survive SIGKILL until they are thawed."""
    group = FREEZER / f"homelab-inference-test-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        pids = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        (group / "freezer.state").write_text("THAWED")
        for pid in pids:
            os.kill(pid, 9)
        deadline = time.monotonic() + 10
        while (group / "cgroup.procs").read_text().split() and time.monotonic() < deadline:
            time.sleep(0.02)
        group.rmdir()


@needs_freezer
def test_tool_stuck_in_the_driver(machine: Machine, freezer: Path) -> None:
    """A process that survives SIGKILL is left behind, and its card is reported as hung."""
    machine.card("0000:01:00.0", "10de:1eb0", driver="nvidia")
    machine.tool("nvidia-smi")
    script = f"#!/bin/sh\necho $$ > {freezer}/cgroup.procs\necho FROZEN > {freezer}/freezer.state\n"
    (machine.root / "usr/bin/nvidia-smi").write_text(script)
    start = time.monotonic()
    facts = gather(Host(machine.root, deadline=0.3))
    assert time.monotonic() - start < 5

    (pid,) = (freezer / "cgroup.procs").read_text().split()
    assert Path(f"/proc/{pid}").exists()
    assert facts["inference_gpus"] == []
    (problem,) = facts["inference_gpu_problems"]
    assert problem["state"] == "hung"
    assert f"its process {pid} (state D) survives SIGKILL" in problem["evidence"]
