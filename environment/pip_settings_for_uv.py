"""Print the indexes and certificates that pip is configured with as NAME=VALUE for uv, which does not read them.

    pip config list | python environment/pip_settings_for_uv.py

Variables that are already set are left out. uv's variables: https://docs.astral.sh/uv/reference/environment/
"""

from __future__ import annotations

import ast
import os
import re
import sys

NAMES = {  # of a setting of pip: uv's variable, and what separates several values there
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}
SECTIONS = ("global", "install", ":env:")  # the later ones win, as in pip


def main() -> None:
    settings, found = sys.stdin.read(), {}
    for section in SECTIONS:
        for key, value in re.findall(rf"(?m)^{section}\.([\w-]+)=(.*)$", settings):
            name, separator = NAMES.get(key, ("", ""))
            if name and name not in os.environ:
                found[name] = separator.join(ast.literal_eval(value).split())
    for name, value in found.items():
        print(f"{name}={value}")


if __name__ == "__main__":
    main()
