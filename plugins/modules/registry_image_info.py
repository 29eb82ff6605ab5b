#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Thin door to registry.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: registry_image_info
short_description: Ask registries for the digests of images
version_added: 0.1.0
author: homelab.inference contributors (!UNKNOWN)
description:
  - Asks the registry of each image for the digest behind its tag. Nothing is pulled, and no Docker engine is needed.
  - A registry that does not answer makes no failure; its images are named in RV(problems).
options:
  images:
    description: Image references.
    type: list
    elements: str
    required: true
  plain_http:
    description: Registries, as C(HOST) or C(HOST:PORT), that speak plain HTTP.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds that one request may take.
    type: float
    default: 10
extends_documentation_fragment:
  - homelab.inference.attributes
  - homelab.inference.attributes.info
"""

EXAMPLES = r"""
- name: Pin an image
  homelab.inference.registry_image_info:
    images: [ghcr.io/ggml-org/llama.cpp:server-b9014]
  register: images
"""

RETURN = r"""
digests:
  description: The digest of each image that a registry answered for.
  type: dict
  returned: success
  sample: {"ghcr.io/x/y:1": "sha256:6ae8a75555209fd6c44157c0aed8016e763ff435a19cf186f76863140143ff72"}
problems:
  description: A sentence for each image without a digest.
  type: list
  elements: str
  returned: success
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.homelab.inference.plugins.module_utils.registry import RegistryError, digest


def main() -> None:
    """Ask for each image once."""
    module = AnsibleModule(
        argument_spec={
            "images": {"type": "list", "elements": "str", "required": True},
            "plain_http": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "float", "default": 10},
        },
        supports_check_mode=True,
    )
    digests, problems = {}, []
    for image in sorted(set(module.params["images"])):
        try:
            digests[image] = digest(image, module.params["plain_http"], module.params["timeout"])
        except RegistryError as error:
            problems.append(str(error))
    module.exit_json(changed=False, digests=digests, problems=problems)


if __name__ == "__main__":
    main()
