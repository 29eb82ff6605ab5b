# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is done with a volume, without an engine."""

from __future__ import annotations

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.model_files import ModelFilesError
from ansible_collections.homelab.inference.plugins.modules.model_volume import (
    driver_options,
    volume_action,
    wanted_files,
)

OURS = {"homelab.inference.managed": "true"}
COPIED = {"Labels": OURS, "Options": None}
LIBRARY = {"Labels": OURS, "Options": driver_options("/srv/models")}


@pytest.mark.parametrize(
    ("volume", "state", "library", "users", "action"),
    [
        (None, "present", None, [], "create"),
        (None, "absent", None, [], "keep"),
        (COPIED, "present", None, ["chat"], "keep"),
        (COPIED, "absent", None, [], "remove"),
        (LIBRARY, "present", "/srv/models", ["chat"], "keep"),
        (LIBRARY, "present", "/srv/other", [], "replace"),
        (LIBRARY, "present", None, [], "replace"),
        (LIBRARY, "absent", None, [], "remove"),
    ],
)
def test_volume_action(volume, state, library, users, action):
    assert volume_action("chat", volume, state, library, users) == action


@pytest.mark.parametrize(
    ("volume", "state", "library", "users", "cause"),
    [
        ({"Labels": None, "Options": None}, "present", None, [], "was not made by this collection"),
        ({"Labels": {"homelab.inference.managed": "false"}}, "absent", None, [], "was not made by this collection"),
        (COPIED, "present", "/srv/models", [], "holds copied files"),
        (COPIED, "absent", None, ["chat", "code"], "cannot be removed: it is used by container chat, code"),
        (LIBRARY, "present", "/srv/other", ["chat"], "cannot be replaced: it is used by container chat"),
    ],
)
def test_volumes_that_are_left_alone(volume, state, library, users, cause):
    with pytest.raises(ModelFilesError, match=cause):
        volume_action("chat", volume, state, library, users)


def entry(**given):
    return {**dict.fromkeys(("url", "path", "controller_path", "sha256", "size", "_mtime_ns")), "name": "chat", **given}


def test_wanted_files():
    (wanted,) = wanted_files({"library": None, "files": [entry(path="/x", sha256="AB" * 32, size=5)]})
    assert (wanted.kind, wanted.source, wanted.sha256, wanted.size) == ("path", "/x", "ab" * 32, 5)


@pytest.mark.parametrize(
    ("library", "files", "cause"),
    [
        ("/srv/models", [entry(path="/x")], "takes no files"),
        ("srv/models", [], "not an absolute path"),
        (None, [entry(path="/x", sha256="sha256:12")], "sha256 of chat is not 64 hexadecimal digits"),
        (None, [entry(name="../x", path="/x")], "File name"),
    ],
)
def test_what_cannot_be_meant(library, files, cause):
    with pytest.raises(ModelFilesError, match=cause):
        wanted_files({"library": library, "files": files})
