"""Where the embedded model's own error enters: real images, noised, and brought back by its flow.

Usage: python benchmarks/restart.py flow --data IDX_OR_FOLDER [-n 1000] [--times 40,80,150,260,400,600]
       python benchmarks/restart.py spectrum --data IDX_OR_FOLDER --samples DIR [--cells reference-100,...]

``flow``: held-out images get the noise of a time t, and the flow (tab3, 20 evaluations, log-rho) brings
them back. With a perfect network the result has the law of the data whatever t is; how far FID
rises with t says at which noise levels the network errs. Beside it: the network's one-step prediction.
``spectrum``: the power of samples that ``benchmarks/quality.py draw`` made, by spatial frequency,
as a share of the real images' power; and the noise in the black corners.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import fewstep
import quality
from _common import print_table, say_what_runs
from fewstep.metrics import Estimate, Reference, fid, rms
from fewstep.metrics.features import EMBEDDED
from fewstep.training.data import ImageData, read_images

CALLS, SEED, CHUNK = 20, 6000, 100
BANDS = ((0, 3), (3, 6), (6, 9), (9, 12), (12, 15))
CELLS = "reference-100,auto-5,auto-10,diffusers:unipc-3-5,diffusers:unipc-3-10,diffusers:ddim-trailing-5"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("flow", "spectrum"))
    parser.add_argument("--data", type=Path, required=True, help="held-out images with labels")
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--times", default="40,80,150,260,400,600")
    parser.add_argument("--samples", type=Path, help="the folder of benchmarks/quality.py")
    parser.add_argument("--cells", default=CELLS, help="names with calls, as in quality.py")
    options = parser.parse_args()
    images = read_images(options.data)
    if options.what == "flow":
        flow(images, options.n, [float(t) for t in options.times.split(",")])
    else:
        spectrum(images, options.samples, options.cells.split(","))


def flow(images: ImageData, n: int, times: list[float]) -> None:
    model = fewstep.load("fashion")
    looks = [Reference.load("fashion", features) for features in EMBEDDED]
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[:n]
    assert images.labels is not None
    real, labels = images.floats(chosen), images.labels[chosen]
    say_what_runs(f"{n} held-out images, tab3 with {CALLS} calls from t down, seed {SEED}.")
    rows = [["0 (the images)", "0", *(text_of(fid(real, look)) for look in looks), "0", "", ""]]
    for t in times:
        level = model.schedule.sigma(torch.tensor(t)) / model.schedule.alpha(torch.tensor(t))
        back = fewstep.sample(
            model, n, image=real, solver="tab3", nfe=CALLS, grid="log-rho", seed=SEED,
            options={"t_start": t}, class_labels=labels, batch_size=CHUNK,
        )  # fmt: skip
        seen = denoised(model, real, labels, t)
        rows.append([
            f"{t:g}", f"{float(level):.2f}", *(text_of(fid(back, look)) for look in looks),
            f"{rms(back, real).value:.3f}", text_of(fid(seen, looks[0])), f"{rms(seen, real).value:.3f}",
        ])  # fmt: skip
        print(*rows[-1], flush=True)
    head = ["t", "sigma / alpha", "FID", "FID, robust", "RMS to the image"]
    print_table([*head, "one call: FID", "RMS"], rows)


def text_of(found: Estimate) -> str:
    return f"{found.value:.2f} ± {found.value - found.low:.1f}"


@torch.no_grad()
def denoised(model: fewstep.Denoiser, real: Tensor, labels: Tensor, t: float) -> Tensor:
    """Returns what the network makes of noised images in one call."""
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(SEED))
    at = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = float(model.schedule.alpha(at)), float(model.schedule.sigma(at))
    parts = [
        model(alpha * x + sigma * z, t, prediction="x0", class_labels=y)
        for x, z, y in zip(real.split(CHUNK), noise.split(CHUNK), labels.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)


def power(x: Tensor) -> Tensor:
    """Returns the mean power of images by the distance from the zero frequency, one number a band."""
    size = x.shape[-1]
    found = torch.fft.fft2(x[:, 0].double()).abs().square().mean(0)
    k = torch.fft.fftfreq(size, dtype=torch.float64) * size
    radius = (k[:, None].square() + k.square()).sqrt().round()
    return torch.stack([found[(radius >= a) & (radius < b)].mean() for a, b in BANDS])


def corner(x: Tensor) -> float:
    return float(x[:, 0, :2, :2].std())


def spectrum(images: ImageData, folder: Path, cells: list[str]) -> None:
    assert images.labels is not None
    labels = images.labels
    # As many of each class as the samples have.
    chosen = [torch.nonzero(labels == c)[: quality.N // 10, 0] for c in range(10)]
    real = images.floats(torch.cat(chosen))
    whole, mark = power(real), fewstep.load("fashion").fingerprint()
    say_what_runs(f"{len(real)} held-out images, {quality.N} samples of each cell.")
    rows = [["the images", *["1"] * len(BANDS), f"{corner(real):.4f}"]]
    for cell in cells:
        name, calls = cell.rsplit("-", 1)
        drawn = quality.gather(name, int(calls), folder, mark)
        if drawn is None:
            raise SystemExit(f"{cell} is not drawn yet: benchmarks/quality.py draw")
        share = power(drawn[0]) / whole
        rows.append([f"{name}, {calls}", *(f"{v:.2f}" for v in share), f"{corner(drawn[0]):.4f}"])
    print_table(["sampler, calls", *(f"{a} to {b - 1}" for a, b in BANDS), "corners"], rows)


if __name__ == "__main__":
    main()
