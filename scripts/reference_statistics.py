"""Makes the reference statistics that ship for ``fashion``, and says what they are.

Usage: python scripts/reference_statistics.py DATA OUT [--features fashion-robust]
       python scripts/reference_statistics.py DATA OUT --unused

DATA is a folder with the idx files of Fashion-MNIST (training and test images). The features are
those of an embedded extractor; mean and covariance are over all training images, and 5000 features each
of training and of test images, chosen at random, are kept. With ``--unused`` a thousand of the other
test images are written instead, for scores in any features.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import date
from pathlib import Path

import torch

from fewstep import metrics
from fewstep.base.files import write_tensors
from fewstep.metrics.real import order
from fewstep.metrics.reference import MOST_FEATURES
from fewstep.training.data import read_images


def main() -> None:
    """Measures, writes, reads back, compares the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--features", default="fashion")
    parser.add_argument("--unused", action="store_true")
    options = parser.parse_args()
    if options.unused:
        images = read_images(options.data / "t10k-images-idx3-ubyte.gz").images
        kept = order(len(images))[MOST_FEATURES : MOST_FEATURES + 1000].sort().values
        write_tensors(options.out / "unused.safetensors", {"images": images[kept]})
        return
    with tempfile.TemporaryDirectory() as empty:
        made = metrics.Reference.load(options.data, options.features, cache=empty)
    about = {"made": date.today().isoformat(), "torch": torch.__version__}
    made.write(options.out, about)
    bytes_written = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {made.statistics.n} images, {bytes_written / 1e6:.2f} MB")
    print(f"features {tuple(made.features.shape)}, held out {tuple(made.heldout.shape)}")
    print(f"FID of the kept training features {metrics.fid(made.features, made)}")
    print(f"FID of the held-out features      {metrics.fid(made.heldout, made)}")
    print(f"KID of the two                    {metrics.kid(made.heldout, made, blocks=5)}")


if __name__ == "__main__":
    main()
