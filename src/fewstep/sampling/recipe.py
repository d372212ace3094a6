"""The recipe: a sampler as names and numbers, in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewstep.base.files import loads_json, read_json
from fewstep.base.paths import check_path
from fewstep.base.records import Record
from fewstep.diffusion.schedules import NoiseSchedule, schedule_from_record
from fewstep.models.denoiser import Denoiser, matches
from fewstep.models.wrappers import Guided
from fewstep.plans.plan import Plan
from fewstep.plans.serial import PlanRecord
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.planning import Planned, planned
from fewstep.sampling.protocol import Sampler
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.residual import Residual

KINDS = ("solver", "plan", "adaptive", "operator")


class RecipeRecord(Record, name="fewstep.recipe", version=1, what="recipe"):
    """The file of a recipe; its fields are those of :class:`SamplerRecipe`."""

    kind: str | None = None
    name: str | None = None
    nfe: int | None = None
    grid: str | None = None
    head_start: float | None = None
    guidance: float | None = None
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    residual: dict[str, Any] | None = None


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300  # false for NaN too


@dataclass(frozen=True)
class SamplerRecipe:
    r"""A sampler as names and numbers, which can be stored.

    Attributes:
        kind: ``"solver"`` (built by name for a schedule), ``"plan"`` (with its coefficients),
            ``"adaptive"``, or ``"operator"`` (the sampler that is built into the model).
        name: The name of the solver.
        nfe: The number of network evaluations (of a solver).
        options: The options of the solver and its grid.
        grid: The name of the grid, or ``None`` for the solver's own.
        head_start: The time of an analytic head start.
        schedule: The schedule, as :meth:`NoiseSchedule.to_record` writes it; ``None`` if any.
        plan: The plan, of kind ``"plan"``.
        guidance: The scale of classifier-free guidance that belongs to it, or ``None``.
        model: The fingerprint of the model that it was made for, or ``None`` if any.
        residual: A correction of the plan's predictions, in a file of its own beside the recipe; or ``None``.
        about: Its origin: scores, model, objective. For readers.
    """

    kind: str = "solver"
    name: str = "auto"
    nfe: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: str | None = None
    head_start: float | None = None
    schedule: Mapping[str, Any] | None = None
    plan: Plan | None = None
    guidance: float | None = None
    model: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    residual: Residual | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"the kind of a recipe is one of {', '.join(KINDS)}, got {self.kind!r}"
            )
        if self.grid is not None and self.grid.startswith("auto:"):
            raise ValueError(
                "a recipe has its own times, not those of another file; make it from the file with "
                "fewstep.resolve, or Profile.load(FILE).recipe(nfe)"
            )
        if (self.plan is not None) != (self.kind == "plan"):
            raise ValueError("a recipe has a plan if and only if its kind is 'plan'")
        if self.residual is not None:
            if self.plan is None:
                raise ValueError("a residual corrects the predictions of a plan; give the plan")
            self.residual.check(self.plan, None)
        if self.kind == "solver" and self.nfe is None and "times" not in self.options:
            raise ValueError("a recipe of a solver has nfe, the number of network evaluations")
        if self.nfe is not None and (
            not isinstance(self.nfe, int) or isinstance(self.nfe, bool) or self.nfe < 1
        ):
            raise ValueError(f"nfe must be a positive integer, got {self.nfe!r:.40}")
        for name in ("head_start", "guidance"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise ValueError(f"{name} must be a finite number, got {value!r:.40}")
        if self.schedule is not None:
            schedule_from_record(self.schedule)

    def plan_for(
        self, schedule: NoiseSchedule, *, integer_times: bool = False, force: bool = False
    ) -> Plan:
        """Returns the plan for a schedule.

        Arguments:
            schedule: The schedule.
            integer_times: Whether the grid of a solver is rounded to training timesteps.
            force: Whether to use a plan of another schedule with its numbers.

        Raises:
            ValueError: If the recipe is for another schedule, has no plan beforehand, or has a residual,
                without which its plan is another sampler.
        """
        self.plan_alone()
        return self._plan_for(schedule, integer_times=integer_times, force=force)

    def plan_alone(self) -> Plan | None:
        """Returns the plan of the recipe, or ``None`` if it has none beforehand.

        Raises:
            ValueError: If a residual belongs to it, without which it is another sampler.
        """
        if self.residual is not None:
            raise ValueError(
                f"the recipe {self.name!r} has a spatial residual, which is not part of its plan and does not "
                "run here; use it with fewstep.sample (fewstep sample --recipe) or in PlanScheduler"
            )
        return self.plan

    def _plan_for(
        self, schedule: NoiseSchedule, *, integer_times: bool = False, force: bool = False
    ) -> Plan:
        if force and self.plan is not None:
            return _for_schedule(self.plan, schedule)
        if self.schedule is not None and schedule_from_record(self.schedule) != schedule:
            raise ValueError(
                f"the recipe was made for the schedule {self.schedule.get('name')!r}, the model has "
                f"{schedule.name!r}; to use it all the same: force=True (--force)"
            )
        if self.plan is not None:
            self.plan.check_schedule(schedule)
            return self.plan
        return planned(schedule, self.request(), integer_times=integer_times).plan

    def request(self) -> SamplerRequest:
        """Returns the request of this recipe of a solver."""
        return SamplerRequest(
            self.name,
            nfe=self.nfe,
            grid=self.grid,
            head_start=self.head_start,
            options=self.options,
        )

    def build(self, denoiser: Denoiser, *, force: bool = False) -> Sampler:
        """Returns the sampler for a model.

        Arguments:
            denoiser: The model.
            force: Whether to use it although it was made for another model or schedule.

        Raises:
            ValueError: If it was made for another model or schedule.
        """
        if self.model is not None and not force and not matches(denoiser, self.model):
            raise ValueError(
                f"the recipe {self.name!r} was made for another model (fingerprint "
                f"{self.model[:12]}…); tune one for this model, or use it all the same: "
                "force=True (--force)"
            )
        if self.guidance is not None and self.guidance != 1 and not isinstance(denoiser, Guided):
            denoiser = Guided(denoiser, self.guidance)
        if self.kind == "operator":
            own = denoiser.built_in_sampler()
            if own is None:
                raise ValueError(
                    "the recipe is for a model with a built-in sampler; this one has none"
                )
            return own.configured(own.nfe if self.nfe is None else self.nfe, **self.options)
        if self.kind == "adaptive":
            from fewstep.sampling.adaptive import AdaptiveSampler

            return AdaptiveSampler(denoiser, **self.options)
        integer = denoiser.integer_times
        plan = self._plan_for(denoiser.schedule, integer_times=integer, force=force)
        return PlanSampler(plan, denoiser, residual=self.residual)

    def _record(self, residual: dict[str, Any] | None) -> RecipeRecord:
        return RecipeRecord(
            kind=self.kind,
            name=self.name,
            nfe=self.nfe,
            grid=self.grid,
            head_start=self.head_start,
            guidance=self.guidance,
            model=self.model,
            options=dict(self.options),
            schedule=None if self.schedule is None else dict(self.schedule),
            about=dict(self.about),
            plan=None if self.plan is None else self.plan.to_record(),
            residual=residual,
        )

    def to_record(self) -> dict[str, Any]:
        """Returns the recipe as a JSON object; a residual is a text in it."""
        return self._record(
            None if self.residual is None else self.residual.to_record()
        ).to_record()

    @classmethod
    def from_record(cls, content: Any, *, folder: Path | None = None) -> SamplerRecipe:
        """Returns the recipe of a JSON object; a plan is a recipe of kind ``"plan"``.

        Arguments:
            content: The object.
            folder: The folder of its file, in which that of a residual is.

        Raises:
            ValueError: If it is not a recipe; the message has the reason.
        """
        if isinstance(content, dict) and content.get("format") == PlanRecord.FORMAT:
            plan = Plan.from_record(content)
            return cls(kind="plan", name=plan.name, plan=plan)
        record = RecipeRecord.from_record(content)
        return cls(
            kind=record.kind or "solver",
            name="auto" if record.name is None else record.name,
            nfe=record.nfe,
            options=record.options,
            grid=record.grid,
            head_start=record.head_start,
            schedule=record.schedule,
            plan=None if record.plan is None else Plan.from_record(record.plan),
            guidance=record.guidance,
            model=record.model,
            about=record.about,
            residual=None
            if record.residual is None
            else Residual.from_record(record.residual, folder),
        )

    def to_json(self) -> str:
        """Returns the recipe as JSON text."""
        return json.dumps(self.to_record(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> SamplerRecipe:
        """Returns the recipe of JSON text; raises as :meth:`from_record`."""
        return cls.from_record(loads_json(text, what="the recipe"))

    def save(self, path: str | Path) -> Path:
        """Writes the recipe, atomically and with a checksum; returns the path.

        A residual is written first, beside it: ``tuned.json`` has ``tuned.residual.safetensors``.
        """
        check_path(path, "path")
        residual = None
        if self.residual is not None:
            residual = self.residual.save(Path(path).with_suffix(".residual.safetensors"))
        return self._record(residual).save(path)

    @classmethod
    def load(cls, path: str | Path) -> SamplerRecipe:
        """Reads a recipe or a plan from a file.

        Raises:
            ValueError: If the file is missing or damaged, or holds neither.
        """
        content = read_json(path, what="recipe")
        try:
            return cls.from_record(content, folder=Path(path).parent)
        except (ValueError, TypeError) as error:
            raise ValueError(f"recipe {str(path)!r}: {error}") from None


def recipe_of(schedule: NoiseSchedule, planned: Planned) -> SamplerRecipe:
    """Returns the recipe of a plan: by names if they determine it, else with its coefficients."""
    if planned.name is None:
        return SamplerRecipe(kind="plan", name=planned.plan.name, plan=planned.plan)
    return SamplerRecipe(
        name=planned.name,
        nfe=planned.plan.nfe,
        options=planned.options,
        grid=planned.grid_name,
        head_start=planned.head_start,
        schedule=schedule.to_record(),
    )


def _for_schedule(plan: Plan, schedule: NoiseSchedule) -> Plan:
    """Returns a plan with its numbers for another schedule, without a check of the result."""
    top = float(plan.times.max())
    if not schedule.t_zero < float(plan.times.min()) <= top <= schedule.t_max * (1 + 1e-9):
        raise ValueError(
            f"the plan evaluates the network at times up to {top:g}, the schedule {schedule.name!r} has "
            f"{schedule.t_min:g} to {schedule.t_max:g}: it cannot be forced onto it"
        )
    return replace(plan, schedule=schedule)
