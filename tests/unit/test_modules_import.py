# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What runs on nodes runs with Python 3.9 and what distributions package: nothing from PyPI is there."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import ansible
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "plugins/modules").glob("*.py"))
MODULE_UTILS = sorted((ROOT / "plugins/module_utils").rglob("*.py"))
NODE_PROGRAM = sorted((ROOT / "roles").glob("*/files/*.py"))

# Modules travel with ansible.module_utils and our own module_utils, and see no other package than the standard library.
IMPORT = """
import importlib.util, json, pathlib, sys, types
names, beside = json.loads(sys.argv[1])
sys.path[:0] = [sys.argv[2], *beside]
failed = {}
for name in names:
    try:
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, name)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        else:
            importlib.import_module(name)
    except BaseException as exc:
        failed[name] = f"{type(exc).__name__}: {exc}"
json.dump(failed, sys.stdout)
"""


def python39():
    names = [os.environ.get("PYTHON39", ""), "/usr/bin/python3.9", "/usr/local/bin/python3.9"]
    names += [str(path) for path in sorted(Path.home().glob(".pyenv/versions/3.9.*/bin/python"))]
    for name in names:
        if name and Path(name).exists():
            return name
    return None


@pytest.fixture(scope="module")
def python():
    found = python39()
    if not found:
        pytest.skip(
            "no Python 3.9 on this machine: not covered are the modules, module_utils and the node program with it"
        )
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """ansible.module_utils as it travels, and the collection beside it, without the rest of ansible-core."""
    path = tmp_path_factory.mktemp("node")
    (path / "ansible").mkdir()
    (path / "ansible/__init__.py").touch()
    (path / "ansible/module_utils").symlink_to(Path(ansible.__file__).parent / "module_utils")
    (path / "ansible/release.py").symlink_to(Path(ansible.__file__).parent / "release.py")
    inference = path / "ansible_collections/homelab/inference"
    inference.parent.mkdir(parents=True)
    inference.symlink_to(ROOT)
    return path


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("ansible_collections", "homelab", "inference", *parts)).removesuffix(".__init__")


def imports(python, tree, names, beside=()):
    done = subprocess.run(
        [python, "-I", "-S", "-W", "error::SyntaxWarning", "-c", IMPORT, json.dumps([names, list(beside)]), str(tree)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_modules_that_run_on_nodes(python, tree):
    assert MODULES
    assert imports(python, tree, [dotted(path) for path in MODULES]) == {}


def test_module_utils(python, tree):
    assert MODULE_UTILS
    assert imports(python, tree, [dotted(path) for path in MODULE_UTILS]) == {}


def test_the_node_program(python, tree):
    assert NODE_PROGRAM
    assert imports(python, tree, [str(path) for path in NODE_PROGRAM], [str(ROOT / "plugins/module_utils")]) == {}
