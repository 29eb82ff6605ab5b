# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which models lie in a directory, whoever put them there: plain files, split sets, Hugging Face's cache, LM Studio."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils import gguf

DIGEST = re.compile(r"^[0-9a-f]{64}$")
PIECE = 4 << 20


class Index:
    """Collects the models of libraries and single files, and a sentence for each thing that is none."""

    def __init__(self, digest: bool) -> None:
        self.files: list[dict[str, Any]] = []
        self.problems: list[dict[str, str]] = []
        self._digest = digest

    def add_library(self, library: str) -> None:
        """Index a directory with all that lies below it, hidden directories excepted."""
        root = Path(library)
        found, seen, pending = [], set(), [root]
        while pending:
            folder = pending.pop()
            try:
                status = folder.stat()
                # A directory linked to from several places, or from within itself, counts once.
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        if entry.name.lower().endswith(".gguf") and not entry.is_dir():
                            found.append(folder / entry.name)
                        elif entry.is_dir() and not entry.name.startswith("."):
                            pending.append(folder / entry.name)
            except OSError as error:
                self._problem(folder, f"{error.strerror or error}. Check the path and who may read it", "Cannot index")
        self._add(sorted(found), root)

    def add_files(self, paths: list[str]) -> None:
        """Add single files, of a split set any of its shards."""
        self._add([Path(path) for path in paths], None)

    def _add(self, paths: list[Path], root: Path | None) -> None:
        done: set[Path] = set()
        for path in paths:
            if path in done:
                continue
            try:
                str(path).encode()
                # Marked before they are looked for, so that an incomplete set is one problem.
                done.update(path.with_name(name) for name in gguf.shard_names(path.name))
                self.files.append(self._entry(gguf.shard_paths(path), root))
            except gguf.GGUFError as error:
                self._problem(path, str(error))
            except OSError as error:
                self._problem(path, f"{error.strerror or error}. Check the path and who may read it")
            except UnicodeEncodeError:
                self._problem(path, "its name is not UTF-8. Rename it")

    def _problem(self, path: Path, cause: str, failed: str = "Cannot use") -> None:
        name = str(path).encode(errors="backslashreplace").decode()
        self.problems.append({"path": name, "error": f"{failed} {name}: {cause}."})

    def _entry(self, paths: list[Path], root: Path | None) -> dict[str, Any]:
        shape = gguf.shape([gguf.read_file(path) for path in paths])
        shards = [self._file(path, root) for path in paths]
        repo, commit = _origin(paths[0])
        return {
            **shards[0],
            "library": None if root is None else str(root),
            "size": sum(shard["size"] for shard in shards),
            "mtime": max(shard["mtime"] for shard in shards),
            "sha256": None if len(shards) > 1 else shards[0]["sha256"],
            "shards": shards if len(shards) > 1 else [],
            "mmproj": gguf.is_projector(paths[0].name, shape),
            "repo": repo,
            "commit": commit,
            "shape": shape,
        }

    def _file(self, path: Path, root: Path | None) -> dict[str, Any]:
        status = path.stat()
        digest = _blob_digest(path)
        if digest is None and self._digest:
            digest = file_digest(path)
        return {
            "name": path.name,
            "path": str(path if root is None else path.relative_to(root)),
            "size": status.st_size,
            "mtime": int(status.st_mtime),
            "sha256": digest,
        }


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _blob_digest(path: Path) -> str | None:
    """Hugging Face's cache names a large file's blob after its SHA-256, and a small one's after its git id."""
    if not path.is_symlink():
        return None
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and DIGEST.match(blob.name) else None


def _origin(path: Path) -> tuple[str | None, str | None]:
    """The repository, and its commit, where the path tells them."""
    parts = path.absolute().parts
    for number, part in enumerate(parts[:-3]):
        if part.startswith("models--") and parts[number + 1] == "snapshots":
            return part[len("models--") :].replace("--", "/", 1), parts[number + 2]
    # LM Studio keeps publisher/repository/file below its models directory.
    for number, part in enumerate(parts[:-4]):
        if part in (".lmstudio", "lm-studio") and parts[number + 1] == "models":
            return f"{parts[number + 2]}/{parts[number + 3]}", None
    return None, None
