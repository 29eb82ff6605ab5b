# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""All that a server takes, part by part, before a byte of its weights is there."""

from __future__ import annotations

from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory import cache as caches
from ansible_collections.homelab.inference.plugins.module_utils.memory import compute as computing
from ansible_collections.homelab.inference.plugins.module_utils.memory.cache import cache
from ansible_collections.homelab.inference.plugins.module_utils.memory.compute import compute
from ansible_collections.homelab.inference.plugins.module_utils.memory.host import (
    host,
    vocabulary,
    with_device_process,
    with_page_tables,
    with_read_ahead,
    with_uploads,
)
from ansible_collections.homelab.inference.plugins.module_utils.memory.layers import HOST
from ansible_collections.homelab.inference.plugins.module_utils.memory.options import MIB
from ansible_collections.homelab.inference.plugins.module_utils.memory.weights import repacked, weights

# A draft model has options of its own; what it has none for, it takes from the model that it drafts for.
DRAFT_OPTIONS = {
    "n-gpu-layers": ("spec-draft-ngl", "n-gpu-layers-draft", "gpu-layers-draft"),
    "cache-type-k": ("spec-draft-type-k", "cache-type-k-draft"),
    "cache-type-v": ("spec-draft-type-v", "cache-type-v-draft"),
    "cpu-moe": ("spec-draft-cpu-moe", "cpu-moe-draft"),
    "n-cpu-moe": ("spec-draft-n-cpu-moe", "spec-draft-ncmoe", "n-cpu-moe-draft"),
}
# The most patches that a projector computes together. Where a file says how many make a token, pictures have any size
# up to so many tokens. Where it says that pictures are small, it is one of those that cut up larger ones (Gemma 4: 1120
# tokens of nine patches) or take several at a time (up to 1024 tokens of four patches).
PICTURE_TOKENS = 4096
MOST_PATCHES = 1120 * 9
TOGETHER = 1024 * 4


def predict(
    shape: dict[str, Any],
    options: dict[str, Any],
    devices: list[dict[str, Any]],
    backend: str,
    calibration: dict[str, Any] | None = None,
    overheads: dict[str, int] | None = None,
    projector: dict[str, Any] | None = None,
    draft: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return the parts of one server: C({where, kind, bytes, source}), where a device's id or C(host).

    :param devices: those of C(--device), in its order; none for a server on the processor alone.
    :param calibration: what the engine's own dry pass said of this shape (module gguf_info).
    :param overheads: MiB learned per device id or backend, see P(host).
    :param projector: shape of the file with the multimodal projector.
    :param draft: shape of the draft model's file.
    """
    found = weights(shape, options, devices) + cache(shape, options, devices)
    found += compute(shape, options, devices, backend, calibration)
    found += host(shape, options, devices, backend, overheads)
    if projector:
        found += _projector(projector, options, devices)
    if draft:
        found += _draft(draft, options, devices, backend)
    found = with_device_process(with_uploads(found, shape, backend), shape, options, devices, backend)
    return with_read_ahead(with_page_tables(found))


def totals(parts: list[dict[str, Any]]) -> dict[str, int]:
    """Return the MiB, rounded up, that the parts take of each place."""
    sums: dict[str, int] = {}
    for part in parts:
        sums[part["where"]] = sums.get(part["where"], 0) + part["bytes"]
    return {where: -(-size // MIB) for where, size in sums.items()}


def unknown(shape: dict[str, Any]) -> list[str]:
    """Return why a prediction for this model is an upper bound in some part, as sentences; nothing when it is not."""
    return list(dict.fromkeys([*caches.unknown(shape), *computing.unknown(shape)]))


def draft_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a draft model's context is made with: those of its model, with its own on top."""
    result = {name: value for name, value in options.items() if name not in DRAFT_OPTIONS}
    for name, spellings in DRAFT_OPTIONS.items():
        for spelling in spellings:
            if spelling in options:
                result[name] = options[spelling]
    if options.get("spec-draft-n-ubatch"):
        result["ubatch-size"] = options["spec-draft-n-ubatch"]
    for name in ("embedding", "embeddings", "reranking", "rerank"):
        result.pop(name, None)
    return result


def _draft(
    shape: dict[str, Any], options: dict[str, Any], devices: list[dict[str, Any]], backend: str
) -> list[dict[str, Any]]:
    own = draft_options(options)
    found = weights(shape, own, devices) + cache(shape, own, devices) + compute(shape, own, devices, backend, None)
    found.append({"where": HOST, "kind": "repack", "bytes": repacked(shape, own, devices), "source": "computed"})
    found.append({"where": HOST, "kind": "base", "bytes": vocabulary(shape), "source": "bound"})
    return _merged(found, "draft")


def _projector(shape: dict[str, Any], options: dict[str, Any], devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    offload = devices and options.get("mmproj-offload", True) and not options.get("no-mmproj-offload")
    computed, given = picture_bytes(shape, options)
    return _merged(
        [
            {
                "where": devices[0]["id"] if offload else HOST,
                "kind": "projector",
                "bytes": shape["weights_bytes"] + computed,
                "source": "bound",
            },
            {"where": HOST, "kind": "projector", "bytes": given, "source": "bound"},
        ],
        "projector",
    )


def picture_bytes(shape: dict[str, Any], options: dict[str, Any]) -> tuple[int, int]:
    """Return the buffer in which a projector computes its largest picture, and the one on the host that holds it.

    For each patch it holds three rows of its width and one of its feed-forward width at a time, and the host its pixels
    in three colours (measured with gemma3's encoders for 448 and 896 pixels: exact to 0.01 MiB). Where patches are
    merged the feed-forward network is gated and takes more, and the host holds two frames twice (measured with
    Qwen2.5-VL's: 569.7 and 155.8 MiB, counted as 582 and 160). Pictures of any size are cut into patches up to a limit.
    """
    given = shape["hparams"]

    def number(name: str, default: int) -> int:
        value = given.get(f"vision.{name}")
        return value if isinstance(value, int) and value > 0 else default

    patches = (number("image_size", 896) // number("patch_size", 14)) ** 2
    merged = number("spatial_merge_size", 0) ** 2
    if merged:
        patches = int(options.get("image-max-tokens") or PICTURE_TOKENS) * merged
    else:
        patches = max(patches, TOGETHER if patches >= TOGETHER // 4 else MOST_PATCHES)
    width = number("embedding_length", 1280)
    forward = number("feed_forward_length", 4 * width)
    size = 4 * patches * (3 * width + (forward * 8 // 5 if merged else forward))
    given_size = 4 * patches * (2 * width if merged else 3 * number("patch_size", 14) ** 2)
    if options.get("flash-attn") in ("off", False):
        size += 4 * patches * patches * number("attention.head_count", 16)
    return size, given_size


def _merged(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return one part for each place, as sure as the least sure of them."""
    order = ("measured", "calibrated", "computed", "bound")
    result: dict[str, dict[str, Any]] = {}
    for part in found:
        into = result.setdefault(part["where"], {"where": part["where"], "kind": kind, "bytes": 0, "source": order[0]})
        into["bytes"] += part["bytes"]
        into["source"] = max(into["source"], part["source"], key=order.index)
    return [part for part in result.values() if part["bytes"]]
