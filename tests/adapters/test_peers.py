"""Schedulers of diffusers on our denoisers: what they do is what they do in diffusers' own loop."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.models import exact
from fewstep.sampling.protocol import Run
from fewstep.sampling.sample import sampler

diffusers = pytest.importorskip("diffusers")
from fewstep.adapters.diffusers import plan_from_scheduler  # noqa: E402
from fewstep.adapters.diffusers.fitting import scheduler_class  # noqa: E402
from fewstep.adapters.diffusers.peers import diffusers_sampler  # noqa: E402

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def _quiet():
    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def smooth():
    return exact.smooth(fewstep.schedule("ddpm-linear"))


def run(made, *, n=5, seed=3, first=0, save=False):
    source = NoiseSource(seed, range(first, first + n))
    z = source.draw(INITIAL, made.denoiser.event_shape)
    return made.run(made.start(z), Run(source, {}, save))


def rms(a, b):
    return float((a.double() - b.double()).square().mean().sqrt())


PEERS = [
    ("DDIM", 8, 8, {}),
    ("DEIS", 8, 8, {"solver_order": 3}),
    ("DPMSolverMultistep", 8, 8, {"use_karras_sigmas": True}),
    ("UniPC", 8, 8, {"solver_order": 3}),
    ("Heun", 9, 5, {}),
    ("Euler", 8, 8, {"timestep_spacing": "trailing"}),
    ("LMS", 8, 8, {}),
    ("PNDM", 9, 8, {"skip_prk_steps": True}),
    ("PNDM", 19, 10, {}),
]


@pytest.mark.parametrize(("name", "nfe", "steps", "options"), PEERS)
def test_it_is_the_loop_of_diffusers(smooth, name, nfe, steps, options):
    """The loop as a user of diffusers writes it, with the class of the scheduler named in full."""
    peer = diffusers_sampler(smooth, name, nfe, **options)
    assert (peer.nfe, peer.steps) == (nfe, steps)
    own = {} if name != "DDIM" else {"clip_sample": False}
    scheduler = scheduler_class(name)(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **own, **options
    )
    scheduler.set_timesteps(steps)
    z = NoiseSource(3, range(5)).draw(INITIAL, (2,))
    x = z * scheduler.init_noise_sigma
    evaluations = 0
    for t in scheduler.timesteps:
        evaluations += 1
        y = scheduler.scale_model_input(x, t)
        x = scheduler.step(smooth(y, float(t)), t, x).prev_sample
    assert evaluations == nfe
    assert rms(run(peer).x, x) < 1e-4  # betas in float32, once from our table and once from theirs


def test_a_plan_of_the_same_scheduler_gives_the_same_samples(smooth):
    peer = diffusers_sampler(smooth, "DPMSolverMultistep", 7)
    plan = plan_from_scheduler(peer.scheduler, 7)
    z = NoiseSource(3, range(5)).draw(INITIAL, (2,))
    assert rms(run(peer).x, fewstep.sample(smooth, noise=z, plan=plan)) < 1e-4


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("DPMSolverMultistep", "vp-linear"),
        ("UniPC", "sub-vp"),
        ("DEIS", "ve"),
        ("UniPC", "edm"),
        ("EDMDPMSolver", "edm"),
        ("EDMDPMSolver", "vp-cosine"),
        ("DPMSolverMultistep", "flow"),
        ("FlowMatchHeun", "flow"),
        ("Heun", "vp-linear"),
    ],
)
def test_on_any_schedule_many_calls_come_to_the_same_end(name, family):
    """Other scales of the state and another meaning of time must all be converted for that."""
    peer = diffusers_sampler(exact.smooth(fewstep.schedule(family)), name, 101)
    z = NoiseSource(3, range(5)).draw(INITIAL, (2,)).double()
    end = fewstep.sample(peer.denoiser, noise=z, solver="tab3", nfe=200)
    # The end at sigma = 0 or at the lowest level, and the rounding of float32 tables, are between.
    assert rms(run(peer).x, end) < 0.012


def test_predictions_are_those_that_the_scheduler_asks_for(smooth):
    wanted = run(diffusers_sampler(smooth, "DDIM", 6)).x
    for kind in ("sample", "v_prediction"):
        peer = diffusers_sampler(smooth, "DDIM", 6, prediction_type=kind)
        assert rms(run(peer).x, wanted) < 1e-4


@pytest.mark.parametrize(
    ("name", "options"), [("DDPM", {}), ("DDIM", {"eta": 1.0}), ("EulerAncestral", {})]
)
def test_draws_belong_to_the_samples(smooth, name, options):
    peer = diffusers_sampler(smooth, name, 6, **options)
    whole = run(peer, n=6).x
    assert torch.equal(run(peer, n=2, first=3).x, whole[3:5])
    assert not torch.equal(run(peer, n=6, seed=4).x, whole)
    torch.manual_seed(99)  # nothing depends on the global generator
    assert torch.equal(run(peer, n=6).x, whole)


def test_eta_goes_to_the_step(smooth):
    still, moved = (run(diffusers_sampler(smooth, "DDIM", 6, eta=e)).x for e in (0.0, 1.0))
    assert rms(still, run(diffusers_sampler(smooth, "DDIM", 6)).x) == 0
    assert rms(still, moved) > 0.1


def test_saved_states_are_in_the_scale_of_the_model(smooth):
    saved = run(diffusers_sampler(smooth, "Euler", 40, timestep_spacing="trailing"), save=True)
    ours = sampler(smooth, solver="tab3", nfe=200)
    result = run(ours, save=True)
    assert len(saved.states) == len(saved.times) == 41
    assert saved.times[0] == 999
    place = int((result.times - saved.times[20]).abs().argmin())
    assert abs(float(result.times[place] - saved.times[20])) < 4
    assert rms(result.states[place], saved.states[20]) < 0.02


def test_budgets_that_cannot_be_met_name_the_nearest(smooth):
    with pytest.raises(
        ValueError, match="HeunDiscreteScheduler cannot make 10 network evaluations"
    ):
        diffusers_sampler(smooth, "Heun", 10)
    with pytest.raises(ValueError, match="nearest numbers are 9 or 11"):
        diffusers_sampler(smooth, "Heun", 10)
    with pytest.raises(ValueError, match="nfe must be a positive integer, got 0"):
        diffusers_sampler(smooth, "DDIM", 0)


def test_wrong_names_and_options(smooth):
    with pytest.raises(ValueError, match=r"'UniPCC'. Did you mean 'UniPC'"):
        diffusers_sampler(smooth, "UniPCC", 5)
    with pytest.raises(TypeError, match="DDIMScheduler has no option 'order'"):
        diffusers_sampler(smooth, "DDIM", 5, order=3)
    with pytest.raises(
        ValueError, match="DEISMultistepScheduler cannot be made: solver type nothing"
    ):
        diffusers_sampler(smooth, "DEIS", 5, solver_type="nothing")
    with pytest.raises(ValueError, match="needs a flow model"):
        diffusers_sampler(smooth, "FlowMatchEuler", 5)
    with pytest.raises(ValueError, match="changes the noise levels"):
        diffusers_sampler(smooth, "CogVideoXDDIM", 5)
    with pytest.raises(ValueError, match="does not step from noise to data"):
        diffusers_sampler(smooth, "DDIMInverse", 5)
    flow = exact.smooth(fewstep.schedule("flow"))
    with pytest.raises(ValueError, match="does not know flow models"):
        diffusers_sampler(flow, "PNDM", 5)


def test_a_sample_that_is_not_finite_is_an_error(smooth):
    broken = fewstep.Denoiser.wrap(
        lambda x, t: x * float("nan"),
        schedule=smooth.schedule,
        prediction="eps",
        event_shape=(2,),
    )
    with pytest.raises(
        ValueError, match="DDIMScheduler with 3 evaluations returns NaN or infinity"
    ):
        run(diffusers_sampler(broken, "DDIM", 3))
