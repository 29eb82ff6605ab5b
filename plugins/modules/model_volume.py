#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: model_volume
short_description: Keep model files in a Docker volume
version_added: 0.1.0
author: homelab.inference contributors (!UNKNOWN)
description:
  - Makes a Docker volume and puts model files into it, from a URL, from the node or from the controller.
  - A file appears under its name only when it is complete and its digest holds. What is under way lies beside it as
    C(.NAME.part) and is continued by the next run, also after an interruption.
  - Where the files lie on the node already, O(library) makes a read-only volume onto their directory; nothing is
    copied, and nothing in the directory is ever written, moved or deleted.
  - Volumes that this module did not make (they lack the label C(homelab.inference.managed)) are neither changed nor
    removed.
  - While it works it prints how far it is. If the controller goes away, the node works on by itself.
extends_documentation_fragment:
  - homelab.inference.attributes
attributes:
  check_mode:
    support: full
    details: >-
      Where the Docker SDK or the engine is not there yet, the module says so in a warning and reports what it would do
      on an empty engine.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  name:
    description: Name of the volume.
    type: str
    required: true
  state:
    description:
      - V(present) makes the volume and fetches what is missing in it. Files that are not listed in O(files) stay.
      - V(absent) removes the volume with all that was copied into it. It fails while a container uses the volume.
    type: str
    choices: [present, absent]
    default: present
  library:
    description:
      - Absolute path of a directory on the node. The volume shows it read-only; not together with O(files).
      - Where an existing volume of ours shows another directory it is replaced. That fails while a container uses the
        volume.
    type: path
  files:
    description: The files that shall be in the volume, all shards of a model included.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description:
          - Path in the volume, like V(chat.gguf) or V(qwen/chat-00001-of-00003.gguf). No part may begin with a dot.
        type: str
        required: true
      url:
        description: Fetch it from this C(http) or C(https) URL.
        type: str
      path:
        description: Copy it from this file on the node. Holes of a sparse file stay holes.
        type: path
      controller_path:
        description:
          - Send it from this file on the controller, over the connection that Ansible has to the node anyway.
          - A relative path is looked up as by M(ansible.builtin.copy).
        type: path
      sha256:
        description:
          - The file's SHA-256 in hexadecimal digits. When what was fetched has another one, the file in the volume
            stays as it was and the module fails; what was fetched is kept as C(.NAME.part) until the next run.
          - Without it a file that is there is kept as long as its size and its own recorded digest hold.
        type: str
      size:
        description: The file's size in bytes. Lets the module compare and count before it fetches.
        type: int
      _mtime_ns:
        description:
          - Used by the action plugin, not meant for playbooks. Tells a file of the controller from an earlier one.
        type: int
  verify:
    description:
      - When to read a file that is there already, to see whether its digest holds.
      - V(changed) reads it when its size, modification time or inode differ from those recorded when it was read last.
      - V(always) reads it in every run.
      - V(never) trusts its size.
      - What is being fetched is always checked.
    type: str
    choices: [changed, always, never]
    default: changed
  url_token:
    description:
      - Bearer token for downloads, as model hubs ask for it for some models. It is sent to the host of the URL alone,
        not to others that this host redirects to.
    type: str
  _progress_file:
    description: Used by the action plugin, not meant for playbooks. The file on the node that progress is written to.
    type: path
requirements:
  - On the node, root or the right to read and write Docker's volumes, and the Docker SDK for Python (python3-docker).
  - An engine that runs on the node itself. Volumes of Docker Desktop cannot be reached this way.
seealso:
  - module: homelab.inference.llamacpp_container
  - module: community.docker.docker_volume
"""

EXAMPLES = r"""
- name: Show a directory with models to containers
  homelab.inference.model_volume:
    name: library
    library: /srv/models

- name: Fetch a model in two shards from a hub
  homelab.inference.model_volume:
    name: coder
    url_token: "{{ lab_secret_hub_token }}"
    files:
      - name: coder-00001-of-00002.gguf
        url: https://hub.example.net/coder/resolve/4f2a/coder-00001-of-00002.gguf
        size: 4294967296
        sha256: 1b4f0e9851971998e732078544c96b36c3d01cedf7caa332359d6f1d83567014
      - name: coder-00002-of-00002.gguf
        url: https://hub.example.net/coder/resolve/4f2a/coder-00002-of-00002.gguf
        size: 2147483648
        sha256: 60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752

- name: Copy a model from a slow mount of the node
  homelab.inference.model_volume:
    name: chat
    files:
      - name: chat.gguf
        path: /mnt/c/Users/owner/models/chat.gguf

- name: Send a model from the controller
  homelab.inference.model_volume:
    name: chat
    files:
      - name: chat.gguf
        controller_path: ~/models/chat.gguf

- name: Remove a volume and the copies in it
  homelab.inference.model_volume:
    name: chat
    state: absent
"""

RETURN = r"""
volume:
  description: The volume, empty when O(state=absent).
  returned: success
  type: dict
  contains:
    name:
      description: Name of the volume.
      type: str
      returned: always
    mountpoint:
      description: Where the engine keeps it on the node, V(null) in check mode while it is not there.
      type: str
      returned: always
    library:
      description: The directory that it shows, V(null) where files were copied.
      type: str
      returned: always
  sample: {name: chat, mountpoint: /var/lib/docker/volumes/chat/_data, library: null}
files:
  description: What was done, or would be done in check mode, with each file.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Path in the volume.
      type: str
      returned: always
    action:
      description: V(keep) or V(fetch).
      type: str
      returned: always
    bytes:
      description: What was still to be fetched in bytes. V(null) where only the server can tell.
      type: int
      returned: always
    sha256:
      description: The digest of the file that lies there, V(null) where it was not taken.
      type: str
      returned: always
  sample: [{name: chat.gguf, action: fetch, bytes: 436000, sha256: null}]
fetched_bytes:
  description: Bytes that were copied, downloaded or sent. Holes and what an earlier run had fetched do not count.
  returned: success
  type: int
  sample: 436000
hashed_bytes:
  description: Bytes that were read to take digests. 0 where nothing changed.
  returned: success
  type: int
  sample: 436000
"""

import contextlib
import re
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.homelab.inference.plugins.module_utils.model_files import (
    ModelFilesError,
    Store,
    Wanted,
    check_names,
)
from ansible_collections.homelab.inference.plugins.module_utils.progress import ProgressFile

try:
    import docker
    from docker.errors import DockerException, NotFound

    HAS_DOCKER = True
except ImportError:
    HAS_DOCKER = False

    class DockerException(Exception):  # type: ignore[no-redef]
        """Stands in where the SDK is missing."""


LABEL = "homelab.inference.managed"
KINDS = ("url", "path", "controller_path")


def driver_options(library: str | None) -> dict[str, str]:
    """What Docker's local driver needs to show a directory read-only; nothing for an ordinary volume."""
    return {"type": "none", "o": "bind,ro", "device": library} if library else {}


def shown_library(volume: dict[str, Any]) -> str | None:
    """The directory that a volume shows."""
    return (volume.get("Options") or {}).get("device")


def volume_action(name: str, volume: dict[str, Any] | None, state: str, library: str | None, users: list[str]) -> str:
    """Return keep, create, replace or remove, or raise where that is not for us to do.

    volume is what the engine knows of it, users the names of the containers that use it.
    """
    if volume is None:
        return "create" if state == "present" else "keep"
    if (volume.get("Labels") or {}).get(LABEL) != "true":
        raise ModelFilesError(
            f"Docker volume {name} was not made by this collection: it lacks the label {LABEL}. "
            "Choose another name, or remove the volume yourself."
        )
    if state == "present" and (volume.get("Options") or {}) == driver_options(library):
        return "keep"
    if state == "present" and not shown_library(volume):
        raise ModelFilesError(
            f"Docker volume {name} holds copied files and cannot become a view of {library}. "
            "Remove it first (state: absent), or choose another name."
        )
    if users:
        verb = "removed" if state == "absent" else "replaced"
        raise ModelFilesError(
            f"Docker volume {name} cannot be {verb}: it is used by container {', '.join(users)}. "
            "Remove the container first."
        )
    return "remove" if state == "absent" else "replace"


class Volume:
    """The volume as the engine has it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.attrs: dict[str, Any] | None = None
        self.users: list[str] = []
        if not HAS_DOCKER:
            raise ModelFilesError(
                f"Docker volume {name} cannot be managed: the Docker SDK for Python is missing. Install python3-docker."
            )
        try:
            self._client = docker.from_env(version="auto")
        except DockerException as error:
            raise ModelFilesError(
                f"Docker volume {name} cannot be managed: the engine does not answer ({error}). "
                "Start Docker on the node."
            ) from error
        self._read()

    def _read(self) -> None:
        try:
            self.attrs = self._client.volumes.get(self.name).attrs
        except NotFound:
            self.attrs = None
            return
        # The filter also finds containers that mount something else at a path of this name.
        self.users = [
            container["Names"][0].lstrip("/")
            for container in self._client.api.containers(all=True, filters={"volume": self.name})
            if any(mount.get("Name") == self.name for mount in container["Mounts"])
        ]

    def apply(self, action: str, library: str | None) -> None:
        """Carry out what volume_action() decided."""
        if action in ("remove", "replace"):
            self._client.volumes.get(self.name).remove()
            self.attrs = None
        if action in ("create", "replace"):
            self._client.volumes.create(
                name=self.name, driver="local", driver_opts=driver_options(library), labels={LABEL: "true"}
            )
            self._read()


def wanted_files(params: dict[str, Any]) -> list[Wanted]:
    """The files of the task, refused where they cannot be meant."""
    check_names([one["name"] for one in params["files"]])
    if params["library"] and params["files"]:
        raise ModelFilesError("A volume onto a library takes no files: nothing is copied. Leave out library or files.")
    if params["library"] and not params["library"].startswith("/"):
        raise ModelFilesError(f"Library {params['library']} is not an absolute path. Write it from / on.")
    wanted = []
    for one in params["files"]:
        kind = next(kind for kind in KINDS if one[kind] is not None)
        sha256 = one["sha256"].lower() if one["sha256"] else None
        if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ModelFilesError(f"sha256 of {one['name']} is not 64 hexadecimal digits. Check it.")
        wanted.append(Wanted(one["name"], kind, one[kind], sha256, one["size"], one["_mtime_ns"]))
    return wanted


def describe(volume: dict[str, Any] | None, store: Store | None, names: list[str]) -> dict[str, Any]:
    """One side of the diff."""
    if volume is None:
        return {}
    files = {}
    for name in names if store else []:
        found = store.find(name)
        if found:
            files[name] = {"bytes": found.size, "sha256": found.sha256 if found.fresh else None}
    return {"library": shown_library(volume), "files": files}


def run(module: AnsibleModule, progress: ProgressFile) -> dict[str, Any]:
    """Bring volume and files to what the task says and return the module's result."""
    params, check = module.params, module.check_mode
    name, library = params["name"], params["library"]
    wanted = wanted_files(params)
    volume: Volume | None = None
    try:
        volume = Volume(name)
    except ModelFilesError as error:
        if not check:
            raise
        module.warn(f"{error} In check mode it is taken for an engine without volumes.")
    attrs = volume.attrs if volume else None
    action = volume_action(name, attrs, params["state"], library, volume.users if volume else [])
    if library and params["state"] == "present" and not Path(library).is_dir():
        raise ModelFilesError(f"Library {library} is not a directory on the node. Check library, or mount it first.")

    def store_of(attrs: dict[str, Any] | None) -> Store:
        return Store(attrs["Mountpoint"] if attrs else "/nonexistent", progress, params["url_token"])

    names = [one.name for one in wanted]
    reachable = attrs is not None and not shown_library(attrs)
    before = describe(attrs, store_of(attrs) if reachable else None, names)
    if not check and volume and action != "keep":
        volume.apply(action, library)
        attrs = volume.attrs
    if params["state"] == "absent":
        result = {"changed": action == "remove", "volume": {}, "files": [], "fetched_bytes": 0, "hashed_bytes": 0}
        return {**result, "diff": {"before": before, "after": {}}}

    result = {"changed": action != "keep", "files": [], "transfers": []}
    after = {"library": library, "files": dict(before.get("files", {}))}
    store = store_of(attrs)
    if wanted:
        result.update(bring_files(store, wanted, params["verify"], check, attrs is not None))
        result["changed"] |= any(one["action"] == "fetch" for one in result["files"])
        for one, entry in zip(wanted, result["files"]):
            if entry["action"] == "fetch":
                after["files"][one.name] = {"bytes": store.size(one), "sha256": one.sha256 or entry["sha256"]}
    result["volume"] = {"name": name, "mountpoint": attrs["Mountpoint"] if attrs else None, "library": library}
    result["fetched_bytes"], result["hashed_bytes"] = store.fetched_bytes, store.hashed_bytes
    result["diff"] = {"before": before, "after": after}
    return result


def bring_files(store: Store, wanted: list[Wanted], verify: str, check: bool, exists: bool) -> dict[str, Any]:
    """Fetch what is missing, in check mode only say what is. What the controller has, the action plugin sends."""
    transfers = []
    if exists:
        try:
            next(store.directory.iterdir(), None)
        except OSError as error:
            raise ModelFilesError(
                f"Directory {store.directory} of the volume cannot be reached: {error.strerror}. "
                "Run the module on the machine of the engine and as root (become: true)."
            ) from error
    with contextlib.nullcontext() if check else store.lock():
        fetch = {one.name: store.missing(one) for one in wanted if not store.good(one, verify, remember=not check)}
        missing = [one for one in wanted if one.name in fetch]
        if exists:
            store.check_space(missing)
        for one in missing if not check else []:
            if one.kind != "controller_path":
                store.fetch(one)
                continue
            done = store.await_part(one)
            if done is not None:
                part = str(store.path(one.name, "part"))
                transfers.append({"name": one.name, "path": one.source, "part": part, "done": done})
        files = []
        for one in wanted:
            found = store.find(one.name)
            files.append(
                {
                    "name": one.name,
                    "action": "fetch" if one.name in fetch else "keep",
                    "bytes": fetch.get(one.name, 0),
                    "sha256": found.sha256 if found and found.fresh else None,
                }
            )
    return {"files": files, "transfers": transfers}


def main() -> None:
    """Run the module."""
    file_options = {
        "name": {"type": "str", "required": True},
        "url": {"type": "str"},
        "path": {"type": "path"},
        "controller_path": {"type": "path"},
        "sha256": {"type": "str"},
        "size": {"type": "int"},
        "_mtime_ns": {"type": "int"},
    }
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "library": {"type": "path"},
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": file_options,
                "mutually_exclusive": [KINDS],
                "required_one_of": [KINDS],
            },
            "verify": {"type": "str", "choices": ["changed", "always", "never"], "default": "changed"},
            "url_token": {"type": "str", "no_log": True},
            "_progress_file": {"type": "path"},
        },
        supports_check_mode=True,
    )
    try:
        with ProgressFile(module.params["_progress_file"]) as progress:
            result = run(module, progress)
    except ModelFilesError as error:
        module.fail_json(msg=str(error))
    except (DockerException, OSError) as error:
        module.fail_json(msg=f"Docker volume {module.params['name']} could not be brought about: {error}. Run again.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
