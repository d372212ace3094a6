"""Packages that only some parts need: how to install them."""

from __future__ import annotations

import re
from importlib import metadata


def install_hint(extra: str) -> str:
    """Returns the command that installs the packages of an extra.

    It names the packages themselves, as the installed distribution declares them, so that it works however fewstep
    came here: from a checkout, a wheel or an index.

    Arguments:
        extra: The name of the extra.
    """
    try:
        declared = metadata.requires("fewstep") or []
    except metadata.PackageNotFoundError:
        declared = []
    pattern = re.compile(rf"([^;]+?)\s*;\s*extra == ['\"]{re.escape(extra)}['\"]")
    packages = sorted(found[1] for text in declared if (found := pattern.fullmatch(text)))
    if not packages:  # the sources alone are on the path, or an older installation is
        return f"pip install '.[{extra}]' in a checkout of fewstep"
    return "pip install " + " ".join(f"'{package}'" for package in packages)
