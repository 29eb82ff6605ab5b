# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the secrets that nobody has to choose, once, and writes them beside the inventory."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleActionFail
from ansible.parsing.vault import VaultLib
from ansible.plugins.action import ActionBase

HEADER = (
    "# Generated secrets of this lab. Keep this file; without it the gateway's key is another one after the next run.\n"
)
# LiteLLM takes only master keys that start so.
PREFIXES = {"lab_secret_litellm_master_key": "sk-"}


class ActionModule(ActionBase):
    """Runs on the controller."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Generate what is missing; in check mode only for this run's memory."""
        result = super().run(tmp, task_vars)
        _valid, args = self.validate_argument_spec(
            argument_spec={
                "path": {"type": "path", "required": True},
                "names": {"type": "list", "elements": "str", "required": True},
            }
        )
        path = Path(args["path"])
        known = (self._loader.load_from_file(str(path)) or {}) if path.exists() else {}
        if not isinstance(known, dict):
            raise AnsibleActionFail(
                f"Cannot read the secrets in {path}: it is no mapping. "
                "Correct it, or move it away to have new ones made."
            )
        made = {
            name: PREFIXES.get(name, "") + secrets.token_urlsafe(32) for name in args["names"] if not known.get(name)
        }
        if made and not self._task.check_mode:
            self.write(path, {**{name: str(value) for name, value in known.items()}, **made})
        values = {name: str(value) for name, value in {**known, **made}.items()}
        result.update(changed=bool(made), path=str(path), names=sorted(made), secrets=values)
        return result

    def write(self, path: Path, values: dict[str, str]) -> None:
        """Write the file in one step, readable by its owner alone, encrypted where a vault password is configured."""
        # By way of JSON Ansible's own string types, which YAML does not know, become plain ones.
        text = "---\n" + HEADER + yaml.safe_dump(json.loads(json.dumps(values)), default_flow_style=False)
        vault_secrets = getattr(self._loader._vault, "secrets", None)
        content = VaultLib(vault_secrets).encrypt(text) if vault_secrets else text.encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not vault_secrets:
            ignore = path.parent / ".gitignore"
            if not ignore.exists():
                ignore.write_text(f"{path.name}\n", encoding="utf-8")
        partial = path.with_name(path.name + ".part")
        partial.unlink(missing_ok=True)
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
