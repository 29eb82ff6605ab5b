# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which repairs are tried on what is broken, from cheap to dear, and what is told of them."""

from __future__ import annotations

from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.probe import AWAY, SERVING

# Rungs for a model server. kill ends one that does not listen to a stop; recreate makes its container anew, as the role
# does it; fetch also reads its model files again, and gets those that are damaged.
RUNGS = {
    "DOWN": ["restart", "recreate", "fetch"],
    "DEGRADED": ["restart", "recreate", "fetch"],
    "HUNG": ["kill", "recreate", "fetch"],
}
# A server that loads its model is left alone; one that has not come to an end by its deadline is treated as one that
# hangs.
LOADING = "STARTING"
# With less than this on its disk an engine starts no container.
FULL_MIB = 64


def rungs(state: str, patience_over: bool = False) -> list[str]:
    """Return the repairs for a model server in a state, cheapest first; nothing for one that serves or loads.

    :param state: as module health_probe has it.
    :param patience_over: it has been loading for longer than it may.
    """
    if state in SERVING or state == AWAY or (state == LOADING and not patience_over):
        return []
    return list(RUNGS.get("HUNG" if state == LOADING else state, RUNGS["DOWN"]))


def person(host: str, seen: dict[str, Any]) -> str:
    """Return the one sentence on what a person has to do; empty where no person is needed.

    :param seen: C({reached, processes, free_mib, wake}): whether SSH answered, the lines of C(ps -eo stat=,pid=,comm=),
        what is free on the engine's disk in MiB, and how the machine is woken, if that is declared.
    """
    if not seen["reached"]:
        how = f"It was woken by {seen['wake']} and did not come." if seen.get("wake") else "Nothing here can wake it."
        return f"{host} does not answer over SSH. {how} Switch it on, or look at its network."
    stuck = [line.split(None, 2) for line in seen.get("processes", []) if line[:1] == "D"]
    # Not those of a model server: while it reads its files from a slow disk it is in that state as well.
    stuck = [words for words in stuck if len(words) == 3 and words[2].startswith("nvidia")]
    if stuck:
        names = ", ".join(f"{words[2]} ({words[1]})" for words in stuck)
        return f"{host} has processes that no signal ends: {names}. Reboot it."
    free = int(seen["free_mib"]) if seen.get("free_mib") is not None else FULL_MIB
    if free < FULL_MIB:
        return f"The disk of {host} that holds its containers is full ({free} MiB free). Make room on it."
    return ""


def summary(report: dict[str, Any]) -> str:
    """Return a report for people, a line for each thing that was found, done, or is left.

    :param report: C({node, seconds, outcome, found, steps, moved, persons, left}); found and left are results of module
        health_probe, steps C({rung, name, host, seconds, after}).
    """
    called = f", called for {report['node']}" if report["node"] else ""
    lines = [f"RECOVERY {report['outcome']}, {report['seconds']:.0f} s{called}"]
    if not report["found"]:
        lines.append("  Everything answers; nothing was done.")
    for one in report["found"]:
        lines.append(
            f"  found  {one['name']}: {one['state']} ({one['evidence'][-1] if one['evidence'] else 'no answer'})"
        )
    for step in report["steps"]:
        lines.append(
            f"  did    {step['rung']} {step['name']} on {step['host']}: {step['after']} after {step['seconds']:.0f} s"
        )
    lines += [f"  moved  {sentence}" for sentence in report.get("moved", [])]
    lines += [f"  needs a person: {sentence}" for sentence in report["persons"]]
    lines += [f"  still {one['state']}: {one['name']}" for one in report["left"]]
    return "\n".join(lines)
