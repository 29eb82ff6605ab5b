# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one shape in which every vendor's devices, problems and drivers come out."""

from __future__ import annotations

from typing import Any, NamedTuple

MIB = 1024 * 1024


class Found(NamedTuple):
    """What one vendor's file found."""

    devices: list[dict[str, Any]]
    problems: list[dict[str, str]]
    drivers: dict[str, dict[str, Any]]


NOTHING = Found([], [], {})


def device(
    vendor: str,
    name: str,
    memory_mib: int,
    *,
    uuid: str | None = None,
    pci: str | None = None,
    unified: bool = False,
    cap_mib: int | None = None,
    **optional: Any,
) -> dict[str, Any]:
    """One device; optional keys without a value are left out."""
    required = {
        "vendor": vendor,
        "name": name,
        "uuid": uuid,
        "pci": pci,
        "memory_mib": memory_mib,
        "memory_kind": "unified" if unified else "dedicated",
        "cap_mib": cap_mib,
    }
    return {**required, **{key: value for key, value in optional.items() if value not in (None, [])}}


def problem(vendor: str, state: str, evidence: str, remedy: str) -> dict[str, str]:
    """One thing that keeps a device from being used."""
    return {"vendor": vendor, "state": state, "evidence": evidence, "remedy": remedy}
