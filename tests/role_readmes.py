# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes the table of variables into each role's README, from its argument_specs. Run it after a change to either."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- variables: written by tests/role_readmes.py -->"
END = "<!-- end of variables -->"


def plain(text: Any) -> str:
    """A description without Ansible's markup, on one line of a table."""
    words = " ".join(text) if isinstance(text, list) else str(text)
    words = re.sub(r"\b[CVOM]\(([^)]*)\)", r"`\1`", words)
    return re.sub(r"\s+", " ", words).strip().replace("|", "\\|")


def row(name: str, option: dict[str, Any]) -> str:
    kind = option.get("type", "str")
    if "elements" in option:
        kind += f" of {option['elements']}"
    if "choices" in option:
        kind = " \\| ".join(str(choice) for choice in option["choices"])
    if option.get("required"):
        default = "required"
    elif "default" in option:
        value = option["default"]
        default = f"`{value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)}`"
    else:
        default = ""
    return f"| `{name}` | {kind} | {default} | {plain(option.get('description', ''))} |"


def table(role: Path) -> str:
    """The variables of all entry points, each once."""
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text(encoding="utf-8"))["argument_specs"]
    options: dict[str, Any] = {}
    for entry in specs.values():
        options = {**(entry.get("options") or {}), **options}
    rows = [row(name, option) for name, option in options.items()]
    return "\n".join([BEGIN, "| variable | type | default | what it is |", "|---|---|---|---|", *rows, END])


def written(role: Path) -> str:
    """The README with its table brought up to date; at the end where it has none yet."""
    readme = role / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else f"# {role.name}\n"
    before, begin, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if begin else "\n"
    return before.rstrip() + "\n\n" + table(role) + after


def main() -> None:
    for specs in sorted(ROOT.glob("roles/*/meta/argument_specs.yml")):
        role = specs.parents[1]
        if sys.argv[1:] and role.name not in sys.argv[1:]:
            continue
        readme = role / "README.md"
        text = written(role)
        if not readme.exists() or readme.read_text(encoding="utf-8") != text:
            readme.write_text(text, encoding="utf-8")
            print(f"wrote {readme.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
