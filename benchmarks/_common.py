"""What the benchmarks share: the line that says what ran, tables, figures, references."""

from __future__ import annotations

import io
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

import fewstep
from fewstep.base.files import write_json
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.models.denoiser import Denoiser
from fewstep.reporting.figures import COLORS, STYLE

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"
SMALL = {
    "axes.prop_cycle": cycler(color=COLORS),
    "font.size": 9,
    "figure.facecolor": "white",
    "legend.fontsize": 7.5,
}
"""What figures of the documentation have besides the house's style."""


@dataclass(frozen=True)
class Setting:
    """What a distance to the reference is measured on: a model, and noise that nothing was fitted to.

    Attributes:
        denoiser: The model.
        noise: The initial draws.
        cond: The conditions: the classes in turn, if it has classes.
    """

    denoiser: Denoiser
    noise: Tensor
    cond: dict[str, Any]

    @classmethod
    def of(cls, model: str, n: int, seed: int) -> Setting:
        """Returns the setting of n samples."""
        denoiser = fewstep.load(model)
        assert denoiser.event_shape is not None
        noise = NoiseSource(seed, range(n)).draw(INITIAL, denoiser.event_shape)
        labels = {"class_labels": torch.arange(n) % 10} if denoiser.null_condition else {}
        return cls(denoiser, noise, labels)

    def sample(self, **options: Any) -> Tensor:
        """Returns samples from this noise."""
        return fewstep.sample(self.denoiser, noise=self.noise, **options, **self.cond)

    def reference(self) -> Tensor:
        """Returns what 200 evaluations give (tab2, log-rho)."""
        fine = fewstep.grid("log-rho", self.denoiser.schedule, 200)
        return self.sample(solver="tab2", grid=fine)


def say_what_runs(what: str, packages: Iterable[str] = ()) -> None:
    """Prints the command, the date, the versions and what is measured."""
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", *packages))
    print(f"`{command()}`\n")
    print(
        f"{date.today()}, fewstep {fewstep.__version__}, {versions}, Python "
        f"{platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} thread(s). {what}\n",
        flush=True,
    )


def about(**more: Any) -> dict[str, Any]:
    """Returns the origin of a result, for its file: date, commit, command, versions, machine."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "commit": found or "unknown",
        "command": command(),
        "fewstep": fewstep.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device_name()}",
        **more,
    }


def command() -> str:
    """Returns the command that runs, without the folders of this machine: of absolute paths the last part."""
    shown = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *shown])


def device_name() -> str:
    """Returns the name of the GPU, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


class _Both(io.TextIOBase):
    """Writes to two streams."""

    def __init__(self, *streams: Any) -> None:
        self.streams = streams

    def write(self, text: str) -> int:
        for stream in self.streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


@contextmanager
def printed_to(name: str, **more: Any) -> Iterator[None]:
    """Stores what is printed inside, tables in Markdown, in ``results/NAME.json`` too."""
    text = io.StringIO()
    with redirect_stdout(_Both(sys.stdout, text)):
        yield
    write_json(RESULTS / f"{name}.json", {"about": about(**more), "printed": text.getvalue()})
    print(f"wrote {RESULTS / name}.json")


def version(package: str) -> str:
    """Returns the version of a package, or that it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table in Markdown, its columns aligned."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    cells.insert(1, ["-" * w for w in widths])
    for row in cells:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
    print(flush=True)


def rms(error: Tensor) -> float:
    """Returns the root mean square of an error."""
    return float(error.double().square().mean().sqrt())


@contextmanager
def figure(
    name: str,
    folder: Path,
    *,
    columns: int = 1,
    size: tuple[float, float] = (4.2, 3.2),
    **options: Any,
) -> Iterator[Sequence[Any]]:
    """Gives the axes of a figure, and writes it as SVG when they are drawn."""
    with rc_context(STYLE | SMALL):  # type: ignore[arg-type]
        made = Figure(figsize=(size[0] * columns, size[1]), layout="constrained")
        yield made.subplots(1, columns, squeeze=False, **options)[0]
        folder.mkdir(parents=True, exist_ok=True)
        # No date: the same numbers give the same file.
        made.savefig(folder / f"{name}.svg", metadata={"Date": None})
    print(f"![{name}](../figures/{name}.svg)\n", flush=True)


def legend_beside(ax: Any) -> None:
    """Puts the legend to the right of an axis, where it hides nothing."""
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def ticks(ax: Any, values: Sequence[int]) -> None:
    """Marks these values on a logarithmic axis, and nothing between."""
    ax.set_xticks(values, [str(v) for v in values])
    ax.minorticks_off()


def slope(errors: Sequence[float], counts: Sequence[int]) -> float:
    """Returns the order observed between the last two counts."""
    return math.log(errors[-2] / errors[-1]) / math.log(counts[-1] / counts[-2])
