"""Measures the embedded model anew and writes the profile that it ships with.

Usage: python scripts/embedded_profile.py [--out src/fewstep/embedded/fashion/profile.json]

It takes some 25 CPU seconds. Entries of budgets that were measured before come back to the same bits.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

import fewstep

MODEL, BUDGETS = "fashion", (3, 4, 5, 6, 8, 10, 15, 20)
FILE = Path(fewstep.__file__).parent / "embedded" / MODEL / "profile.json"


def main() -> None:
    """Writes the profile; its seconds are those of the CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    profile = fewstep.fit(fewstep.load(MODEL, device="cpu"), BUDGETS)
    about = {**profile.about, "seconds": round(time.process_time() - began, 1)}
    path = replace(profile, about=about).save(options.out)
    print(f"wrote {path}: {profile.recommended}")


if __name__ == "__main__":
    main()
