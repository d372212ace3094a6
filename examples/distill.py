"""Trajectories on disk, then a student that maps noise to the sample in one evaluation."""

import tempfile
from pathlib import Path

import torch

import fewstep

denoiser = fewstep.load("fashion")
with tempfile.TemporaryDirectory() as folder:
    paths, student_folder = Path(folder) / "paths", Path(folder) / "student"
    # For real use: tens of thousands of trajectories, thousands of steps (docs/distilling.md).
    store = fewstep.record(
        denoiser, paths, n=32, nfe=5, keep=1, class_labels=[i % 10 for i in range(32)]
    )
    print(
        f"{len(store)} trajectories in {sum(f.stat().st_size for f in paths.rglob('*') if f.is_file()):,} bytes"
    )
    student = fewstep.distill(
        denoiser, store, student_folder, mode="endpoint", steps=4, batch_size=4
    )
    images = fewstep.sample(student, 4, class_labels=3)
    print(
        "one evaluation:",
        tuple(images.shape),
        f"range {float(images.min()):.2f} to {float(images.max()):.2f}",
    )

    again = fewstep.load(student_folder)
    print(
        "the same from the folder:", torch.equal(fewstep.sample(again, 4, class_labels=3), images)
    )
