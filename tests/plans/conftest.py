# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--rewrite-plans", action="store_true", help="Write the reviewed plans anew")
