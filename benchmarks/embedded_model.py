"""Is the embedded model good? The share of class-conditional samples that a classifier recognises.

Usage: python benchmarks/embedded_model.py [-n 1000] [--nfe 200] [--solver dpmpp-2m] [--seed 2000]

The classifier is the feature extractor ``fashion``, trained on the training images alone
(scripts/train_classifier.py); its accuracy on real test images is printed beside.
"""

from __future__ import annotations

import argparse
import datetime

import torch

import fewstep
from fewstep.base.files import read_json
from fewstep.metrics import Features
from fewstep.metrics.features import HERE


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--nfe", type=int, default=200)
    parser.add_argument("--solver", default="dpmpp-2m")
    parser.add_argument("--seed", type=int, default=2000)
    options = parser.parse_args()

    denoiser, features = fewstep.load("fashion"), Features.load("fashion")
    labels = torch.arange(options.n) % 10
    samples = fewstep.sample(
        denoiser,
        options.n,
        solver=options.solver,
        nfe=options.nfe,
        seed=options.seed,
        class_labels=labels,
        progress=True,
    )
    right = features.classify(samples) == labels
    share = float(right.double().mean())
    width = 1.96 * (share * (1 - share) / options.n) ** 0.5
    each = [round(float(right[labels == k].double().mean()), 2) for k in range(10)]
    accuracy = read_json(HERE / "fashion" / "features.json")["training"]["test_accuracy"]
    parameters = sum(p.numel() for p in denoiser.parameters())
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, {options.n} samples, {options.solver}, "
        f"{options.nfe} calls, seed {options.seed}\n"
        f"parameters {parameters:,}; classifier on real test images {accuracy:.4f}\n"
        f"asked class found in {share:.3f} +- {width:.3f} of the samples; by class {each}"
    )


if __name__ == "__main__":
    main()
