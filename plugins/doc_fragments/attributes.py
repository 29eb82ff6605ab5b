# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every module says of check mode, diff and idempotence."""

from __future__ import annotations


class ModuleDocFragment:
    """Documentation fragments C(homelab.inference.attributes) and C(homelab.inference.attributes.info)."""

    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and return the changed status without changing anything.
  diff_mode:
    description: Returns details on what has changed (or would change in C(check_mode)) when in diff mode.
  idempotent:
    description: A second run with the same arguments, outside of check mode, reports no change.
"""

    # Modules that only read, C(_info) and C(_facts).
    INFO = r"""
options: {}
attributes:
  check_mode:
    support: full
    details: The module changes nothing.
    description: Can run in C(check_mode) and return the changed status without changing anything.
  diff_mode:
    support: none
    details: The module changes nothing.
    description: Returns details on what has changed (or would change in C(check_mode)) when in diff mode.
  idempotent:
    support: full
    details: The module changes nothing.
    description: A second run with the same arguments, outside of check mode, reports no change.
"""
