# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The documented labs: each is a good declaration, and every row of the mission stands somewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LABS = ("box", "dragons", "jetson", "lumina", "mrzk", "strix")
MISSION: dict[str, Any] = yaml.safe_load((ROOT / "tests" / "unit" / "mission.yml").read_text(encoding="utf-8"))
# Rows of the mission's sections 1.1 to 1.5.
ROWS = 109
# What only an owner can give; any value will do to see that the declaration is whole.
OWNERS_SECRETS = {"CLOUDFLARE_TOKEN": "cf-3f1d77a0", "DISCORD_WEBHOOK": "https://discord.example/api/webhooks/1/abc"}


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's programs from the environment that runs the tests."""
    program = str(Path(sys.executable).parent / words[0])
    return subprocess.run(
        [program, *words[1:]],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("lab", LABS)
def test_a_documented_lab_validates(lab: str) -> None:
    result = run("ansible-playbook", "-i", f"inventories/{lab}/lab.yml", "playbooks/validate.yml", **OWNERS_SECRETS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_secret_that_only_the_owner_has_is_asked_for() -> None:
    result = run(
        "ansible-playbook",
        "-i",
        "inventories/mrzk/lab.yml",
        "playbooks/validate.yml",
        CLOUDFLARE_TOKEN="",
        DISCORD_WEBHOOK="",
    )
    assert result.returncode == 2
    assert "lab_secret_cloudflare_token is missing or empty" in result.stdout
    assert "lab_secret_discord_webhook is missing or empty" in result.stdout


@pytest.mark.parametrize("source", ["inventories/mrzk/lab.yml", "inventories/mrzk"])
def test_a_lock_beside_the_inventory_makes_no_group(source: str, tmp_path: Path) -> None:
    """A YAML file beside an inventory is read as inventory, unless its name is hidden."""
    lab = tmp_path / "inventories" / "mrzk"
    lab.mkdir(parents=True)
    (lab / "lab.yml").write_text((ROOT / "inventories/mrzk/lab.yml").read_text(encoding="utf-8"), encoding="utf-8")
    before = run("ansible-inventory", "-i", str(tmp_path / source), "--graph")
    (lab / ".lab.lock.yml").write_text(
        "lock_version: 1\ninstances:\n  hosts: {evil: }\nnodes:\n  hosts: {more: }\n", encoding="utf-8"
    )
    after = run("ansible-inventory", "-i", str(tmp_path / source), "--graph")
    assert before.returncode == after.returncode == 0
    assert "@control" in before.stdout and "evil" not in after.stdout
    assert before.stdout == after.stdout


def test_every_row_of_the_mission_is_there() -> None:
    assert len(MISSION) == ROWS


@pytest.mark.parametrize("row", MISSION)
def test_a_row_of_the_mission_stands_where_it_says(row: str) -> None:
    place = MISSION[row]
    if isinstance(place, str):
        assert place.endswith(".") and len(place) > 40, f"{row} needs a reason in a sentence"
        return
    lab, path = place
    value = yaml.safe_load((ROOT / "inventories" / lab / "lab.yml").read_text(encoding="utf-8"))["all"]
    # Model names hold dots: the longest key that fits is taken at each step.
    rest = path
    while rest:
        if isinstance(value, list):
            step, _dot, rest = rest.partition(".")
            value = value[int(step)]
            continue
        fitting = [key for key in value if rest == key or rest.startswith(f"{key}.")]
        assert fitting, f"{row}: inventories/{lab}/lab.yml has no {path}"
        key = max(fitting, key=len)
        value, rest = value[key], rest[len(key) + 1 :]
    assert value is not None


def test_the_example_of_the_readme_is_short() -> None:
    """A lab of five machines, five models, seven services takes at most 80 lines."""
    text = (ROOT / "docs" / "example.yml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    variables = yaml.safe_load(text)["all"]["vars"]
    assert (len(variables["lab_models"]), len(variables["lab_services"])) == (5, 7)
    assert len(yaml.safe_load(text)["all"]["hosts"]) == 5


def test_the_example_of_the_readme_validates() -> None:
    result = run("ansible-playbook", "-i", "docs/example.yml", "playbooks/validate.yml")
    assert result.returncode == 0, result.stdout + result.stderr
