"""PlanScheduler in a server that runs requests step by step: vLLM-Omni's contract of step execution.

As its pipelines do, a request sets its timesteps on the scheduler that all share, copies it (``copy.deepcopy``) and
steps its copy among the steps of other requests, with the timesteps of the original.
"""

from __future__ import annotations

import copy
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: E402

from fewstep.adapters.diffusers import PlanScheduler  # noqa: E402
from other_device import OTHER, Waits, other_device  # noqa: E402

SHAPE = (1, 16, 8)
THEIRS = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def scheduler(solver: str) -> Any:
    return PlanScheduler.from_config(THEIRS.config, solver=solver)


@dataclass
class State:
    """The state of a request, as the server's."""

    seed: int
    steps: int
    latents: torch.Tensor = field(init=False)
    timesteps: Any = None
    scheduler: Any = None
    step_index: int = 0

    @property
    def current_timestep(self):
        return self.timesteps[self.step_index]

    @property
    def denoise_completed(self):
        return self.step_index >= len(self.timesteps)


class Pipeline:
    """The parts of a pipeline of the server that meet its scheduler."""

    def __init__(self, scheduler, device="cpu"):
        self.scheduler, self.device = scheduler, device

    def prepare_encode(self, state):
        generator = torch.Generator().manual_seed(state.seed)
        state.latents = torch.randn(SHAPE, generator=generator).to(self.device)
        sigmas = torch.linspace(1.0, 1 / state.steps, state.steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=0.7)
        state.timesteps = self.scheduler.timesteps
        self.scheduler.set_begin_index(0)
        state.scheduler = copy.deepcopy(self.scheduler)
        return state

    def denoise_step(self, state):
        t = state.current_timestep.expand(len(state.latents)) / 1000
        return torch.tanh(state.latents) * (1 + t[:, None, None])

    def step_scheduler(self, state, noise_pred):
        state.latents = state.scheduler.step(
            noise_pred, state.current_timestep, state.latents, return_dict=False
        )[0]
        state.step_index += 1

    def forward(self, state):
        """A request by itself, on the shared scheduler."""
        self.prepare_encode(state)
        for t in state.timesteps:
            output = self.denoise_step(state)
            state.latents = self.scheduler.step(output, t, state.latents, return_dict=False)[0]
            state.step_index += 1
        return state.latents


def requests():
    return [State(seed, steps) for seed, steps in ((0, 4), (1, 6), (2, 4))]


@pytest.mark.parametrize("solver", ["ddim", "unipc3", "dpmpp-2m", "heun"])
def test_requests_step_side_by_side(solver):
    alone = [Pipeline(scheduler(solver)).forward(state) for state in requests()]
    pipeline, states = Pipeline(scheduler(solver)), requests()
    for state in states:
        pipeline.prepare_encode(state)
    while running := [state for state in states if not state.denoise_completed]:
        for state in reversed(running):
            pipeline.step_scheduler(state, pipeline.denoise_step(state))
    for state, wanted in zip(states, alone, strict=True):
        assert torch.equal(state.latents, wanted)


def test_the_custom_pipeline_of_the_page():
    """The class that docs/diffusers.md mixes into a pipeline, made with the keywords of the server's custom pipelines."""
    page = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (source,) = (block for block in blocks if "class WithFewstep" in block)
    names: dict[str, Any] = {}
    exec(compile(source, "docs/diffusers.md", "exec"), names)

    class Theirs(Pipeline):
        def __init__(self, *, od_config, prefix=""):
            super().__init__(THEIRS)

    class Custom(names["WithFewstep"], Theirs):
        pass

    got = Custom(od_config=None, prefix="").forward(State(3, 4))
    assert torch.equal(got, Pipeline(scheduler("unipc3")).forward(State(3, 4)))


def test_ddim_is_their_scheduler():
    """Euler's steps in time of a flow are those of DDIM."""
    ours, theirs = (Pipeline(s).forward(State(0, 5)) for s in (scheduler("ddim"), THEIRS))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_request_is_handed_to_another_thread_at_any_step():
    pipeline, state = Pipeline(scheduler("unipc3")), State(0, 6)
    wanted = Pipeline(scheduler("unipc3")).forward(State(0, 6))
    pipeline.prepare_encode(state)
    while not state.denoise_completed:
        with ThreadPoolExecutor(1) as other:  # a new thread
            output = pipeline.denoise_step(state)
            other.submit(pipeline.step_scheduler, state, output).result()
            state.scheduler = other.submit(copy.deepcopy, state.scheduler).result()
    assert torch.equal(state.latents, wanted)


def test_many_requests_in_threads():
    pipeline = Pipeline(scheduler("unipc3"))
    wanted = [Pipeline(scheduler("unipc3")).forward(State(seed, 5)) for seed in range(8)]

    def serve(seed):
        state = pipeline.prepare_encode(State(seed, 5))
        while not state.denoise_completed:
            pipeline.step_scheduler(state, pipeline.denoise_step(state))
        return state.latents

    with ThreadPoolExecutor(8) as threads:
        served = list(threads.map(serve, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(served, wanted, strict=True))


def test_a_copy_before_any_timesteps_is_as_new():
    shared = scheduler("unipc3")
    states = [State(0, 4), State(0, 4)]
    first, second = (
        Pipeline(s).forward(state)
        for s, state in zip((shared, copy.deepcopy(shared)), states, strict=True)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("solver", ["ddim", "unipc3", "dpmpp-2m"])
def test_no_step_waits_for_the_device(solver):
    waits = Waits()
    with other_device(), waits:
        pipeline = Pipeline(scheduler(solver), OTHER)
        states = [pipeline.prepare_encode(state) for state in requests()[:2]]
        waits.events.clear()
        while running := [state for state in states if not state.denoise_completed]:
            for state in running:
                pipeline.step_scheduler(state, pipeline.denoise_step(state))
    assert waits.events == []
