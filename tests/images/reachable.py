# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ends with 0 when the address answers within five seconds as the service it is meant to be.

A registry answers 401 to a stranger, a hub 200. Anything else (a proxy's 403, a captive portal's redirect) is not the
service.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request


def main() -> int:
    """Ask once."""
    try:
        with urllib.request.urlopen(sys.argv[1], timeout=5) as answer:
            return 0 if answer.status == 200 and answer.url == sys.argv[1] else 1
    except urllib.error.HTTPError as error:
        return 0 if error.code == 401 else 1
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
