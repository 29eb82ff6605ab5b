# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is measured for the lab's health, and when it calls for a repair: scrape configuration and rules of Prometheus.

Each alert has the label C(node), by which the alert door knows whom it is about. That a server loads, or works on a
long prompt, is none: HAProxy asks /health, which answers both at once. A server that gets no requests, because it is
being changed or its node is in maintenance, has weight 0 there and is none either.
"""

from __future__ import annotations

from typing import Any

# Of the results of HAProxy's health checks (its documentation on show stat, check_status) those of who does not answer.
# Not L7STS, which a server that loads its model has.
SILENT = "SOCKERR|L4TOUT|L4CON|L7TOUT|L7RSP"
LOADING = "L7STS"
NODE_EXPORTER_PORT = 9100


def scrape_configs(nodes: dict[str, str], balancer: str | None, gateway_host: str | None) -> list[dict[str, Any]]:
    """Return what Prometheus scrapes, as role prometheus takes it.

    :param nodes: the address of each node with a node_exporter.
    :param balancer: C(HOST:PORT) of HAProxy's metrics; None where there is none.
    :param gateway_host: the node that it runs on.
    """
    found = [
        {
            "job": "node",
            "targets": [
                {"address": f"{address}:{NODE_EXPORTER_PORT}", "labels": {"node": host}}
                for host, address in nodes.items()
            ],
        }
    ]
    if balancer:
        found.append({"job": "haproxy", "targets": [{"address": balancer, "labels": {"node": gateway_host}}]})
    return found


def rule_groups(
    servers: list[dict[str, Any]], nodes: list[str], guests: list[str], gateway_host: str | None
) -> list[dict[str, Any]]:
    """Return the rules, a group for each node, as Prometheus has them below C(groups).

    :param servers: C({name, host, ready_timeout}) of each model server, the last in seconds.
    :param nodes: the nodes that are watched.
    :param guests: those of them that may be off; only while they answer do their servers matter.
    :param gateway_host: the node with the gateway.
    """
    found = []
    for host in nodes:
        mine = [one for one in servers if one["host"] == host]
        rules = [
            _rule(
                "ContainerEngineDown",
                f'homelab_container_engine_up{{node="{host}"}} == 0',
                10,
                host,
                "its container engine does not answer",
            ),
        ]
        if host not in guests:
            rules.insert(0, _rule("NodeDown", f'up{{job="node",node="{host}"}} == 0', 15, host, "it does not answer"))
        if mine:
            names = "|".join(one["name"].replace(".", "[.]") for one in mine)
            rules += [
                _rule(
                    "ModelServerDown", _server(host, names, SILENT), 10, host, "{{ $labels.server }} does not answer"
                ),
                _rule(
                    "ModelServerLoading",
                    _server(host, names, LOADING),
                    max(one["ready_timeout"] for one in mine),
                    host,
                    "{{ $labels.server }} does not come to an end of loading its model",
                ),
            ]
        if host == gateway_host:
            rules += [
                _rule(
                    "GatewayDown",
                    'max(haproxy_server_status{proxy="gateway:",state="UP"}) == 0',
                    15,
                    host,
                    "the gateway does not answer",
                ),
                _rule(
                    "BalancerDown", 'up{job="haproxy"} == 0', 10, host, "what stands before the gateway does not answer"
                ),
            ]
        found.append({"name": host, "rules": rules})
    return found


def _server(host: str, names: str, state: str) -> str:
    """Return an expression, true for each server in a state that gets requests and whose node answers."""
    return (
        f'(max by (server) (haproxy_server_check_status{{server=~"{names}",state=~"{state}"}}) == 1)'
        f' and on (server) (max by (server) (haproxy_server_weight{{server=~"{names}"}}) > 0)'
        f' and on () (up{{job="node",node="{host}"}} == 1)'
    )


def _rule(name: str, expression: str, seconds: int, host: str, what: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expression,
        "for": f"{seconds}s",
        "labels": {"node": host},
        "annotations": {"summary": f"{host}: {what}"},
    }
