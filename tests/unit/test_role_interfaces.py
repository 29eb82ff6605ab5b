# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What no linter sees: defaults, argument_specs and README of a role agree, images are pinned, playbooks parse."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())
PLAYBOOKS = sorted((ROOT / "playbooks").glob("*.yml"))
SKELETON = ("defaults/main.yml", "meta/argument_specs.yml", "meta/main.yml", "tasks/main.yml", "README.md")

sys.path.insert(0, str(ROOT / "tests"))
import role_readmes  # noqa: E402


def role_names(paths):
    return [path.name for path in paths]


class Loader(yaml.SafeLoader):
    """Reads Ansible's own tags, such as !unsafe, as plain text."""


Loader.add_multi_constructor("!", lambda loader, _suffix, node: loader.construct_scalar(node))


def load(path):
    return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader) if path.exists() else None


def defaults(role):
    return load(role / "defaults/main.yml") or {}


def options(role):
    """Every entry point's options; where several have one, they say the same of it."""
    merged = {}
    for entry, spec in (load(role / "meta/argument_specs.yml") or {"argument_specs": {}})["argument_specs"].items():
        for name, option in (spec.get("options") or {}).items():
            assert merged.setdefault(name, option) == option, f"{name}: entry point {entry} describes it differently"
    return merged


def is_template(value):
    return isinstance(value, str) and "{{" in value


def test_there_are_roles_and_playbooks():
    assert ROLES
    assert PLAYBOOKS


@pytest.mark.parametrize("role", ROLES, ids=role_names(ROLES))
def test_the_skeleton(role):
    assert [name for name in SKELETON if not (role / name).is_file()] == []


@pytest.mark.parametrize("role", ROLES, ids=role_names(ROLES))
def test_every_task_file_that_can_be_called_is_described(role):
    """A role's users call main and remove; both check their arguments."""
    entries = set((load(role / "meta/argument_specs.yml") or {"argument_specs": {}})["argument_specs"])
    callable_files = {name for name in ("main", "remove") if (role / f"tasks/{name}.yml").exists()}
    assert callable_files - entries == set()
    assert [name for name in entries if not (role / f"tasks/{name}.yml").exists()] == []


@pytest.mark.parametrize("role", ROLES, ids=role_names(ROLES))
def test_defaults_and_argument_specs_name_the_same_variables(role):
    required = {name for name, option in options(role).items() if option.get("required")}
    assert set(defaults(role)) - set(options(role)) == set(), "in the defaults only"
    assert set(options(role)) - required - set(defaults(role)) == set(), "in argument_specs only"
    assert required & set(defaults(role)) == set(), "required, and yet with a default"


@pytest.mark.parametrize("role", ROLES, ids=role_names(ROLES))
def test_defaults_and_argument_specs_have_the_same_values(role):
    """A default that is a template is described in words; null is no default."""
    different = {}
    for name, value in defaults(role).items():
        option = options(role).get(name, {})
        if is_template(value):
            continue
        if "default" not in option:
            if value is not None and value != "":
                different[name] = (value, "no default")
        elif (type(option["default"]), option["default"]) != (type(value), value):
            different[name] = (value, option["default"])
    assert different == {}, "(in the defaults, in argument_specs)"


@pytest.mark.parametrize("role", ROLES, ids=role_names(ROLES))
def test_variables_bear_the_name_of_the_role(role):
    own = set(defaults(role)) | set(load(role / "vars/main.yml") or {})
    assert [name for name in own if not re.match(rf"(__)?{role.name}_", name)] == []


@pytest.mark.parametrize("role", ROLES, ids=role_names(ROLES))
def test_every_default_has_a_comment(role):
    """A comment above it, or above the block of variables that it stands in."""
    text = (role / "defaults/main.yml").read_text(encoding="utf-8")
    bare = []
    for block in re.split(r"\n\s*\n", text.removeprefix("---\n")):
        if re.search(r"^\w+:", block, re.M) and not block.lstrip().startswith("#"):
            bare += re.findall(r"^(\w+):", block, re.M)
    assert bare == []


@pytest.mark.parametrize("role", ROLES, ids=role_names(ROLES))
def test_the_readme_has_the_table_of_variables(role):
    readme = role / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    assert text == role_readmes.written(role), "run python3 tests/role_readmes.py"


@pytest.mark.parametrize("role", ROLES, ids=role_names(ROLES))
def test_images_are_pinned(role):
    loose = []
    for name, value in defaults(role).items():
        if not re.fullmatch(rf"{role.name}(_\w+)?_image", name) or not isinstance(value, str) or not value:
            continue
        digest = re.search(r"@sha256:[0-9a-f]{64}$", value)
        tag = re.search(r":([\w.-]+)$", value.rpartition("/")[2])
        if not digest and (not tag or re.match(r"(latest|main|master|edge|nightly|stable)\b", tag[1])):
            loose.append((name, value))
    assert loose == []


@pytest.mark.parametrize("path", PLAYBOOKS, ids=role_names(PLAYBOOKS))
def test_the_playbook_parses(path):
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "--syntax-check", "-i", "localhost,", str(path)],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(Path.home()),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "LC_ALL": "C.UTF-8",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
