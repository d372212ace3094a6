"""``python -m fewstep.cli``."""

from __future__ import annotations

from fewstep.cli import main

main()
