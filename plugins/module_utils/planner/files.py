# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a model's files lie on a node already."""

from __future__ import annotations

from typing import Any


def in_place(files: list[dict[str, Any]], library: list[dict[str, Any]]) -> dict[str, str] | None:
    """Return C({library, path}) of the first file where all files of a model lie in one library of a node, else None.

    A file counts as the same when name and size agree, and the digests where both are known.
    """
    for directory in dict.fromkeys(entry["library"] for entry in library):
        own: dict[str, dict[str, Any]] = {}
        for entry in library:
            if entry["library"] == directory:
                for file in entry["shards"] or [entry]:
                    own.setdefault(file["name"], file)
        found = [own.get(file["name"].rsplit("/", 1)[-1]) for file in files]
        if found and all(entry and _same(file, entry) for file, entry in zip(files, found)):
            return {"library": directory, "path": found[0]["path"]}
    return None


def _same(file: dict[str, Any], entry: dict[str, Any]) -> bool:
    both = file.get("sha256"), entry.get("sha256")
    return file["size"] == entry["size"] and (None in both or both[0] == both[1])
