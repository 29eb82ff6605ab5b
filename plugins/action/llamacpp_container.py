# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the module llamacpp_container in the background of the node and prints how far pulling and loading are."""

from __future__ import annotations

from ansible_collections.homelab.inference.plugins.plugin_utils.progress import ProgressActionModule


class ActionModule(ProgressActionModule):
    """The module does the work; this shows it."""

    MODULE = "homelab.inference.llamacpp_container"
