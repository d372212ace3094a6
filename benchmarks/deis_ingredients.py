"""The ingredients of DEIS one after the other, and how well the network fits where trajectories go.

Usage: python benchmarks/deis_ingredients.py [--only mixtures,curves,fashion,fitting,toy]
           [--data FASHION_MNIST] [-n 64] [--seed 3000] [--figures docs/figures]

Ablation: Euler on the probability flow -> exponential integrator (EI) on the score -> on epsilon
(DDIM) -> polynomial (tab3), all on the uniform grid -> quadratic grid. On both exact mixtures and
on `fashion`; RMS to a fine reference from the same noise.

Curves, on the mixtures and on `fashion`, along reference trajectories: the relative change of
epsilon over t; what freezing the score or epsilon over a step costs; the error of extrapolating
epsilon by polynomials of degree 0 to 3.

Fitting error: the network of `fashion` beside the optimal denoiser of the training images of the same class
(`--data`: a folder with the idx files of Fashion-MNIST), over t; at noised training images, at
noised test images, and along the network's own trajectories. And, as in the paper, a small network on the
line: log density and relative error of its score over (t, x).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import fewstep
from _common import FIGURES, figure, print_table, printed_to, rms, say_what_runs, ticks
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.diffusion.quadrature import lagrange
from fewstep.metrics import rms as rms_with_interval
from fewstep.models.denoiser import Denoiser
from fewstep.models.exact import GaussianMixture
from fewstep.studies.fitting import Optimal
from fewstep.training.data import read_images

STAGES = (
    ("Euler", "euler", "uniform"),
    ("EI on the score", "ei-score", "uniform"),
    ("+ epsilon (DDIM)", "ddim", "uniform"),
    ("+ polynomial (tab3)", "tab3", "uniform"),
    ("+ grid (quadratic)", "tab3", "quadratic"),
)
CALLS = (5, 6, 8, 10, 15, 20)
MORE_CALLS = (5, 6, 8, 10, 15, 20, 50, 100, 200)


def ablation(
    model: Denoiser, noise: Tensor, budgets: tuple[int, ...], fine: int, **cond: Tensor
) -> dict[str, list[float]]:
    """Prints and returns the RMS error of each stage at each budget."""
    truth = reference(model, noise, fine, **cond)
    errors: dict[str, list[float]] = {}
    rows = []
    for label, solver, grid in STAGES:
        found = [
            rms_with_interval(
                fewstep.sample(
                    model,
                    solver=solver,
                    grid=grid,
                    nfe=k,
                    noise=noise,
                    batch_size=len(noise),
                    **cond,
                ),
                truth,
            )
            for k in budgets
        ]
        errors[label] = [e.value for e in found]
        rows.append([label, *(f"{e.value:.4f} ± {(e.high - e.low) / 2:.4f}" for e in found)])
    print_table(["stage", *map(str, budgets)], rows)
    return errors


def reference(model: Denoiser, noise: Tensor, fine: int, save: str | None = None, **cond: Tensor):  # noqa: ANN201
    """Returns where the flow takes the noise; by `tab2` in log-rho, of third order."""
    grid = fewstep.grid("log-rho", model.schedule, fine)
    return fewstep.sample(
        model,
        solver="tab2",
        grid=grid,
        nfe=fine,
        noise=noise,
        batch_size=len(noise),
        save=save,
        **cond,
    )


def draw_ablation(
    ax: object, errors: dict[str, list[float]], budgets: tuple[int, ...], title: str
) -> None:
    for label, values in errors.items():
        ax.loglog(budgets, values, marker="o", markersize=3, label=label)  # type: ignore[attr-defined]
    ax.set(xlabel="network evaluations", title=title)  # type: ignore[attr-defined]
    if budgets[-1] < 100:  # within a decade the axis would have no ticks worth the name
        ticks(ax, budgets)


def mixtures(options: argparse.Namespace) -> None:
    """The ablation on the exact mixtures."""
    with figure("ingredients-mixtures", options.figures, columns=2) as axes:
        for ax, name in zip(axes, ("mixture-smooth", "mixture-sharp"), strict=True):
            model = fewstep.load(name)
            noise = torch.randn(
                (1000, 2),
                generator=torch.Generator().manual_seed(options.seed),
                dtype=torch.float64,
            )
            print(
                f"{name}, 1000 draws, float64; RMS to `tab2` with 2000 evaluations, 95 % intervals\n"
            )
            draw_ablation(ax, ablation(model, noise, MORE_CALLS, 2000), MORE_CALLS, name)
        axes[0].set_ylabel("RMS error")
        axes[0].legend(loc="lower left")


def images(options: argparse.Namespace) -> tuple[Denoiser, Tensor, Tensor]:
    """Returns the embedded model, noise and labels."""
    model = fewstep.load("fashion")
    assert model.event_shape is not None
    noise = NoiseSource(options.seed, range(options.n)).draw(INITIAL, model.event_shape)
    return model, noise, torch.arange(options.n) % 10


def fashion(options: argparse.Namespace) -> None:
    """The ablation on the embedded model."""
    model, noise, labels = images(options)
    print(
        f"fashion, {options.n} samples, classes in turn; RMS to `tab2` with 200 evaluations, 95 % intervals\n"
    )
    with figure("ingredients-fashion", options.figures) as axes:
        errors = ablation(model, noise, CALLS, 200, class_labels=labels)
        draw_ablation(axes[0], errors, CALLS, "fashion")
        axes[0].set_ylabel("RMS error")
        axes[0].legend(loc="lower left")


def curves(options: argparse.Namespace) -> None:
    """What the ingredients live on, along reference trajectories."""
    model, noise, labels = images(options)
    few = noise[: min(16, len(noise))]
    cases = [
        (
            "mixture-smooth",
            fewstep.load("mixture-smooth"),
            torch.randn((500, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64),
            400,
            {},
        ),
        (
            "mixture-sharp",
            fewstep.load("mixture-sharp"),
            torch.randn((500, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64),
            400,
            {},
        ),
        ("fashion", model, few, 60, {"class_labels": labels[: len(few)]}),
    ]
    rows = []
    with figure("ingredients-curves", options.figures, columns=3, size=(3.3, 3.0)) as axes:
        for name, of, z, fine, cond in cases:
            t, _, eps = trajectory(of, z, fine, **cond)
            span = float(t[0])
            change = norm(eps[1:] - eps[:-1]) / norm(eps[1:]) / -t.diff() * span
            axes[0].semilogy(t[1:] / span, change, label=name)
            ratio, middle = freezing(of, t, eps, span / 20)
            axes[1].semilogy(middle / span, ratio, label=name)
            errors = extrapolation(of, z, 20, **cond)
            axes[2].plot(range(4), errors, marker="o", markersize=3, label=name)
            rows.append([name, *(f"{e:.4f}" for e in errors)])
        axes[0].set(xlabel="t / T", title="relative change of ε per unit of t / T")
        axes[1].set(xlabel="t / T", title="error of frozen score / frozen ε")
        axes[1].axhline(1.0, color="black", linewidth=0.7)
        axes[2].set(
            xlabel="degree", title="extrapolation of ε, 20 steps", yscale="log", xticks=range(4)
        )
        axes[0].legend()
    print(
        "Extrapolation of epsilon from earlier steps to the next, quadratic grid of 20 steps,\n"
        "relative RMS, mean over steps from the fourth on\n"
    )
    print_table(["model", "degree 0", "1", "2", "3"], rows)


def norm(x: Tensor) -> Tensor:
    """Returns the RMS over all but the first dimension."""
    return x.double().square().flatten(1).mean(1).sqrt()


def trajectory(
    model: Denoiser, noise: Tensor, fine: int, grid: str = "log-rho", **cond: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns times (S), states (S, B, *) and epsilon there, along the flow."""
    knots = fewstep.grid(grid, model.schedule, fine)
    made = fewstep.sample(
        model,
        solver="tab3",
        grid=knots,
        nfe=fine,
        noise=noise,
        batch_size=len(noise),
        save="states",
        **cond,
    )
    ready = model.prepare(len(noise), cond)
    with torch.no_grad():
        eps = torch.stack(
            [
                model(x, float(t), prediction="eps", **ready)
                for x, t in zip(made.states, made.times, strict=True)
            ]
        )
    return made.times, made.states, eps


def freezing(model: Denoiser, t: Tensor, eps: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Returns how much worse it is to freeze the score than epsilon over a step, and where.

    Both in units of epsilon: the frozen score, seen as epsilon at the end of the step, is
    eps(t) sigma(s) / sigma(t).
    """
    sigma = model.schedule.sigma(t)
    found, at = [], []
    for i in range(len(t)):
        j = int((t - (t[i] - step)).abs().argmin())
        if j <= i or t[i] - step < t[-1] - 0.5 * step:
            continue
        score = rms(eps[i] * float(sigma[j] / sigma[i]) - eps[j])
        found.append(score / rms(eps[i] - eps[j]))
        at.append(float(t[i]))
    return torch.tensor(found), torch.tensor(at)


def extrapolation(model: Denoiser, noise: Tensor, steps: int, **cond: Tensor) -> list[float]:
    """Returns the relative errors of epsilon extrapolated in t to the next point, degrees 0 to 3."""
    often = 4
    t, _, eps = trajectory(model, noise, often * steps, "quadratic", **cond)
    t, eps = t[::often], eps[::often]
    found = []
    for degree in range(4):
        errors = []
        for i in range(4, len(t)):
            weights = lagrange(t[i - 1 - degree : i].unbind(), t[i : i + 1])[:, 0]
            nodes = eps[i - 1 - degree : i]
            guess = (weights.to(nodes).reshape(-1, *[1] * (nodes.ndim - 1)) * nodes).sum(0)
            errors.append(rms(guess - eps[i]) / rms(eps[i]))
        found.append(sum(errors) / len(errors))
    return found


def fitting(options: argparse.Namespace) -> None:
    """The network beside the optimal denoiser of its training data."""
    if options.data is None:
        print(
            "fitting: left out, it needs --data (a folder with the idx files of Fashion-MNIST)\n"
        )
        return
    model, noise, labels = images(options)
    train = read_images(options.data)
    test = next(
        read_images(f)
        for s in ("", ".gz")
        if (f := options.data / f"t10k-images-idx3-ubyte{s}").exists()
    )
    fine = 100
    knots = fewstep.grid("log-rho", model.schedule, fine)
    made = fewstep.sample(
        model,
        solver="tab2",
        grid=knots,
        nfe=fine,
        noise=noise,
        batch_size=len(noise),
        save="states",
        class_labels=labels,
    )
    picked = range(0, fine + 1, 4)
    errors: dict[str, list[list[float]]] = {
        "training images": [],
        "test images": [],
        "own trajectories": [],
    }
    optimal = Optimal(train.floats(), train.labels, model)
    own = [pick(part, labels, options.seed) for part in (train, test)]
    for i in picked:
        t = float(made.times[i])
        a, s = (float(f(made.times[i])) for f in (model.schedule.alpha, model.schedule.sigma))
        starts = dict(
            zip(errors, [*(a * x + s * noise for x in own), made.states[i]], strict=True)
        )
        for label, x in starts.items():
            with torch.no_grad():
                ours = model(x, t, prediction="eps", class_labels=labels)
                best = optimal(x, t, prediction="eps", class_labels=labels)
            gap = (ours - best).flatten(1).norm(dim=1) / best.flatten(1).norm(dim=1)
            errors[label].append([float(gap.mean()), 1.96 * float(gap.std()) / len(gap) ** 0.5])
    times = [float(made.times[i]) for i in picked]
    rho = [float(model.schedule.rho(made.times[i])) for i in picked]
    rows = [
        [f"{rho[j]:.3g}", f"{t:.0f}", *(f"{e[j][0]:.3f} ± {e[j][1]:.3f}" for e in errors.values())]
        for j, t in enumerate(times)
        if j % 3 == 0 or j == len(times) - 1
    ]
    print(
        f"Fitting error of fashion: |eps - eps*| / |eps*|, eps* optimal for the training images of the class,\n"
        f"{options.n} samples, mean with 95 % interval\n"
    )
    print_table(["sigma/alpha", "t", *errors], rows)
    with figure("fitting-fashion", options.figures) as axes:
        for label, e in errors.items():
            middle, width = torch.tensor(e).T
            axes[0].plot(rho, middle, label=label)
            axes[0].fill_between(rho, middle - width, middle + width, alpha=0.2)
        axes[0].set(
            xscale="log",
            xlabel="σ / α",
            ylabel="relative error of ε",
            title="fitting error, fashion",
            ylim=(0, None),
        )
        axes[0].legend()


def pick(data: object, labels: Tensor, seed: int) -> Tensor:
    """Returns an image of each of these classes, at random."""
    generator = torch.Generator().manual_seed(seed)
    of = data.labels  # type: ignore[attr-defined]
    rows = []
    for label in labels:
        there = (of == label).nonzero().flatten()
        rows.append(there[torch.randint(len(there), (), generator=generator)])
    return data.floats(torch.stack(rows))  # type: ignore[attr-defined]


def toy(options: argparse.Namespace) -> None:
    """A small network on the line: where its score is wrong."""
    schedule = fewstep.schedule("vp-linear")
    model = GaussianMixture([[-1.2], [0.9]], [0.08, 0.08], [0.5, 0.5], schedule)
    torch.manual_seed(options.seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
        torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1),
    )  # fmt: skip
    steps = 3000
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = model.draw(20_000, seed=options.seed).float()
    for _ in range(steps):
        x0 = data[torch.randint(len(data), (512,))]
        t = torch.rand(512).clamp(min=schedule.t_min)
        a, s = (f(t.double()).float()[:, None] for f in (schedule.alpha, schedule.sigma))
        z = torch.randn_like(x0)
        loss = (network(torch.cat([a * x0 + s * z, t[:, None]], 1)) - z).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    t = torch.linspace(0.01, 1, 120, dtype=torch.float64)
    x = torch.linspace(-3, 3, 160, dtype=torch.float64)
    logs, errors, weight = [], [], []
    for time in t:
        exact = model(x[:, None], float(time), prediction="eps")
        with torch.no_grad():
            ours = network(
                torch.stack([x.float(), torch.full_like(x, float(time)).float()], 1)
            ).double()
        logs.append(model.log_prob(x[:, None], time))
        errors.append(((ours - exact).abs() / exact.abs().clamp(min=0.05))[:, 0])
        weight.append(logs[-1].exp() / logs[-1].exp().sum())
    log, error, share = torch.stack(logs), torch.stack(errors), torch.stack(weight)
    inside = float((error * share).sum(1).mean())
    out = log < log.amax(1, keepdim=True) - 10
    print(
        f"A network of {sum(p.numel() for p in network.parameters())} parameters on the line, {steps} steps: "
        f"relative error of the score, mean over the data's law {inside:.3f}, where the density is\n"
        f"below e^-10 of its top {float(error[out].mean()):.3f}\n"
    )
    with figure("fitting-toy", options.figures, columns=2) as axes:
        extent = (float(t[0]), 1.0, -3.0, 3.0)
        style = {"origin": "lower", "aspect": "auto", "extent": extent, "interpolation": "nearest"}
        shown = axes[0].imshow(log.T.clamp(min=-20), cmap="viridis", **style)
        axes[0].figure.colorbar(shown, ax=axes[0])
        shown = axes[1].imshow(error.T.clamp(max=2), cmap="magma", **style)
        axes[1].figure.colorbar(shown, ax=axes[1])
        axes[0].set(title="log density", xlabel="t", ylabel="x")
        axes[1].set(title="relative error of the score", xlabel="t")
        for ax in axes:
            ax.grid(visible=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="mixtures,curves,fashion,fitting,toy")
    parser.add_argument("--data", type=Path, help="a folder with the idx files of Fashion-MNIST")
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--seed", type=int, default=3000)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    say_what_runs(f"Seed {options.seed}.")
    parts = {
        "mixtures": mixtures,
        "curves": curves,
        "fashion": fashion,
        "fitting": fitting,
        "toy": toy,
    }
    for part in options.only.split(","):
        with printed_to(f"ingredients-{part}", seed=options.seed):
            parts[part](options)


if __name__ == "__main__":
    main()
