"""The page of a study: figures, tables, and sentences about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.reporting.figures import Series, line_plot
from fewstep.reporting.page import Cell, Page, number

SHOWN_HYPOTHESES = 12
OUTCOMES = {"passed": "passed", "undecided": "undecided", "failed": "doubtful"}


def write_page(results: Mapping[str, Any], path: Path, *, command: str) -> Path:
    """Writes the report; returns its path.

    Arguments:
        results: The record that :func:`fewstep.studies.study` returns.
        path: The file.
        command: The command that reproduces it.
    """
    settings = results["settings"]
    page = Page(
        f"Analysis of {Path(settings['model']).name}",
        "Where its sampling error comes from, and which sampler suits it.",
    )
    page.footer = f"fewstep {__version__}. Nothing was trained. Command: {command}"
    _summary(page, results)
    _advice(page, results)
    _check(page, results["check"])
    _anatomy(page, results)
    _fitting(page, results)
    _spectrum(page, results["spectrum"])
    return page.write(path)


def _summary(page: Page, results: Mapping[str, Any]) -> None:
    check, advice = results["check"], results["advice"]
    nfe = results["enough"] or results["shown"]
    best = next(item for item in advice if item["nfe"] == nfe)["best"]
    note = (
        "within 5 % of the data's deviation of the reference"
        if results["enough"]
        else "none of these budgets comes within 5 % of the data's deviation"
    )
    page.facts(
        [
            (
                "Model check",
                OUTCOMES[check["outcome"]],
                f"relative error {number(check['claimed']['relative_error'], 3)}",
            ),
            ("Recommended", f"{best['solver']}, {nfe} evaluations", note),
            (
                "Its distance",
                number(best["held_out"], 3),
                "root mean square to the reference, held-out samples",
            ),
            ("Deviation of samples", number(results["deviation"], 3), "for scale"),
        ]
    )
    page.paragraph(check["verdict"])


def _advice(page: Page, results: Mapping[str, Any]) -> None:
    advice = results["advice"]
    page.heading("Recommendation")
    page.paragraph(
        "The error of each solver on each grid is predicted from local errors along reference trajectories; the best "
        "grid of each solver is run; the times of the best are polished by Gauss–Newton steps on the "
        "distance to the reference; a multistep method with weights fitted along the trajectories (fewstep fit) "
        "is run beside them; the best on held-out samples is recommended."
    )
    rows = []
    for item in advice:
        best, default = item["best"], item["default"]
        gain = 1 - best["held_out"] / default["held_out"]
        rows.append(
            [
                item["nfe"],
                best["solver"],
                best["grid"],
                best["held_out"],
                default["held_out"],
                f"{default['solver']}, {default['grid']}",
                _percent(gain),
            ]
        )
    page.table(
        "The recommended sampler at each budget, beside the default (`auto`), on held-out samples",
        ["NFE", "solver", "grid", "distance", "distance of the default", "the default", "less"],
        rows,
    )
    ticks = [item["nfe"] for item in advice]
    best = [item["best"]["held_out"] for item in advice]
    default = [item["default"]["held_out"] for item in advice]
    predicted = [item["best"]["predicted"] for item in advice]
    page.figure(
        line_plot(
            [
                Series("recommended", ticks, best),
                Series("default (auto)", ticks, default),
                Series("recommended, predicted", ticks, predicted),
            ],
            x_label="network evaluations",
            y_label="distance to the reference",
            log_x=True,
            log_y=True,
            x_ticks=ticks,
        ),
        "Root mean square distance to the reference from the same noise, held-out samples. The prediction adds "
        "up squares of local errors; after polishing errors cancel, which it does not model.",
        alt="Distance to the reference against the number of network evaluations.",
    )
    page.figure(
        line_plot(
            [
                Series(
                    f"{item['nfe']}",
                    list(range(len(item["best"]["times"]))),
                    item["best"]["times"],
                )
                for item in advice
            ],
            x_label="step",
            y_label="time",
            x_ticks=list(range(0, max(item["nfe"] for item in advice) + 1, 5)),
        ),
        "The recommended times, by number of evaluations.",
        alt="The times of the recommended grids.",
    )
    for item in advice:
        with page.details(f"All samplers tried with {item['nfe']} evaluations"):
            page.table(
                f"Samplers at {item['nfe']} evaluations; the predicted best first",
                ["solver", "grid", "predicted", "on fitted samples", "held out"],
                [
                    [t["solver"], t["grid"], t["predicted"], t["measured"], t["held_out"]]
                    for t in item["tried"]
                ],
                marked=[k for k, t in enumerate(item["tried"]) if t == item["best"]],
            )


def _percent(share: float) -> Cell:
    return Cell(f"{share:.0%}".replace("-", "\N{MINUS SIGN}"), share)


def _check(page: Page, check: Mapping[str, Any]) -> None:
    page.heading("Model check")
    on = "real data" if check["source"] == "data" else "its own samples"
    page.paragraph(
        f"Under each hypothesis (prediction, its sign, schedule, conditioning timesteps, range of the data) the "
        f"network denoises {on}, at five levels of noise. The relative error is its squared error divided by "
        "that of the best Gaussian denoiser: below 1 it has learned more than mean and variance. "
        f"99 % of the values are between {check['low']:.3g} and {check['high']:.3g}."
    )
    shown = check["hypotheses"][:SHOWN_HYPOTHESES]
    page.table(
        f"The best {len(shown)} of {len(check['hypotheses'])} hypotheses; the claimed one is marked",
        ["prediction", "schedule", "time", "range", "relative error", ""],
        [
            [
                ("\N{MINUS SIGN}" if item["negated"] else "") + item["prediction"],
                item["schedule"],
                item["time"],
                item["range"],
                item["relative_error"],
                "not distinguishable from the best" if item in check["undecided"] else "",
            ]
            for item in shown
        ],
        marked=[k for k, item in enumerate(shown) if item == check["claimed"]],
    )


def _anatomy(page: Page, results: Mapping[str, Any]) -> None:
    anatomy = results["anatomy"]
    page.heading("Sources of the error")
    page.paragraph(
        f"Along reference trajectories ({results['reference']['nfe']} evaluations each). All sizes are root mean "
        "squares over coordinates and samples."
    )
    change = anatomy["relative_change"]
    page.figure(
        line_plot(
            [Series("", change["times"], change["values"])],
            x_label="time",
            y_label="relative change",
            log_y=True,
            markers=False,
        ),
        "How much the predicted noise changes over 1 % of the time range, relative to itself: where it is "
        "large, steps must be small.",
        alt="Relative change of the predicted noise over time.",
    )
    freezing = anatomy["freezing"]
    page.figure(
        line_plot(
            [
                Series("score frozen", freezing["times"], freezing["score"]),
                Series("noise frozen", freezing["times"], freezing["eps"]),
            ],
            x_label="time",
            y_label="error of the score",
            log_y=True,
            markers=False,
        ),
        "The error of freezing the score, or the predicted noise, over 1 % of the time range.",
        alt="Errors of freezing the score and of freezing the noise, over time.",
    )
    gain = anatomy["gain"]
    page.figure(
        line_plot(
            [Series("", gain["times"], gain["values"])],
            x_label="time",
            y_label="remaining at the end",
            log_y=max(gain["values"]) > 5 * min(gain["values"]),
            markers=False,
        ),
        "The factor by which a small error at a time remains at the end: the weight of a local error.",
        alt="The gain of errors over time.",
    )
    page.table(
        "Error of extrapolating the predicted noise to the next point of a grid by a polynomial in time, "
        "means from the fourth step on",
        ["grid", "steps", "degree 0", "degree 1", "degree 2", "degree 3"],
        [[e["grid"], e["steps"], *e["means"]] for e in anatomy["extrapolation"]],
    )
    series = []
    for style, item in enumerate(anatomy["steps"]):
        series.append(Series(item["plan"], item["times"], item["left"], style=style))
    page.figure(
        line_plot(
            series,
            x_label="time at the end of the step",
            y_label="remaining at the end",
            log_y=True,
        ),
        f"The local error of each step at {results['shown']} evaluations, as it remains at the end.",
        alt="Local errors of the steps of the recommended and the default sampler.",
    )


def _fitting(page: Page, results: Mapping[str, Any]) -> None:
    fitting = results["fitting"]
    page.heading("Fitting and discretisation")
    if fitting is None:
        page.paragraph(
            "Without `--data` the network cannot be compared with the optimal denoiser of its data: this part "
            "is omitted."
        )
        return
    by_class = f", each class by itself ({fitting['classes']})" if fitting["classes"] else ""
    page.paragraph(
        f"The optimal denoiser of the {number(fitting['points'])} data{by_class} returns the data themselves: a "
        "network that generalises must differ from it along its own trajectories. The size of that difference "
        "is the model's own part; the discretisation error matters where it is not small compared with it."
    )
    times = fitting["times"]
    page.figure(
        line_plot(
            [
                Series("on noised data", times, fitting["noised"]["rms"]),
                Series("along trajectories", times, fitting["trajectories"]["rms"]),
            ],
            x_label="time",
            y_label="difference of the noise",
            log_y=True,
        ),
        "The network's distance to the optimal denoiser of the data, in the predicted noise.",
        alt="Fitting error over time, on noised data and along trajectories.",
    )
    steps = fitting["steps"]
    if steps is not None:
        page.figure(
            line_plot(
                [
                    Series("fitting", steps["times"], steps["fitting"]),
                    Series("discretisation", steps["times"], steps["discretisation"]),
                ],
                x_label="time at the end of the step",
                y_label="movement of the state",
                log_y=True,
            ),
            f"What each step of the recommended sampler at {results['shown']} evaluations moves the state by because the "
            "network is not the optimal denoiser, and because the step is finite.",
            alt="Fitting and discretisation error of each step.",
        )
    best = next(a for a in results["advice"] if a["nfe"] == results["shown"])["best"]
    page.table(
        "From the same noise",
        ["between", "distance"],
        [
            ["the model's trajectory and the optimal denoiser's, at their ends", fitting["end"]],
            [
                f"{best['solver']} at {results['shown']} evaluations and the model's trajectory",
                best["held_out"],
            ],
        ],
        sortable=False,
    )


def _spectrum(page: Page, spectrum: Mapping[str, Any]) -> None:
    page.heading("Spectrum over time")
    page.paragraph(
        "How compact trajectories are in time, which sets the size of a temporal operator (`fewstep distill`). The plain "
        "transform shows the jump from the end back to the start as high frequencies; the cosine basis does not."
    )
    most = 33
    series = [
        Series(name, list(range(1, 1 + len(energy))), energy)
        for name, energy in (
            ("periodic", spectrum["dft"]["energy"][:most]),
            ("cosine", spectrum["dct"]["energy"][:most]),
        )
    ]
    page.figure(
        line_plot(
            series,
            x_label="mode",
            y_label="share of the energy",
            log_x=True,
            log_y=True,
            markers=False,
        ),
        "The energy of each mode, averaged over coordinates and trajectories.",
        alt="Power spectrum of trajectories over time.",
    )
    page.table(
        "Modes and frames that hold 99.9 % of the energy",
        ["basis", "modes for 99 %", "modes (J)", "frames (M)"],
        [
            [name, spectrum[key]["modes_99"], spectrum[key]["modes"], spectrum[key]["frames"]]
            for name, key in (("periodic", "dft"), ("cosine", "dct"))
        ],
        sortable=False,
    )
    enough = spectrum["spline_frames"]
    reach = f"From {enough} frames on" if enough else "With none of the tried numbers of frames"
    page.paragraph(
        f"{reach} a cubic spline through them has a residual below 0.1 % of the energy; that of the best fit by the schedule's "
        f"own two curves is {spectrum['schedule_residual']:.2%}."
    )
