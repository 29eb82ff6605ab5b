# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From declaration, sources and plan to the lock."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.calibration import calibration, fingerprint
from ansible_collections.homelab.inference.plugins.module_utils.memory.compute import unknown
from ansible_collections.homelab.inference.plugins.plugin_utils import lock as lock_module
from ansible_collections.homelab.inference.plugins.plugin_utils import views

# Sources that module model_source_info resolves; files in libraries are found in the nodes' own indexes.
REMOTE_SOURCES = ("hf", "url", "file")
# The owner's words in C(args) for a draft model, a path in the model's own volume.
DRAFT_ARGS = ("spec-draft-model", "model-draft")


def sources(models: dict[str, dict[str, Any]], directory: str) -> list[dict[str, Any]]:
    """Return the sources to ask outside, in the shape of module model_source_info.

    :param directory: where relative paths of files start, the inventory's own directory.
    """
    found = []
    for name, model in models.items():
        source = dict(model["source"])
        if "file" in source:
            source["file"] = str(Path(directory) / Path(source["file"]).expanduser())
        if any(kind in source for kind in REMOTE_SOURCES):
            # One entry per quantisation: the plan chooses among all that the source has.
            quants = source.get("quant") or [None]
            found += [
                {"model": name, "source": {**source, "quant": [quant]} if quant else source}
                for quant in ([quants] if isinstance(quants, str) else quants)
            ]
    return found


def resolve(
    models: dict[str, dict[str, Any]],
    found: list[dict[str, Any]],
    libraries: dict[str, list[dict[str, Any]]],
    lock: dict[str, Any] | None,
    measured: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return per model its exact files and shape; a model whose files are nowhere has no entry.

    Where the owner allows several quantisations and the source has several of them, all stand in C(variants), in the
    owner's order; the first one also stands in the entry itself.

    :param found: the models of what module model_source_info returned.
    :param libraries: per host the index of its model files (module gguf_info).
    :param lock: the lock in force; it stands in for a source or a node that does not answer now.
    :param measured: what servers took at their last start (measured.py). Of an architecture whose computing the planner
        does not know that stands in for its upper bound.
    """
    resolved: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        variants = [_outside(entry) for entry in found if entry["model"] == name]
        if variants:
            resolved[name] = variants[0] if len(variants) == 1 else {**variants[0], "variants": variants}
        elif "library" in model["source"]:
            entry = _in_libraries(model["source"]["library"], libraries)
            if entry:
                resolved[name] = entry
        if (
            name not in resolved
            and lock
            and name in lock["models"]
            and lock["declared"]["models"].get(name, {}).get("source") == model["source"]
        ):
            resolved[name] = lock["models"][name]
        wanted = _draft(model)
        if wanted and name in resolved:
            entry = _in_libraries(wanted, libraries)
            draft = entry["shape"] if entry else resolved[name].get("draft")
            if draft:
                resolved[name] = _with_draft(resolved[name], draft)
            else:
                del resolved[name]
    for seen in (measured or {}).values():
        if isinstance(seen, dict) and seen.get("model") in resolved:
            resolved[seen["model"]] = _calibrated(resolved[seen["model"]], seen)
    return resolved


def _calibrated(entry: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    """Return files with what a server of their shape took to compute, where that can only be guessed otherwise."""
    devices = [{"id": name, "memory_mib": 1} for name in seen["devices"]]
    names = {name: f"gpu{number}" for number, name in enumerate(seen["devices"])}
    took = {names.get(place, place): sizes for place, sizes in seen["memory"].items()}
    options = seen["server_options"]
    variants = [
        {**one, "calibration": calibration(seen["image_id"], one["shape"], options, devices, [(options, took)])}
        if unknown(one["shape"]) and fingerprint(one["shape"]) == seen["shape"]
        else one
        for one in entry.get("variants", [entry])
    ]
    return {**variants[0], "variants": variants} if "variants" in entry else variants[0]


def _draft(model: dict[str, Any]) -> str | None:
    """Return the file name of the draft model that a model's C(args) ask for."""
    args = model.get("args", {})
    found = next((args[key] for key in DRAFT_ARGS if args.get(key)), None)
    return PurePosixPath(str(found)).name if found else None


def _with_draft(entry: dict[str, Any], draft: dict[str, Any]) -> dict[str, Any]:
    """Return files with the shape of the draft model beside them."""
    variants = {"variants": [{**one, "draft": draft} for one in entry["variants"]]} if "variants" in entry else {}
    return {**entry, "draft": draft, **variants}


def _outside(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what module model_source_info found of one quantisation, as the lock keeps it."""
    return {
        "commit": entry.get("commit"),
        "quant": entry.get("quant") or entry["shape"].get("quant"),
        "files": [*entry["files"], *([entry["mmproj"]] if entry.get("mmproj") else [])],
        "mmproj": entry["mmproj"]["name"] if entry.get("mmproj") else None,
        "shape": entry["shape"],
        **({"projector": entry["mmproj"]["shape"]} if entry.get("mmproj") else {}),
    }


def unresolved(
    models: dict[str, dict[str, Any]], problems: list[dict[str, str]], libraries: dict[str, list[dict[str, Any]]]
) -> dict[str, str]:
    """Return for each model that may have no files why: what its source said, or which libraries were searched."""
    reasons = {problem["model"]: problem["error"].rstrip(".") for problem in problems}
    for name, model in models.items():
        if "library" in model["source"]:
            looked = ", ".join(host for host in libraries) or "no host"
            reasons[name] = f"{model['source']['library']} lies in no node_library ({looked} answered)"
        if name not in reasons and _draft(model):
            reasons[name] = f"its draft model {_draft(model)} lies in no node_library, so what it takes is not known"
    return reasons


def _in_libraries(wanted: str, libraries: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """Return the first indexed file of that name or path, with the host where it lies."""
    for host, entries in libraries.items():
        for entry in entries:
            files = entry["shards"] or [entry]
            if any(wanted == file["name"] or PurePosixPath(file["path"]).match(wanted) for file in files):
                kept = [
                    {
                        "name": file["name"],
                        "size": file["size"],
                        "sha256": file["sha256"],
                        "host": host,
                        "path": f"{entry['library']}/{file['path']}",
                    }
                    for file in files
                ]
                return {
                    "commit": entry["commit"],
                    "quant": entry["shape"].get("quant"),
                    "files": kept,
                    "mmproj": None,
                    "shape": entry["shape"],
                }
    return None


def make_lock(
    lab: dict[str, Any], resolved: dict[str, dict[str, Any]], plan: dict[str, Any], digests: dict[str, str]
) -> dict[str, Any]:
    """Return the lock.

    :param lab: what action C(lab) returned.
    :param resolved: what C(resolve) returned.
    :param plan: what C(vram_plan) returned.
    :param digests: what registries told; the lock in force stands in for one that does not answer.
    """
    wanted = views.planned_images(lab["declaration"], lab["images"], plan["instances"])
    before = lab["lock"]["digests"] if lab["lock"] else {}
    names = {
        file["name"].rsplit("/", 1)[-1]
        for entry in resolved.values()
        for variant in entry.get("variants", [entry])
        for file in variant["files"]
    }
    nodes = {}
    for host, node in plan["nodes"].items():
        # Of a library only what the plan looked at: an index of hundreds of files would change the lock with every
        # download.
        library = [
            {key: entry[key] for key in ("library", "name", "path", "size", "sha256")}
            | {"shards": [{key: shard[key] for key in ("name", "path", "size", "sha256")} for shard in entry["shards"]]}
            for entry in node["library"]
            if entry["name"] in names
        ]
        nodes[host] = {**node, "library": library}
    return {
        "lock_version": lock_module.VERSION,
        "declared": lab["declared"],
        "images": lab["images"],
        "digests": {image: digests.get(image) or before.get(image) for image in wanted},
        "nodes": nodes,
        "models": resolved,
        "instances": plan["instances"],
        "refused": plan["refused"],
        **{key: plan[key] for key in ("order", "devices", "survival", "value", "inputs")},
    }
