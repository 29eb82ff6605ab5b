#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: show
short_description: Print a text for people
version_added: 0.1.0
author: homelab.inference contributors (!UNKNOWN)
description:
  - Prints a text as it is, line by line, whatever output format Ansible is set to.
options:
  text:
    description: What is printed.
    type: str
    required: true
attributes:
  action:
    description: Runs on the controller.
    support: full
extends_documentation_fragment:
  - homelab.inference.attributes
  - homelab.inference.attributes.info
"""

EXAMPLES = r"""
- name: Say where the lab answers
  homelab.inference.show:
    text: The gateway answers at http://10.0.10.5:4000/v1
"""

RETURN = r""" # """
