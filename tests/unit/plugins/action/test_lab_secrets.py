# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Generated secrets: made once, readable by their owner alone, encrypted where a vault password is configured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[4]
BIN = Path(sys.executable).parent
PLAY = """
- hosts: localhost
  gather_facts: false
  tasks:
    - homelab.inference.lab_secrets:
        path: "{{ playbook_dir }}/group_vars/all/secrets.yml"
        names: [lab_secret_litellm_master_key, lab_secret_llamacpp_api_key]
      register: made
      no_log: true
    - ansible.builtin.debug:
        msg: "{{ made.names | length }} made, {{ made.secrets | length }} known, changed {{ made.changed }}"
"""


def run(directory: Path, *words: str) -> str:
    """Run the play; return its output."""
    (directory / "play.yml").write_text(PLAY, encoding="utf-8")
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    command = [str(BIN / "ansible-playbook"), "-i", "localhost,", str(directory / "play.yml"), "-vvv", "--diff", *words]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("vault", [False, True])
def test_secrets_are_made_once_and_kept(tmp_path: Path, vault: bool) -> None:
    password = tmp_path / "password"
    password.write_text("a vault password\n", encoding="utf-8")
    words = ["--vault-password-file", str(password)] if vault else []
    path = tmp_path / "group_vars" / "all" / "secrets.yml"

    assert "2 made, 2 known, changed True" in run(tmp_path, "--check", *words)
    assert not path.exists()

    shown = run(tmp_path, *words)
    assert "2 made, 2 known, changed True" in shown
    assert path.stat().st_mode & 0o777 == 0o600
    assert not list(path.parent.glob("*.part"))
    content = path.read_text(encoding="utf-8")
    assert content.startswith("$ANSIBLE_VAULT;") == vault
    assert (path.parent / ".gitignore").exists() != vault
    if not vault:
        secrets = yaml.safe_load(content)
        assert secrets["lab_secret_litellm_master_key"].startswith("sk-")
        assert len(set(secrets.values())) == 2 and min(map(len, secrets.values())) > 40
        assert not any(value in shown for value in secrets.values())

    assert "0 made, 2 known, changed False" in run(tmp_path, *words)
    assert path.read_text(encoding="utf-8") == content


def test_what_the_owner_wrote_into_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "group_vars" / "all" / "secrets.yml"
    path.parent.mkdir(parents=True)
    path.write_text("lab_secret_llamacpp_api_key: 'it''s $mine'\nlab_secret_other: x\n", encoding="utf-8")
    assert "1 made, 3 known, changed True" in run(tmp_path)
    secrets = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert secrets["lab_secret_llamacpp_api_key"] == "it's $mine" and secrets["lab_secret_other"] == "x"
