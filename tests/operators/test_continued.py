"""An operator up to a frame and a solver from there: states, budgets, refusals, the command."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep.operators import DistillRecipe, OperatorModel, continued
from fewstep.operators.students import make_student
from tiny_trajectories import record, teacher

LABELS = {"class_labels": torch.tensor([0, 1, 2])}


@pytest.fixture(scope="module")
def times(model):
    return record(model, n=1).times.tolist()


def student_of(model, times, mode, **about):
    made = make_student(model, DistillRecipe(mode=mode), times).eval()
    return OperatorModel(made, about={"training": {"teacher": model.fingerprint(), **about}})


@pytest.mark.parametrize("mode", ["dsno", "flow-map"])
def test_the_solver_begins_at_the_frame(mode, model, times):
    """The samples are those of the solver, started at the operator's state."""
    student = student_of(model, times, mode)
    made = fewstep.sample(
        continued(student, model, 2, solver="unipc2"), 3, nfe=4, save="states", **LABELS
    )
    assert made.nfe == 4
    assert made.states.shape == (5, 3, 1, 8, 8)  # x_T, the frame, and three steps
    assert made.times[:2].tolist() == [times[0], times[2]]
    with torch.no_grad():
        if mode == "dsno":
            state = student.operator(made.states[0], **LABELS)[:, 1]
        else:
            state = student.operator.step(made.states[0], 0, 2, **LABELS)
    torch.testing.assert_close(made.states[1], state)
    sampler = fewstep.resolve(model, fewstep.SamplerRequest("unipc2", 3, options={"t_start": times[2]})).sampler  # fmt: skip
    noise = fewstep.diffusion.noise.NoiseSource(0, range(3))
    run = fewstep.sampling.protocol.Run(noise, model.prepare(3, LABELS))
    torch.testing.assert_close(made.x, sampler.run(state, run).x)


def test_an_untrained_flow_map_continues_as_ddim(model, times):
    """One step of DDIM to the knot, and DDIM from there, are DDIM on that grid."""
    both = continued(student_of(model, times, "flow-map"), model, 1, solver="ddim")
    grid = fewstep.grid("explicit", model.schedule, 2, times=[times[0], times[1], model.schedule.t_min])  # fmt: skip
    expected = fewstep.sample(model, 3, solver="ddim", grid=grid, **LABELS)
    made = fewstep.sample(both, 3, nfe=2, **LABELS)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_the_solver_begins_at_the_frame_s_present_time(model, times):
    """Frames that were set after training: the solver starts at their times, not at the first ones."""
    student = student_of(model, times, "dsno")
    student.operator.set_times([times[1], times[-1]])
    made = fewstep.sample(
        continued(student, model, 1, solver="ddim"), 3, nfe=2, save="states", **LABELS
    )
    assert made.times[1].item() == times[1]
    with pytest.raises(ValueError, match="from 1 to 1, got 2"):
        continued(student, model, 2)


def test_the_smallest_budget_is_the_solver_s(model, times):
    student = student_of(model, times, "dsno")
    assert continued(student, model, 1, solver="ddim").built_in_sampler().nfe == 2
    assert continued(student, model, 1, solver="rho-rk4").built_in_sampler().nfe == 5
    with pytest.raises(ValueError, match="of 2 to 1000 evaluations and cannot use another"):
        fewstep.sample(continued(student, model, 1), 2, solver="ddim")
    with pytest.raises(ValueError, match="leave nfe=1 out"):
        fewstep.sample(continued(student, model, 1), 2, nfe=1)
    one, two = (continued(student, model, k).fingerprint() for k in (1, 2))
    assert one != two


def test_what_is_refused(model, times):
    student = student_of(model, times, "dsno")
    for frame in (0, 4, True, 1.0):
        with pytest.raises(ValueError, match=r"the frames to continue from are from 1 to 3, got"):
            continued(student, model, frame)
    with pytest.raises(ValueError, match="are none: it returns the sample alone, got 1"):
        continued(student_of(model, times, "endpoint"), model, 1)
    with pytest.raises(TypeError, match="only an operator has frames"):
        continued(model, model, 1)
    with pytest.raises(TypeError, match="the teacher is a model for solvers"):
        continued(student, student, 1)
    with pytest.raises(ValueError, match="distilled from another model"):
        continued(student, teacher(seed=1), 1)
    assert continued(student, teacher(seed=1), 1, force=True).frame == 1
    with pytest.raises(ValueError, match="Did you mean 'unipc3'"):
        continued(student, model, 1, solver="unipc33")


def test_recorded_guidance_is_part_of_the_teacher(model, times):
    student = student_of(model, times, "dsno", guidance=2.0)
    assert continued(student, model, 1).teacher.scale == 2.0
    plain = student_of(model, times, "dsno", guidance=None)
    assert continued(plain, model, 1).teacher is model
