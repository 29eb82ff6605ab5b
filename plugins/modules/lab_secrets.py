#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_secrets
short_description: Generate the secrets of a lab once
version_added: 0.1.0
author: homelab.inference contributors (!UNKNOWN)
description:
  - Generates each named secret that the file does not hold yet, writes them to the file on the controller and returns
    all that it holds. What the file holds is never changed.
  - The file is encrypted with ansible-vault where a vault password is configured. Else it has mode C(0600), and a
    C(.gitignore) beside it keeps it out of git.
  - Use C(no_log) on the task.
options:
  path:
    description: File on the controller.
    type: path
    required: true
  names:
    description: Names of the secrets that have to be there.
    type: list
    elements: str
    required: true
attributes:
  check_mode:
    support: full
    details: In check mode the secrets are made for this run's memory alone.
  diff_mode:
    support: none
    details: Secrets are never shown.
  idempotent:
    support: full
  action:
    description: Runs on the controller.
    support: full
extends_documentation_fragment:
  - homelab.inference.attributes
"""

EXAMPLES = r"""
- name: Make the secrets that are missing
  homelab.inference.lab_secrets:
    path: inventories/mine/group_vars/all/secrets.yml
    names: [lab_secret_litellm_master_key]
  no_log: true
"""

RETURN = r"""
names:
  description: Names of the secrets that were made.
  type: list
  elements: str
  returned: always
path:
  description: The file.
  type: str
  returned: always
secrets:
  description: All secrets of the file by name.
  type: dict
  returned: always
"""
