# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lets pytest import the checkout as ansible_collections.homelab.inference, wherever it was cloned to."""

from __future__ import annotations

from pathlib import Path

from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder

ROOT = Path(__file__).resolve().parent
COLLECTIONS = ROOT / ".cache"
LINK = COLLECTIONS / "ansible_collections" / "homelab" / "inference"


def pytest_configure() -> None:
    """Make the link that ansible also uses, and put it in front of installed collections."""
    LINK.parent.mkdir(parents=True, exist_ok=True)
    if not LINK.exists():
        LINK.symlink_to(ROOT)
    _AnsibleCollectionFinder(paths=[str(COLLECTIONS)])._install()
