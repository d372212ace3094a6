"""The runs of a PlanScheduler: planning, stepping, and the position of this thread's run."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fewstep.adapters.diffusers.arguments import clip, number, numbers
from fewstep.adapters.diffusers.configurations import PREDICTIONS
from fewstep.adapters.diffusers.keys import SETTING, STEPPING, check_arguments
from fewstep.adapters.diffusers.runs import PerThread, Run, Setup, Setups, place
from fewstep.adapters.diffusers.setups import Planner, Request
from fewstep.adapters.diffusers.spacing import distilled_times
from fewstep.adapters.diffusers.stages import StagedTimesteps, starts
from fewstep.diffusion.prediction import Prediction, coefficients
from fewstep.diffusion.schedules import Flow, NoiseSchedule
from fewstep.plans.execute import Execution
from fewstep.plans.plan import Plan
from fewstep.sampling.recipe import SamplerRecipe

NOT_GIVEN: Any = object()
"""The value of an argument that was not given, where ``None`` has a meaning."""


_CHANGE = threading.Lock()


class Stepping:
    """``set_timesteps`` and ``step``, with the state of a run kept per thread."""

    schedule: NoiseSchedule
    alphas_cumprod: Tensor
    _recipe: SamplerRecipe | None
    _initial: tuple[Tensor, Tensor]

    if TYPE_CHECKING:

        @property
        def config(self) -> Any:
            """That of diffusers' ConfigMixin: a dict."""

    def _reset(self, timesteps: Tensor, sigmas: Tensor) -> None:
        """Resets the state to that before any run."""
        self._initial = (timesteps, sigmas)
        self._setups = Setups()
        self._latest: tuple[Setup, Tensor, Tensor] | None = None
        self._runs = PerThread()
        self._begun: frozenset[int] = frozenset()

    def _run(self) -> Run:
        run = self._runs.run
        if run is None:
            seed = self.config["noise_seed"]
            run = Run(*(self._latest or (None, *self._initial)), noise_seed=seed)
            self._runs.run = run
        return run

    def __copy__(self) -> Any:
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone._runs = copy.deepcopy(self._runs)
        return clone

    # Planning.

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = NOT_GIVEN,
        strength: float = 1.0,
        **others: Any,
    ) -> None:
        r"""Plans a run, for this thread.

        Arguments:
            num_inference_steps: The number of steps (see the class).
            device: The device of ``timesteps``.
            timesteps: The times at which steps begin, decreasing, instead.
            sigmas: The levels at which steps begin, instead: :math:`\sigma / \alpha`, for flow
                models :math:`\sigma` before the shift. A last 0 is the end. With ``timesteps``,
                those are the conditioning timesteps.
            mu: The shift of flow levels, with ``use_dynamic_shifting``.
            original_inference_steps: The number of times at which the network was distilled, among which the
                steps are chosen (latent consistency models); left out, that of the configuration.
            strength: With those: the share of them, from the lowest on, that is used (image to image).
            others: Arguments of other schedulers; refused by name, unless they are ``None``.

        Raises:
            ValueError: If there is no such plan; the message says how to fix it.
        """
        check_arguments("set_timesteps", others, SETTING)
        if timesteps is None and sigmas is None:
            if num_inference_steps is None:
                raise ValueError("give num_inference_steps, timesteps or sigmas")
            n = num_inference_steps
            if isinstance(n, bool) or int(n) != n or n < 1:
                raise ValueError(f"num_inference_steps must be a positive integer, got {n!r}")
            num_inference_steps = int(n)
        asks_data = original_inference_steps is not NOT_GIVEN
        original_inference_steps = original_inference_steps if asks_data else None
        arguments = Request(
            num_inference_steps,
            numbers("timesteps", timesteps),
            numbers("sigmas", sigmas),
            number("mu", mu) if self.config["use_dynamic_shifting"] and mu is not None else None,
            distilled_times(self.config, original_inference_steps, strength),
        )
        # Pipelines may change these in the configuration after the making.
        now = tuple(self.config[k] for k in ("steps_offset", "clip_sample", "thresholding"))
        key = (arguments, now, str(device))
        latest = self._setups.get(key, lambda: self._tensors(arguments, now, device))
        self._latest = latest
        before = self._runs.run
        self._runs.run = Run(*latest, noise_seed=self.config["noise_seed"])
        # Pipelines of latent consistency models, which always say the first, and of one step read the
        # predicted data as well.
        self._runs.run.returns_data = asks_data or len(latest[1]) == 1
        if before is not None:
            with _CHANGE:
                self._begun = self._begun - {before.number}

    def _tensors(self, arguments: Request, now: Any, device: Any) -> tuple[Setup, Tensor, Tensor]:
        """Returns a setup, its conditioning timesteps on a device, and its levels."""
        setup = self._setups.get((arguments, now), lambda: self._planner().setup(arguments))
        values = torch.tensor(setup.conditioning, dtype=torch.float64)
        whole = self.schedule.discrete and bool((values == values.round()).all())
        conditioning = values.to(torch.int64 if whole else torch.float32).to(device)
        return setup, conditioning, self._levels(setup)

    def _planner(self) -> Planner:
        return Planner(self.config, self.schedule, self.alphas_cumprod, self._recipe)

    def _levels(self, setup: Setup) -> Tensor:
        ends = setup.plan.knots[-1:]
        times = torch.cat([setup.plan.times, ends])
        zero = setup.plan.ends_at_zero
        inner = times[:-1] if zero else times
        levels = inner if isinstance(self.schedule, Flow) else self.schedule.rho(inner)
        if zero:
            levels = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
        return levels.float()

    # The position of a run: attributes of the thread.

    @property
    def timesteps(self) -> Tensor:
        """The conditioning timestep of each evaluation, on the device given to :meth:`set_timesteps`."""
        run = self._run()
        if run.setup is None or torch.compiler.is_compiling():
            return run.timesteps
        if run.staged is None:
            run.staged = StagedTimesteps.of(run.timesteps, run.setup)
        return run.staged

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        run = self._run()  # some pipelines put them back in another type
        if run.setup is None or value.shape != run.timesteps.shape:
            raise ValueError(
                "timesteps cannot be exchanged, as the plan belongs to them; "
                "call set_timesteps(timesteps=[...])"
            )
        run.keep(value)

    @property
    def sigmas(self) -> Tensor:
        r"""The levels :math:`\sigma / \alpha` (of a flow: :math:`\sigma`) at the evaluations and at the end, float32."""
        return self._run().sigmas

    @property
    def num_inference_steps(self) -> int | None:
        """The number of entries of ``timesteps``, once they are set."""
        run = self._run()
        return None if run.setup is None else len(run.timesteps)

    @property
    def plan(self) -> Plan | None:
        """The plan of this thread's run (or of the next, if it has not begun)."""
        active = self._run().active
        return None if active is None else active.plan

    @property
    def step_index(self) -> int | None:
        """The index in ``timesteps`` of the next step, once a run has begun."""
        return self._run().step_index

    @property
    def _step_index(self) -> int | None:
        return self.step_index

    @_step_index.setter
    def _step_index(self, value: int | None) -> None:
        if value is not None:
            raise ValueError(
                "a run cannot be moved; use set_begin_index before it, or set_timesteps"
            )
        self._run().rewind()

    @property
    def begin_index(self) -> int | None:
        """The index at which a run begins; ``None`` if its first timestep says so."""
        return self._run().begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index in ``timesteps`` at which the next run begins."""
        run = self._run()
        if run.setup is not None and begin_index:
            self._rest(run.setup, begin_index, None, 0.0)  # refused before any evaluation
        run.begin_index = begin_index
        run.rewind()

    def index_for_timestep(
        self, timestep: Tensor | float, schedule_timesteps: Tensor | None = None
    ) -> int:
        """Returns the index at which a step at this timestep begins, the last one if there is none."""
        conditioning = (
            self.timesteps if schedule_timesteps is None else schedule_timesteps
        ).tolist()
        setup = self._run().setup
        places = [i for i, t in enumerate(conditioning) if abs(t - float(timestep)) < 1e-3]
        if schedule_timesteps is None and setup is not None:
            places = [i for i in places if starts(setup, i)] or places
        return places[0] if places else len(conditioning) - 1

    def previous_timestep(self, timestep: Tensor | float) -> Any:
        """Returns the timestep after this one on the grid (-1 at the end), or one less before planning."""
        run = self._run()
        if run.setup is None:
            return timestep - 1
        later = [t for t in run.setup.conditioning if t < float(timestep) - 1e-3]
        return torch.tensor(later[0] if later else -1.0).to(run.timesteps.dtype)

    # Sampling.

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        prev_timestep: Tensor | float | None = None,
        **others: Any,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        r"""Takes the network's prediction and returns the next input of the network, or the sample.

        Arguments:
            model_output: The network's prediction at ``sample``. Of twice as many channels, the second
                half is a learned variance and is dropped.
            timestep: The entry of ``timesteps`` at which it was made.
            sample: The state, as the last step returned it or as it was edited since.
            eta: The option of the solver ``ddim``, from the first step of a run on.
            use_clipped_model_output: With clipping on and the solver ``ddim``: whether the noise too
                follows from the clipped data. As in diffusers it does not, unless asked; all other
                solvers know the data only, so that it does.
            generator: Draws the noise of stochastic solvers; one, or one a sample. Left out (Flux and
                other flow pipelines pass none) ``noise_seed`` of the configuration seeds the draws of
                a run, or they come from torch's global generator.
            variance_noise: That noise itself.
            return_dict: Whether to return an object with ``prev_sample``, or a tuple: of the next input; and, in a
                run of one step or with ``original_inference_steps``, of the predicted data.
            prev_timestep: The timestep after this one, as pipelines of unCLIP say it.
            others: Arguments of other schedulers; refused by name, unless they change nothing.

        Raises:
            ValueError: If the timestep is not the next of the run, or the state changes its shape in a
                way that the plan cannot follow.
        """
        if others:
            check_arguments("step", others, STEPPING)
        run = self._runs.run or self._run()
        execution = run.execution
        if execution is not None and not run.compiled and run.number not in self._begun:
            # Another view advanced what was copied from us before it began (panorama pipelines).
            run = self._runs.run = run.again()
            execution = None
        if execution is None or execution.request is None:
            execution = self._begin(run, timestep, sample, eta)
        else:
            if torch.compiler.is_compiling() or not run.expects(timestep):
                self._check_next(run, timestep)
            if sample is not run.sample:
                execution.replace_input(sample.to(run.dtype))
                if sample.shape != run.shape:
                    run.resize(sample)
        if prev_timestep is not None:
            self._check_previous(run, prev_timestep)
        data = self._data(run, execution, model_output) if run.returns_data else None
        if not run.plain or model_output.numel() != run.size or model_output.dtype != run.dtype:
            run.generator, run.variance_noise, run.like = generator, variance_noise, model_output
            execution.advance(
                self._prediction(run, execution, model_output, use_clipped_model_output)
            )
        else:
            execution.advance(model_output)
        run.step_index += 1  # type: ignore[operator]
        call = execution.request
        previous = execution.result if call is None else call.x
        if sample.dtype != run.dtype:
            previous = previous.to(sample.dtype)
        run.sample = previous
        if not return_dict:
            return (previous,) if data is None else (previous, data.to(sample.dtype))
        return SchedulerOutput(prev_sample=previous)

    def _data(self, run: Run, execution: Execution, output: Tensor) -> Tensor:
        """Returns the data that the network predicts, clipped if the configuration asks for it."""
        assert execution.request is not None
        assert run.active is not None
        x = execution.request.x
        index = run.step_index - run.offset  # type: ignore[operator]
        if run.active.to_data is not None:
            shift, factor = run.active.to_data[index]
        else:
            alpha, sigma = run.active.plan.scales[index]
            native = PREDICTIONS[self.config["prediction_type"]]
            maps = coefficients(native, Prediction.X0, alpha=alpha, sigma=sigma)
            shift, factor = map(float, maps)
        data = shift * x + factor * output[:, : x.shape[1]].to(run.dtype)
        return data if run.active.to_data is None else clip(self.config, data)

    def _check_previous(self, run: Run, given: Tensor | float) -> None:
        """Refuses another next timestep than the plan's."""
        index = run.step_index + 1  # type: ignore[operator]
        following = float(run.timesteps[index]) if index < len(run.timesteps) else -1.0
        if abs(float(given) - following) > 1e-3 * max(1.0, abs(following)):
            raise ValueError(
                f"step {run.step_index} of this run ends at timestep {following:g}, got prev_timestep={float(given):g}; "
                "leave prev_timestep out, or give the timesteps to set_timesteps"
            )

    def _prediction(
        self, run: Run, execution: Execution, output: Tensor, noise_too: bool
    ) -> Tensor:
        """Returns the network's prediction as the plan reads it."""
        assert execution.request is not None
        assert run.active is not None
        x = execution.request.x
        if output.numel() == 2 * run.size:  # cheaper than comparing the shapes
            output = output[:, : x.shape[1]]  # the rest is a learned variance
        if output.dtype != run.dtype:
            output = output.to(run.dtype)
        maps = run.active.to_data
        index = run.step_index - run.offset  # type: ignore[operator]
        if run.correct is not None:
            output = run.correct(index, x, output)
        if maps is None:
            return output
        shift, factor = maps[index]
        data = torch.mul(output, factor).add_(x, alpha=shift)
        clipped = clip(self.config, data)
        if run.active.alphas is not None and not noise_too:
            # The state that has the clipped data and the predicted noise as it is.
            execution.replace_input(torch.add(x, clipped - data, alpha=run.active.alphas[index]))
        return clipped

    def _begin(self, run: Run, timestep: Tensor | float, sample: Tensor, eta: float) -> Execution:
        full = run.setup
        if full is None:
            raise ValueError("the scheduler has no timesteps yet: call set_timesteps first")
        conditioning = None
        index = run.begin_index
        if index is None or run.step_index is not None:  # a run after a finished one finds its own
            index, conditioning = self._find(run, full, timestep)
        if not 0 <= index < len(run.timesteps):
            raise ValueError(
                f"a run begins at an index from 0 to {len(run.timesteps) - 1}, got {index}"
            )
        setup = full
        if index or conditioning is not None or eta:
            setup = self._rest(full, index, conditioning, eta)
        if torch.compiler.is_compiling():
            run.compiled = True
        else:
            with _CHANGE:  # threads of one scheduler begin side by side
                self._begun = self._begun | {run.number}
        return run.begin(setup, sample)

    def _rest(self, full: Setup, index: int, conditioning: float | None, eta: float) -> Setup:
        """Returns the setup from an index on, or from a time between two; planned once."""
        key = (full.plan, index, conditioning, float(eta))
        return self._setups.get(key, lambda: self._planner().rest(full, index, conditioning, eta))

    @staticmethod
    def _find(run: Run, setup: Setup, timestep: Tensor | float) -> tuple[int, float | None]:
        """Returns the index of a first timestep, or the first index below it and the time itself."""
        if (
            isinstance(timestep, Tensor)
            and (position := place(timestep, run.timesteps)) is not None
        ):
            return position, None
        value = float(timestep)
        for index, conditioning in enumerate(setup.conditioning):
            if abs(conditioning - value) < 1e-3 and starts(setup, index):
                return index, None
        return 0, value

    @staticmethod
    def _check_next(run: Run, timestep: Tensor | float) -> None:
        if torch.compiler.is_compiling():
            return
        if isinstance(timestep, Tensor):
            index = place(timestep, run.timesteps)
            if index == run.step_index or (index is None and timestep.device.type != "cpu"):
                return
        conditioning = run.conditioning()
        if abs(float(timestep) - conditioning) > 1e-3 * max(1.0, abs(conditioning)):
            raise ValueError(
                f"step {run.step_index} of this run is at timestep {conditioning:g}, got "
                f"{float(timestep):g}; call set_timesteps before each run"
            )
