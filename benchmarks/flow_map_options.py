"""What each option of the trainer of flow maps gives, one by one at equal images.

Usage:
    python benchmarks/flow_map_options.py --initial STUDENT --store PATHS [--steps 200] [-n 1000] --out RUNS
        [--json FILE]

Short runs from one flow map of ``fashion`` (``--initial``), on its trajectories, with the same images in the same order: the plain
objective, and with one option more. FID to the training images in both embedded extractors, and recall, at each
budget and equal noise. The runs are resumed by the same command.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import fewstep
from _common import about, print_table
from fewstep import metrics
from fewstep.base.files import read_json, write_json
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.metrics.features import EMBEDDED
from fewstep.operators import FlowMap, OperatorModel
from fewstep.operators.distillation import distill

OPTIONS: dict[str, dict[str, Any]] = {
    "plain objective": {},
    "loss l1 instead of features": {"loss": "l1", "features": None},
    "own states": {"own_states": 0.5},
    "consistency across splits": {"consistency": 0.5},
    "corrector denoised": {"corrector": "denoised", "corrector_weight": 1.0},
    "corrector score-difference": {"corrector": "score-difference"},
}
"""The options, each with its settings."""


def main() -> None:
    """Trains, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--initial", type=Path, required=True, help="the flow map to begin with")
    parser.add_argument("--store", type=Path, required=True, help="its trajectories")
    parser.add_argument("--steps", type=int, default=200, help="the steps of each run")
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args()
    model = fewstep.load("fashion")
    store = fewstep.TrajectoryStore.open(options.store)
    references = [metrics.Reference.load("fashion", look) for look in EMBEDDED]
    n, labels = options.n, torch.arange(options.n) % 10
    assert model.event_shape is not None
    noise = NoiseSource(options.seed, range(n)).draw(INITIAL, model.event_shape)

    def scored(student: OperatorModel) -> dict[str, Any]:
        operator, scores = student.operator, {}
        assert isinstance(operator, FlowMap)
        for nfe in operator.layout.budgets:
            how: dict[str, Any] = {"nfe": nfe, "class_labels": labels, "batch_size": 100}
            x = fewstep.sample(student, noise=noise, **how)
            fids = {
                look: metrics.fid(x, at) for look, at in zip(EMBEDDED, references, strict=True)
            }
            recall = metrics.precision_recall(x, references[0]).recall
            scores[str(nfe)] = {
                "fid": {look: [f.value, f.low, f.high] for look, f in fids.items()},
                "recall": [recall.value, recall.low, recall.high],
            }
        return scores

    results: dict[str, Any] = {}
    for name, change in {"the start": None, **OPTIONS}.items():
        file = options.out / f"{name.replace(' ', '-')}.json"
        if not file.exists():
            seconds, student = 0.0, fewstep.load(options.initial)
            if change is not None:
                settings = {
                    "mode": "flow-map", "loss": "features", "features": "fashion-robust",
                    "initial": str(options.initial), "steps": options.steps, "batch_size": 32,
                    "learning_rate": 3e-4, "warmup": 20, "decay": 0.5, "ema": 0.98,
                    "precision": "bfloat16", "heldout": 128, "seed": 2, **change,
                }  # fmt: skip
                begun = time.process_time()
                student = distill(model, store, options.out / file.stem, **settings)
                seconds = time.process_time() - begun
            assert isinstance(student, OperatorModel)
            write_json(file, {"seconds": seconds, "budgets": scored(student)})
        results[name] = read_json(file)
    rows = [
        [name, f"{row['seconds']:.0f}", *(
            f"{cell['fid']['fashion'][0]:.2f} / {cell['fid']['fashion-robust'][0]:.2f} / {cell['recall'][0]:.3f}"
            for cell in row["budgets"].values()
        )]
        for name, row in results.items()
    ]  # fmt: skip
    budgets = [f"{nfe}: FID / robust / recall" for nfe in results["the start"]["budgets"]]
    print_table(("option", "CPU seconds", *budgets), rows)
    if options.json:
        origin = about(n=n, seed=options.seed, steps=options.steps, teacher=model.fingerprint())
        write_json(options.json, {"about": origin, "cells": results})


if __name__ == "__main__":
    main()
