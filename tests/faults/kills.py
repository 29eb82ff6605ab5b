# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kills a run of a playbook at any moment, and sees whether the next one brings all to a good end.

    python3 tests/faults/kills.py site|restart|recover [--times 20] [--seed N]

Needs the box (./lab up) as it declares itself. Each time something is changed or broken first, so that the run has work
to do. Everything that the run has started on this machine is killed with SIGKILL at once; what it has started on the
nodes goes on, as it does when a controller loses its power. Then, with nothing done by hand, the playbook runs again:
it has to end well, a site.yml after it to change nothing, and the lab to be healthy. The moments are uniform over the
length of a run that nobody killed; the seed that is printed gives the same ones again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from box import BOX, ROOT, on

BIN = ROOT / ".cache/venv/bin"
ENVIRONMENT = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "PATH": f"{BIN}:{os.environ['PATH']}"}
# The models of the box, with another context every second time.
CONTEXTS = (1024, 2048)


def command(playbook: str, *words: str) -> list[str]:
    """Return how a playbook is run on the box."""
    home = BOX / "lab.generations/newest"
    inventory = home.resolve() / "inventory.json" if playbook == "recover" else ROOT / "inventories/box/lab.yml"
    return [str(BIN / "ansible-playbook"), "-i", str(inventory), str(ROOT / f"playbooks/{playbook}.yml"), *words]


def run(playbook: str, *words: str) -> tuple[int, str]:
    """Run a playbook to its end."""
    done = subprocess.run(
        command(playbook, *words), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
    )
    return done.returncode, done.stdout + done.stderr


def family(parent: int) -> list[int]:
    """Return a process and all that it began, those in sessions of their own too."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(words[1]), []).append(int(entry.parent.name))
    found = [parent]
    for one in found:
        found += children.get(one, [])
    return found


def killed(playbook: str, words: list[str], after: float) -> str:
    """Begin a run and kill it; return the name of the task that it was at."""
    process = subprocess.Popen(
        command(playbook, *words),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _none = process.communicate(timeout=after)
        return f"(it had ended, rc {process.returncode})"
    except subprocess.TimeoutExpired:
        for one in family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        output, _none = process.communicate(timeout=60)
    tasks = re.findall(r"^TASK \[(.*)\]", output, re.MULTILINE)
    return tasks[-1] if tasks else "(before the first task)"


def models(context: int) -> list[str]:
    """Return the words that declare another context for a model of the box."""
    found = yaml.safe_load((ROOT / "inventories/box/lab.yml").read_text(encoding="utf-8"))["all"]["vars"]["lab_models"]
    found["code"]["context"] = context
    found["embed"]["source"] = {"file": str(BOX / "models/embed.gguf")}
    return ["-e", json.dumps({"lab_models": found})]


def prepare(playbook: str, number: int) -> list[str]:
    """Give the run something to do; return the words that it is run with."""
    if playbook == "site":
        words = models(CONTEXTS[number % 2])
        must(run("plan", *words), "plan.yml")
        return words
    if playbook == "recover":
        on("lithium", "systemctl stop llamacpp-embed-2.service")
        on("helium", "docker kill --signal STOP llamacpp-code")
    return []


def must(result: tuple[int, str], what: str) -> str:
    """Return the output of a run that has to end well."""
    if result[0]:
        raise SystemExit(f"{what} ended with {result[0]}:\n{result[1][-4000:]}")
    return result[1]


def main() -> int:
    """Kill, run again, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("playbook", choices=["site", "restart", "recover"])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    print(f"seed {asked.seed}", flush=True)
    words = prepare(asked.playbook, 0)
    began = time.monotonic()
    must(run(asked.playbook, *words), f"{asked.playbook}.yml")
    length = time.monotonic() - began
    print(f"{asked.playbook}.yml takes {length:.0f} s", flush=True)
    for number in range(1, asked.times + 1):
        words = prepare(asked.playbook, number)
        after = chance.uniform(0, length)
        task = killed(asked.playbook, words, after)
        must(run(asked.playbook, *words), f"{asked.playbook}.yml after it was killed at {after:.1f} s, in {task},")
        again = must(
            run("site", *words), f"site.yml after {asked.playbook}.yml was killed at {after:.1f} s, in {task},"
        )
        left = re.findall(r"^(\w+)\s+: ok=\d+\s+changed=([1-9]\d*)", again, re.MULTILINE)
        if left or "Overall: HEALTHY" not in again:
            raise SystemExit(f"killed at {after:.1f} s, in {task}: changed afterwards: {left}\n{again[-3000:]}")
        print(f"{number:3}  killed at {after:5.1f} s  in {task}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
