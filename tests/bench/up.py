# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long ./lab up takes where the images are there, beside how fast this machine is.

    python3 tests/bench/up.py [PAUSE]

Takes the box away, waits PAUSE seconds (360 by default: a file system that has just deleted a hundred thousand files
makes new ones slowly for some minutes), makes it again and asks it a question.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

LAB = Path(__file__).resolve().parents[2] / "lab"
TARGET_S = 90
LOOPS = 20_000_000


def speed() -> float:
    """Return the seconds that a loop of plain Python takes here."""
    started, total = time.perf_counter(), 0
    for number in range(LOOPS):
        total += number * number
    return time.perf_counter() - started


def lab(*words: str) -> float:
    """Return the seconds that a command took."""
    started = time.perf_counter()
    subprocess.run([LAB, "--yes", *words], check=True, capture_output=True, timeout=1800)
    return time.perf_counter() - started


def main() -> int:
    """Measure and print."""
    pause = int(sys.argv[1]) if len(sys.argv) > 1 else 360
    lab("down")
    time.sleep(pause)
    before = speed()
    took = lab("up")
    after = speed()
    print(f"./lab up with the images there: {took:.0f} s (budget {TARGET_S} s)")
    print(f"this machine: {before:.2f} s before and {after:.2f} s after for {LOOPS} steps of a Python loop")
    print(f"a question: {lab('ask', 'How are you?'):.1f} s")
    return 0 if took <= TARGET_S else 1


if __name__ == "__main__":
    sys.exit(main())
