# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules of a lab, held by the real promtool against what HAProxy and node_exporter would show."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.plugin_utils import alerts

from tests.sample import long

pytestmark = long
ROOT = Path(__file__).resolve().parents[2]
IMAGE = "homelab-inference/prometheus:dev"
SERVERS = [
    {"name": "chat", "host": "forge", "ready_timeout": 900},
    {"name": "code", "host": "forge", "ready_timeout": 900},
    {"name": "chat-2", "host": "rig", "ready_timeout": 900},
]
# Every 5 s for half an hour.
ALWAYS = "x360"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    subprocess.run([ROOT / "tests/images/prometheus/build", IMAGE], check=True)
    made = tmp_path_factory.mktemp("alerts")
    groups = alerts.rule_groups(SERVERS, ["nuc", "forge", "rig"], ["rig"], "nuc")
    (made / "rules.yml").write_text(json.dumps({"groups": groups}))
    return made


def server(name: str, state: str, weight: int = 1, times: str = ALWAYS) -> list[dict[str, str]]:
    """Return the series of a server that is in one state all the time."""
    other = "L7OK" if state != "L7OK" else "L4CON"
    labels = f'{{proxy="m",server="{name}"'
    return [
        {"series": f'haproxy_server_check_status{labels},state="{state}"}}', "values": f"1+0{times}"},
        {"series": f'haproxy_server_check_status{labels},state="{other}"}}', "values": f"0+0{times}"},
        {"series": f"haproxy_server_weight{labels}}}", "values": f"{weight}+0{times}"},
    ]


def up(node: str, value: int = 1, job: str = "node") -> dict[str, str]:
    return {"series": f'up{{job="{job}",node="{node}"}}', "values": f"{value}+0{ALWAYS}"}


def engine(node: str, value: int = 1) -> dict[str, str]:
    return {"series": f'homelab_container_engine_up{{job="node",node="{node}"}}', "values": f"{value}+0{ALWAYS}"}


NODES = [up("nuc"), up("forge"), up("rig"), engine("nuc"), engine("forge"), engine("rig"), up("nuc", 1, "haproxy")]
GATEWAY = [
    {
        "series": f'haproxy_server_status{{proxy="gateway:",server="gateway:{which}",state="UP"}}',
        "values": f"{value}+0{ALWAYS}",
    }
    for which, value in (("current", 1), ("previous", 0))
]
WELL = [*server("chat", "L7OK"), *server("code", "L7OK"), *server("chat-2", "L7OK"), *NODES, *GATEWAY]


def but(*series: dict[str, str]) -> list[dict[str, str]]:
    """Return the series of a lab where all is well but these."""
    return list({one["series"]: one for one in [*WELL, *series]}.values())


def gateway(up_: int) -> dict[str, str]:
    return {**GATEWAY[0], "values": f"{up_}+0{ALWAYS}"}


@pytest.mark.parametrize(
    ("series", "after", "fires"),
    [
        pytest.param(WELL, "25m", {}, id="all is well"),
        pytest.param(but(*server("chat", "L4CON")), "30s", {"ModelServerDown": "forge"}, id="refuses"),
        pytest.param(but(*server("chat", "L4CON")), "5s", {}, id="refuses for a moment, while it is restarted"),
        pytest.param(but(*server("chat", "L7TOUT")), "30s", {"ModelServerDown": "forge"}, id="hangs"),
        pytest.param(but(*server("chat", "L7STS")), "10m", {}, id="loads for ten minutes"),
        pytest.param(but(*server("chat", "L7STS")), "16m", {"ModelServerLoading": "forge"}, id="loads for ever"),
        pytest.param(but(*server("chat", "L4CON", weight=0)), "25m", {}, id="drained"),
        pytest.param(but(up("forge", 0), *server("chat", "L4TOUT")), "30s", {"NodeDown": "forge"}, id="node off"),
        pytest.param(but(up("rig", 0), *server("chat-2", "L4TOUT")), "25m", {}, id="a guest is off"),
        pytest.param(but(engine("forge", 0)), "30s", {"ContainerEngineDown": "forge"}, id="engine"),
        pytest.param(but(gateway(0)), "30s", {"GatewayDown": "nuc"}, id="gateway"),
        pytest.param(but(up("nuc", 0, "haproxy")), "30s", {"BalancerDown": "nuc"}, id="what stands before the gateway"),
    ],
)
def test_what_calls_for_a_repair(folder: Path, series: list, after: str, fires: dict[str, str]) -> None:
    # promtool gives a rule file an expression for all alerts; ALERTS has them as series.
    expected = [{"labels": f'ALERTS{{alertname="{name}",node="{node}"}}', "value": 1} for name, node in fires.items()]
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "5s",
        "tests": [
            {
                "interval": "5s",
                "input_series": series,
                "promql_expr_test": [
                    {
                        "expr": 'max by (__name__, alertname, node) (ALERTS{alertstate="firing"})',
                        "eval_time": after,
                        "exp_samples": expected,
                    }
                ],
            }
        ],
    }
    (folder / "test.yml").write_text(json.dumps(test))
    run = ["docker", "run", "--rm", "--network=none", f"--volume={folder}:/t:ro", "--workdir=/t"]
    words = [*run, "--entrypoint=/bin/promtool", IMAGE, "test", "rules", "test.yml"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
