# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The next of eight changes to the box, to be made under the load of restart.py.

    python3 tests/bench/restart.py --rounds 8 --command "python3 tests/bench/change.py"

Two models change, one comes and goes, the two change back, the gateway gets another image, and its own again: the box
is then as it was. Which change is next is kept in .cache/change.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
BOX, BIN = ROOT / ".cache" / "box", ROOT / ".cache" / "venv" / "bin"
STEP = ROOT / ".cache" / "change"
INVENTORY = ROOT / "inventories" / "box" / "lab.yml"
GATEWAY = "ghcr.io/berriai/litellm:bench"


def registry() -> dict[str, Any]:
    """Return the box's models, their paths filled in."""
    found = copy.deepcopy(yaml.safe_load(INVENTORY.read_text(encoding="utf-8"))["all"]["vars"]["lab_models"])
    for model in found.values():
        if "file" in model["source"]:
            model["source"]["file"] = str(BOX / "models" / Path(model["source"]["file"]).name)
    return found


def steps() -> list[tuple[str, dict[str, Any]]]:
    """Return what each step does, and the variables it does it with."""
    one = registry()
    one["chat"]["context"] = 1024
    two = copy.deepcopy(one)
    two["code"]["context"] = 1024
    three = copy.deepcopy(two)
    three["more"] = {**registry()["embed"], "replicas": 1, "categories": []}
    four, five, own = copy.deepcopy(two), copy.deepcopy(two), registry()
    five["chat"]["context"] = own["chat"]["context"]
    return [
        ("chat changes", {"lab_models": one}),
        ("code changes", {"lab_models": two}),
        ("a model comes", {"lab_models": three}),
        ("it goes", {"lab_models": four}),
        ("chat changes back", {"lab_models": five}),
        ("code changes back", {"lab_models": own}),
        ("the gateway gets another image", {"lab_models": own, "litellm_image": GATEWAY}),
        ("and its own again", {}),
    ]


def other_gateway() -> None:
    """Put an image that differs in a label into the box's registry."""
    name = f"127.0.0.1:5099/{GATEWAY}"
    recipe = "FROM homelab-inference/litellm:dev\nLABEL bench=1\n"
    for words, given in ((["build", "-q", "-t", name, "-"], recipe), (["push", "-q", name], None)):
        subprocess.run(["docker", *words], input=given, text=True, check=True, capture_output=True, timeout=600)


def main() -> int:
    """Make the next change."""
    known = steps()
    number = int(STEP.read_text(encoding="utf-8")) % len(known) if STEP.exists() else 0
    what, variables = known[number]
    print(f"{number + 1} of {len(known)}: {what}", flush=True)
    if "litellm_image" in variables:
        other_gateway()
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "PATH": f"{BIN}:{os.environ['PATH']}"}
    for playbook in ("plan", "site"):
        words = [BIN / "ansible-playbook", "-i", INVENTORY, ROOT / "playbooks" / f"{playbook}.yml"]
        more = ["-e", json.dumps(variables)] if variables else []
        subprocess.run([*words, *more], cwd=ROOT, env=environment, check=True, timeout=900)
    STEP.write_text(str(number + 1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
