# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The page of a plan as a browser paints it, in the light and in the dark, on a large screen and on a small one."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.plugin_utils import report_page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "plugins" / "plugin_utils"))
import report_plans  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for found in map(shutil.which, BROWSERS) if found), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"there is no browser here ({', '.join(BROWSERS)})")
# Chromium's own numbers for the scheme that it reports to pages.
SCHEMES = {"light": 1, "dark": 0}


def browse(tmp_path: Path, page: Path, *words: str) -> str:
    result = subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            *words,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout


def pixels(path: Path) -> tuple[int, list[bytes]]:
    """Return the bytes of a pixel and the rows of a PNG."""
    data, at, packed = path.read_bytes(), 8, b""
    width = depth = 0
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, _height, bits, colour = struct.unpack(">IIBB", body[:10])
            assert bits == 8 and colour in (2, 6)
            depth = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            packed += body
        at += 12 + length
    raw = zlib.decompress(packed)
    rows: list[bytes] = []
    before = bytes(width * depth)
    for start in range(0, len(raw), width * depth + 1):
        method, line = raw[start], bytearray(raw[start + 1 : start + 1 + width * depth])
        for number in range(len(line)):
            left = line[number - depth] if number >= depth else 0
            above = before[number]
            corner = before[number - depth] if number >= depth else 0
            if method == 4:
                guess = left + above - corner
                near = min(
                    (abs(guess - left), 0, left), (abs(guess - above), 1, above), (abs(guess - corner), 2, corner)
                )
                line[number] = (line[number] + near[2]) & 255
            else:
                line[number] = (line[number] + (0, left, above, (left + above) // 2)[method]) & 255
        before = bytes(line)
        rows.append(before)
    return depth, rows


def colour(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("#"))


@pytest.mark.parametrize("width", [420, 1100])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_is_painted_in_the_colours_of_the_reader(tmp_path: Path, scheme: str, width: int) -> None:
    plan = report_plans.everything()
    page, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    page.write_text(report_page.page(plan, plan), encoding="utf-8")
    number = SCHEMES[scheme]
    browse(
        tmp_path,
        page,
        f"--blink-settings=preferredColorScheme={number}",
        f"--window-size={width},1700",
        f"--screenshot={picture}",
    )
    depth, rows = pixels(picture)
    mode = list(SCHEMES).index(scheme)
    assert rows[0][:3] == colour(report_page.PAPER[mode])
    counts: dict[bytes, int] = {}
    for row in rows:
        for at in range(0, len(row), depth):
            counts[row[at : at + 3]] = counts.get(row[at : at + 3], 0) + 1
    # Every kind of memory that the plan has is there to see.
    for kind, pair in report_page.COLOURS.items():
        assert counts.get(colour(pair[mode]), 0) > 50, kind


def test_the_browser_finds_nothing_to_mend_or_to_load(tmp_path: Path) -> None:
    plan = report_plans.everything()
    page = tmp_path / "plan.html"
    page.write_text(report_page.page(plan, plan), encoding="utf-8")
    dom = browse(tmp_path, page, "--dump-dom")
    assert dom.count("<svg") == page.read_text(encoding="utf-8").count("<svg")
    assert "<script" not in dom and "src=" not in dom
