# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What people and programs see of a plan: the table, the page, the document, what moves."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from ansible_collections.homelab.inference.plugins.plugin_utils import report, report_page
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import report_plans

HOSTILE = '"><script>alert(1)</script>\x1b[31m\u202e&amp;'
GOLDEN = """\
SERVER           NODE   WHERE  PORT  QUANT   CONTEXT  SLOTS  KV     MiB
qwen3-coder-30b  forge  gpu0   8080  Q4_K_M    32768      2  f16  21660
nomic-embed      forge  gpu1   8081  F16        8192      1  f16    583
gpt-oss-120b     mac    gpu0   8080  MXFP4     32768      2  f16  63316
llama-3.3-70b    mac    gpu0   8081  Q4_K_M    32768      2  f16  51490
nomic-embed-2    nuc    cpu    8080  F16        8192      1  f16    679
  gpt-oss-120b: takes turns with llama-3.3-70b
  llama-3.3-70b: takes turns with gpt-oss-120b

MEMORY in MiB  █ weights  ▓ KV  ▒ compute  ░ other  / reserved  x foreign  · left

forge gpu0 (NVIDIA GeForce RTX 3090)
  [████████████████████████████████████████████████████████████████████▓▓▓▓▓▓▓▓▓▓▓▓▒▒░░//x·········]
  qwen3-coder-30b  21438  weights  17501  KV  3072  compute  405  other  460
  2318 of 24576 left, reserved 500, foreign 320
"""


def old(plan: dict[str, Any]) -> dict[str, Any]:
    """Return a plan as it was before planners told devices, parts, order and survival."""
    kept = {key: copy.deepcopy(plan[key]) for key in ("nodes", "models", "instances", "refused")}
    for instance in kept["instances"]:
        for key in ("parts", "fit", "quality", "start", "turns", "quant"):
            instance.pop(key, None)
    kept["refused"] = [{key: refusal[key] for key in ("model", "reason")} for refusal in kept["refused"]]
    return kept


def hostile() -> dict[str, Any]:
    """Return a plan in which every text of the owner and of strangers' files is an attack."""
    plan = report_plans.everything()
    for instance in plan["instances"]:
        instance["name"] += HOSTILE
        instance["quant"] = HOSTILE
        instance["turns"] = [HOSTILE]
        instance["server_options"][HOSTILE] = HOSTILE
    for node in plan["nodes"].values():
        for device in node["devices"]:
            device["name"] = HOSTILE
    for refusal in plan["refused"]:
        refusal.update(model=HOSTILE, reason=HOSTILE, change={"sentence": HOSTILE})
    plan["survival"] = [{"sentence": HOSTILE}]
    plan["order"] = {HOSTILE: [HOSTILE]}
    return plan


PLANS = [report_plans.everything(), old(report_plans.everything()), hostile()]


def test_the_table_is_as_reviewed() -> None:
    text = report.table(report_plans.everything(), width=100)
    assert text.startswith(GOLDEN)
    assert "NOT PLANNED llama-4-maverick: it needs 223104 MiB, and gpu0 of mac has 26796 MiB free\n" in text
    assert "  It would fit with this: set lab_models.llama-4-maverick.source.quant to IQ1_S.\n" in text
    assert "START ORDER\n  forge: qwen3-coder-30b, nomic-embed\n" in text
    assert "  mac: gpt-oss-120b (once qwen3-coder-30b stopped), llama-3.3-70b\n" in text
    assert "  Without forge: gpt-oss-120b and nomic-embed go on, qwen3-coder-30b is gone." in text
    assert "Upper bounds, not exact: qwen3-coder-30b (compute)" in text
    assert "AGAINST THE PLAN IN FORCE" not in text


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("width", [60, 79, 80, 100, 250])
def test_no_line_is_wider_than_the_terminal_or_a_hundred_columns(plan: dict[str, Any], width: int) -> None:
    lines = report.table(plan, plan, width).splitlines()
    if plan is PLANS[2]:
        # Names that are longer than a line are not broken.
        lines = [line for line in lines if "script" not in line]
    assert len(lines) > 10
    assert max(map(len, lines)) <= min(width, 100)


def test_a_narrow_terminal_loses_no_number() -> None:
    plan = report_plans.everything()
    for instance in plan["instances"]:
        instance["name"] = f"{instance['name']}-instruct-2507"
    text = report.table(plan, width=70)
    assert "qwen3-coder-30b-instruct-2507  forge  gpu0\n    Q4_K_M, 2 slots of 32768 tokens, KV f16, port 8080" in text
    assert " ".join(text.split()).count("weights 17501, KV 3072, compute 405, other 460") == 1


@pytest.mark.parametrize("plan", PLANS)
def test_the_numbers_of_every_device_add_up(plan: dict[str, Any]) -> None:
    found = report.areas(plan)
    assert [(area.node, area.where) for area in found][:2] == [("forge", "gpu0"), ("forge", "gpu1")]
    main = next(area for area in found if (area.node, area.where) == ("mac", "host"))
    for area in found:
        assert sum(size for _server, _kind, size in area.segments()) == area.size + area.over
        for server in area.servers:
            instance = next(one for one in plan["instances"] if one["name"] == server.name)
            own = instance["memory"].get(area.where, 0)
            assert server.total == own + (instance["memory"].get("gpu0", 0) if area == main else 0)


def test_servers_that_take_turns_share_their_memory() -> None:
    plan = report_plans.everything()
    (card,) = [area for area in report.areas(plan) if (area.node, area.where) == ("mac", "gpu0")]
    assert [(server.name, server.total, server.idle) for server in card.servers] == [
        ("gpt-oss-120b", 63316, False),
        ("llama-3.3-70b", 51490, True),
    ]
    assert (card.planned, card.left) == (63316, 26284)
    assert "  llama-3.3-70b (in turn)  51490  weights" in report.table(plan, width=100)


@given(st.integers(0, 10**6), st.dictionaries(st.text(), st.floats(0, 1e12), min_size=1, max_size=6))
def test_nothing_is_lost_to_rounding(total: int, shares: dict[str, float]) -> None:
    parts = report.spread(total, shares)
    if sum(shares.values()):
        assert sum(parts.values()) == total
        assert all(size >= 0 for size in parts.values())


@given(
    st.integers(1, 10**6),
    st.lists(st.tuples(*(st.integers(0, 10**5) for _kind in report.SERVER_KINDS)), max_size=8),
    st.integers(60, 100),
)
def test_a_bar_shows_everything_in_its_width(size: int, servers: list[tuple[int, ...]], width: int) -> None:
    taken = [report.Server(str(number), dict(zip(report.SERVER_KINDS, one))) for number, one in enumerate(servers)]
    left = size - sum(server.total for server in taken)
    area = report.Area("n", "gpu0", "card", size, 0, 0, taken, max(left, 0), max(-left, 0))
    gauge = report.gauge(area, width)
    assert len(gauge) == width
    cells = gauge[3:-1]
    # One sign for each kind that is there, in their order.
    assert re.sub(r"(.)\1+", r"\1", cells) == re.sub(
        r"(.)\1+", r"\1", "".join(report.SIGNS[kind] for _server, kind, _size in area.segments())
    )


def test_a_plan_without_parts_still_says_what_each_server_takes() -> None:
    text = report.table(old(report_plans.everything()), width=100)
    assert "  qwen3-coder-30b  21438\n  3138 of 24576 left" in text
    assert "  nomic-embed  583\n  15801 of 24576 left, reserved 8192" in text
    assert "WHAT SURVIVES" not in text and "START ORDER" not in text


def test_more_than_there_is_is_said() -> None:
    plan = old(report_plans.everything())
    plan["nodes"]["forge"]["devices"][0]["memory_mib"] = 20000
    assert "0 of 20000 left; 1438 MORE THAN THERE IS" in report.table(plan, width=100)
    assert "1438 more than there is" in report_page.page(plan)


def test_an_empty_plan_is_said_in_a_word() -> None:
    empty: dict[str, Any] = {"nodes": {}, "models": {}, "instances": [], "refused": []}
    assert report.table(empty) == "No server is planned."
    assert "No server is planned." in report_page.page(empty)


def test_what_moves_is_said_in_one_sentence_each() -> None:
    after = report_plans.everything()
    before = copy.deepcopy(after)
    before["refused"] = []
    first, second, gpt, llama, _nomic = before["instances"]
    first.update(node="mac", quant="Q6_K")
    second["server_options"]["ctx-size"] = 4096
    before["instances"] = [first, second, {**gpt, "name": "gpt-oss-20b", "model": "gpt-oss-20b"}, llama]
    assert [(move["kind"], move["sentence"]) for move in report.moves(before, after)] == [
        (
            "refused",
            "llama-4-maverick has no place: it needs 223104 MiB, and gpu0 of mac has 26796 MiB free",
        ),
        ("leaves", "gpt-oss-20b leaves mac gpu0"),
        ("moves", "qwen3-coder-30b moves from mac gpu0 to forge gpu0, with Q6_K -> Q4_K_M"),
        ("changes", "nomic-embed on forge gpu1 changes: ctx-size 4096 -> 8192"),
        ("starts", "gpt-oss-120b starts on mac gpu0, 63316 MiB"),
        ("starts", "nomic-embed-2 starts on nuc cpu, 679 MiB"),
    ]
    assert report.moves(after, after) == []
    assert report.table(after, after, 100).endswith("AGAINST THE PLAN IN FORCE\n  Nothing moves.")


def test_a_server_that_goes_to_another_node_moves_whatever_it_is_called_there() -> None:
    after = report_plans.everything()
    before = copy.deepcopy(after)
    before["instances"][0].update(name="qwen3-coder-30b-2", node="nuc", devices=[])
    (move,) = report.moves(before, after)
    assert move["sentence"] == "qwen3-coder-30b-2 moves from nuc cpu to forge gpu0 as qwen3-coder-30b"
    (move,) = report.moves({**after, "refused": after["refused"]}, {**after, "instances": after["instances"][1:]})
    assert move["sentence"] == "qwen3-coder-30b leaves forge gpu0"


def test_files_that_change_under_the_same_name_are_a_change() -> None:
    after = report_plans.everything()
    before = copy.deepcopy(after)
    before["models"]["qwen3-coder-30b"]["files"][0]["sha256"] = "b"
    (move,) = report.moves(before, after)
    assert move["sentence"] == "qwen3-coder-30b on forge gpu0 changes: other files of the model"


def test_the_document_is_json_and_holds_every_number() -> None:
    plan = report_plans.everything()
    told = json.loads(json.dumps(report.document(plan, plan)))
    assert told["moves"] == [] and told["value"] == 131.5
    assert told["servers"][2]["stop_first"] == ["qwen3-coder-30b"]
    assert [one["server"] for one in told["servers"]] == [one["name"] for one in plan["instances"]]
    for device in told["devices"]:
        parts = device["planned_mib"] + device["reserved_mib"] + device["others_mib"] + device["left_mib"]
        assert parts == device["size_mib"]
        for server in device["servers"]:
            assert server["total_mib"] == sum(server[f"{kind}_mib"] for kind in report.SERVER_KINDS)
    assert told["devices"][0]["servers"][0]["sources"]["compute"] == "bound"


@pytest.mark.parametrize("plan", PLANS)
def test_the_page_is_well_formed_and_loads_nothing(plan: dict[str, Any]) -> None:
    text = report_page.page(plan, old(plan))
    assert text == report_page.page(plan, old(plan))
    root = ElementTree.fromstring(text.split("\n", 1)[1])
    tags = [element.tag for element in root.iter()]
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "base", "form"} & set(tags)
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on") and name not in ("href", "src", "srcset", "action")
            assert "url(" not in value or re.fullmatch(r"url\(#on-\w+\)", value)
    style = root.findtext(".//style")
    assert "@import" not in style and "url(" not in style and "http" not in style
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("plan", PLANS)
def test_every_device_has_a_picture_with_title_and_description(plan: dict[str, Any]) -> None:
    root = ElementTree.fromstring(report_page.page(plan).split("\n", 1)[1])
    pictures = [element for element in root.iter("svg") if element.get("role") == "img"]
    found = report.areas(plan)
    assert len(pictures) == len(found)
    for picture, area in zip(pictures, found):
        title, description = picture.get("aria-labelledby").split()
        assert picture.find(f"title[@id='{title}']").text.startswith(report.clean(f"{area.node} {area.where}, "))
        told = picture.find(f"desc[@id='{description}']").text
        assert f"{area.left} left" in told and f"Of {area.size} MiB" in told
        # The picture is to scale: its segments fill it.
        widths = [float(group.find("rect").get("width").rstrip("%")) for group in picture.findall("g")]
        assert sum(widths) == pytest.approx(100, abs=0.01)


def test_nothing_of_a_stranger_reaches_page_or_terminal_unescaped() -> None:
    plan = hostile()
    page, text = report_page.page(plan, old(plan)), report.table(plan, old(plan))
    assert "<script" not in page and "&lt;script&gt;" in page
    for char in ("\x1b", "\u202e"):
        assert char not in page and char not in text


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_everything_can_be_told_apart_in_light_and_dark(mode: int) -> None:
    paper = report_page.PAPER[mode]
    assert contrast(report_page.TEXT[mode], paper) >= 7
    assert contrast(report_page.MUTED[mode], paper) >= 4.5
    for kind, pair in report_page.COLOURS.items():
        if kind != "left":
            assert contrast(pair[mode], paper) >= 3, kind
    signs = list(report.SIGNS.values())
    assert len(set(signs)) == len(signs)
    # Besides colour: each kind but the plain two is drawn over in its own way.
    assert set(report_page.PATTERNS) == set(report.SIGNS) - {"weights", "left"}
    assert len(set(report_page.PATTERNS.values())) == len(report_page.PATTERNS)
