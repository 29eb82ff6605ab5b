# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The GPU of an Apple chip: one memory for all, and how much of it macOS lets Metal use."""

from __future__ import annotations

from ansible_collections.homelab.inference.plugins.module_utils.gpu.device import MIB, NOTHING, Found, device
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host

CHIP, MEMORY, LIMIT = "machdep.cpu.brand_string", "hw.memsize", "iogpu.wired_limit_mb"


def collect(host: Host) -> Found:
    """The one device of a Mac with an Apple chip."""
    if host.system != "Darwin":
        return NOTHING
    values = parse_sysctl(host.run(["/usr/sbin/sysctl", CHIP, MEMORY, LIMIT]).output)
    name = values.get(CHIP, "")
    if not name.startswith("Apple ") or not values.get(MEMORY, "").isdigit():
        return NOTHING
    memory = int(values[MEMORY]) // MIB
    limit = values.get(LIMIT, "")
    cap = int(limit) if limit.isdigit() and int(limit) else default_cap(memory)
    return Found([device("apple", name, memory, unified=True, cap_mib=cap)], [], {})


def parse_sysctl(text: str) -> dict[str, str]:
    """Read sysctl's NAME: VALUE lines; a name that this macOS does not know is a line of another form."""
    pairs = (line.partition(": ") for line in text.splitlines())
    return {name: value.strip() for name, separator, value in pairs if separator}


def default_cap(memory_mib: int) -> int:
    """Metal's recommendedMaxWorkingSetSize where nobody set a limit.

    Seen: 21845 MB of 32 GB (ollama/ollama#434), 48 of 64 GiB (ggml-org/llama.cpp#1870). Newer systems give more
    (11.84 of 16 GB, AlexsJones/llmfit#754; 77.76 of 96 GiB, joshuahickscorp/hawking; 107.5 of 128 GiB), so this is
    what may be relied on, not the most there is.
    """
    return memory_mib * 2 // 3 if memory_mib <= 36 * 1024 else memory_mib * 3 // 4
