"""``fewstep tune``: a sampler searched for one model, as a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.base.progress import Progress, progress_of
from fewstep.cli._common import (
    Flag,
    Options,
    chosen_labels,
    console,
    load_model,
    parse_options,
    positive,
    say,
)

if TYPE_CHECKING:
    from fewstep.learned.search import Event
    from fewstep.learned.tuning import TunedSampler


def tune(
    model: str,
    *,
    out: Path,
    nfe: int = 5,
    family: str = "gs",
    objective: str = "auto",
    data: str | None = None,
    features: str | None = None,
    solver: str | None = None,
    grid: str | None = None,
    option: Options = None,
    head_start: float | None = None,
    family_option: list[str] | None = None,
    setting: list[str] | None = None,
    steps: int | None = None,
    class_labels: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    overwrite: Flag = False,
) -> None:
    """Search a sampler of few evaluations for a model: OUT is a recipe for sample, compare, diffusers.

    A run that was interrupted goes on when the same command is given again, to the same result; its
    checkpoints are in a folder beside OUT.

    Args:
        model: An embedded name (see `fewstep models`), or a folder.
        out: The file to write, for example tuned.json.
        nfe: The number of network evaluations of the sampler.
        family: What is learned: gs (times and corrections of a solver), ld3, schedule, free, ggdm,
            ggdm+pred+time and others.
        objective: endpoint, trajectory, mmd; sums (mmd+0.1*endpoint), stages (endpoint,mmd); auto is
            endpoint,mmd with data and endpoint without.
        data: Real data: an embedded name (fashion), a folder of images, an idx or npz file.
        features: The features of mmd: fashion, fashion-robust, pixels, or a folder or file.
        solver: The solver to start from; left out, the best for this kind of schedule (auto), ddim
            for the families ggdm.
        grid: The time grid to start from.
        option: An option of solver or grid as key=value; can be repeated.
        head_start: The time above which the Gaussian solution replaces evaluations.
        family_option: An option of the family as key=value (coordinate=lambda); can be repeated.
        setting: A setting of the search as key=value (batch_size=32); can be repeated.
        steps: The steps of each stage.
        class_labels: The classes to draw from: 3, or 0,1,2, or all; all if left out.
        guidance: The scale of classifier-free guidance; it becomes part of the recipe.
        seed: The seed of everything random.
        device: Where to run, for example cpu or cuda.
        overwrite: Start anew and replace what is there.
    """
    from fewstep.learned.settings import Search
    from fewstep.learned.tuning import checkpoint_folder
    from fewstep.learned.tuning import tune as run

    positive("--nfe", nfe)
    positive("--steps", steps)
    if out.is_dir():
        raise ValueError(f"{str(out)!r} is a folder; --out must be a file, for example tuned.json")
    settings = parse_options(setting)
    if steps is not None:
        settings["steps"] = steps
    denoiser = load_model(model, device)
    cond: dict[str, Any] = {}
    if class_labels is not None:
        cond["class_labels"] = chosen_labels(class_labels, denoiser)
    with progress_of(True) as progress:
        made = run(
            denoiser,
            nfe=nfe,
            family=family,
            objective=objective,
            data=data,
            features=features,
            solver=solver,
            grid=grid,
            head_start=head_start,
            options=parse_options(option),
            family_options=parse_options(family_option),
            guidance=guidance,
            search=Search.of(settings),
            seed=seed,
            out=out,
            overwrite=overwrite,
            on_event=_Events(progress),
            **cond,
        )
    _report(made)
    page = _page(made, checkpoint_folder(out) / "report.html")
    more = f" and {page}" if page else ""
    say(f"wrote {out}{more}; the search's checkpoints are in {checkpoint_folder(out)}")
    again = ["fewstep", "sample", model, "--recipe", str(out), "--out", str(out.with_suffix(""))]
    if class_labels is not None:
        again += ["--class-labels", class_labels]
    elif "class_labels" in denoiser.null_condition:
        again += ["--class-labels", "all"]
    say(f"next: {shlex.join(again)}")


class _Events:
    """Shows the events of a search, one stage for each of its phases."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._phase, self._done = "", 0

    def __call__(self, event: Event) -> None:
        if event.phase != self._phase:
            self._phase, self._done = event.phase, 0
            self._progress.stage(event.phase, event.total)
        note = ""
        if event.best is not None and event.score is not None:
            note = f"held out {event.score:.4g}, best {event.best:.4g}"
        self._progress.tick(event.done - self._done, note)
        self._done = event.done


def _report(made: TunedSampler) -> None:
    from rich.table import Table

    table = Table("score on unused seeds", "before", "after", title=made.recipe.name)
    before, after = made.scores["before"], made.scores["after"]
    for name in before:
        table.add_row(name, *(_interval(scores[name]) for scores in (before, after)))
    console().print(table)
    if not made.improved:
        say("nothing better than the start was found, so the recipe is the start itself")


def _interval(score: dict[str, Any]) -> str:
    return f"{score['value']:.4g} ({score['low']:.4g} to {score['high']:.4g})"


def _page(made: TunedSampler, path: Path) -> Path | None:
    """Writes a report of the search, if what it needs is installed."""
    try:
        from fewstep.metrics.intervals import Estimate
        from fewstep.reporting.figures import Series, line_plot
        from fewstep.reporting.page import Page

        page = Page(
            f"Tuning of {made.recipe.name}", "What the search did, judged on held-out noise."
        )
    except ImportError:
        return None
    about = made.recipe.about
    page.facts(
        [
            ("family", about["family"], f"{about['learned']} numbers"),
            ("objective", about["objective"], ""),
            ("start", about["base"]["solver"], f"{about['nfe']} evaluations"),
            ("found", "better" if made.improved else "nothing", "than the start"),
        ]
    )
    before, after = made.scores["before"], made.scores["after"]
    page.table(
        "Scores on seeds that the search never used",
        ["score", "before", "after"],
        [[name, Estimate(**before[name]), Estimate(**after[name])] for name in before],
    )
    for stage in sorted({h["stage"] for h in made.history}):
        rows = [h for h in made.history if h["stage"] == stage and h["score"] is not None]
        steps = [h["step"] for h in rows]
        lines = [
            Series("held out", steps, [h["score"] for h in rows]),
            Series("recall", steps, [h["recall"] for h in rows]),
        ]
        for line in lines:
            made_of = line_plot([line], x_label="step", y_label=line.name)
            page.figure(made_of, f"Stage {stage + 1}: {line.name}", alt=f"{line.name} by step")
    columns = ["stage", "step", "loss", "score", "precision", "recall", "taken", "skipped"]
    rows = [[_shown_value(h[key]) for key in columns] for h in made.history]
    page.table("Judgements", columns, rows)
    try:
        return page.write(path)
    except ImportError:
        return None


def _shown_value(value: Any) -> Any:
    return ("yes" if value else "no") if isinstance(value, bool) else value
