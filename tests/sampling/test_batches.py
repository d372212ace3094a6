"""The loop over numbered samples."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.models import exact
from fewstep.sampling.batches import initial_noise, run_batches
from fewstep.sampling.plan_sampler import PlanSampler

SCHEDULE = fewstep.schedule("vp-linear")
MODEL = exact.GaussianMixture([[1.0, -1.0], [-1.0, 1.0]], [0.3, 0.2], [0.4, 0.6], SCHEDULE)
SAMPLER = PlanSampler(fewstep.plan("ddim", SCHEDULE, nfe=3), MODEL)


class Counter:
    def __init__(self):
        self.count = 0

    def stage(self, name, total=None, *, done=0):
        pass

    def tick(self, amount=1, note=""):
        self.count += amount


def joined(rows, **options):
    return torch.cat([done.x for _, done in run_batches(SAMPLER, rows, **options)])


def test_a_sample_depends_on_its_number_alone():
    everything = joined(7, seed=3)
    assert torch.equal(everything, fewstep.sample(MODEL, 7, plan=SAMPLER.plan, seed=3))
    torch.testing.assert_close(joined(7, seed=3, batch_size=2), everything)
    torch.testing.assert_close(joined([5, 0, 2], seed=3, batch_size=2), everything[[5, 0, 2]])


def test_batches_carry_their_numbers_and_progress():
    progress = Counter()
    sizes = [list(rows) for rows, _ in run_batches(SAMPLER, 5, batch_size=2, progress=progress)]
    assert sizes == [[0, 1], [2, 3], [4]]
    assert progress.count == 3 * SAMPLER.nfe


def test_noise_and_image_are_in_the_order_of_the_rows():
    noise, image = torch.randn(4, 2), torch.randn(4, 2)
    at_once = joined(range(10, 14), noise=noise, image=image)
    torch.testing.assert_close(
        joined(range(10, 14), noise=noise, image=image, batch_size=3), at_once
    )
    assert not torch.allclose(at_once, joined(range(10, 14), noise=noise))


def test_conditions_are_asked_for_by_number():
    class Labels:
        def at(self, rows):
            return {"label": torch.tensor([10.0 * i for i in rows])}

    model = fewstep.Denoiser.wrap(
        lambda x, t, label: label[:, None] + 0 * x,
        schedule=SCHEDULE,
        prediction="x0",
        event_shape=(2,),
    )
    result = PlanSampler(
        fewstep.plan("ddim", SCHEDULE, nfe=2, grid="uniform", to_zero=True), model
    )
    x = torch.cat([done.x for _, done in run_batches(result, [3, 1, 2], conditions=Labels())])
    torch.testing.assert_close(x[:, 0], torch.tensor([30.0, 10.0, 20.0]))


def test_the_initial_state_can_be_adjusted_and_states_kept():
    times = SAMPLER.plan.knots[[0, -1]].tolist()
    (_, done), *_ = run_batches(
        SAMPLER, 2, adjust=lambda x, rows: torch.zeros_like(x), save=True, times=times
    )
    assert done.states is not None
    assert done.states.shape == (2, 2, 2)
    assert not done.states[0].any()


def test_initial_noise_is_that_of_the_numbers():
    source = NoiseSource(4, [2, 9])
    assert torch.equal(initial_noise(MODEL, source), source.draw(INITIAL, (2,)))
    assert initial_noise(MODEL, source, dtype=torch.float64).dtype == torch.float64
    assert MODEL.device == torch.device("cpu")


class Operations(TorchDispatchMode):
    """Counts tensor operations, views apart."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = ("view", "expand", "select", "slice", "unbind", "detach", "alias")
        self.count += not any(word in str(func) for word in views)
        return func(*args, **(kwargs or {}))


COSTLY = (
    "accelerated-ddpm",
    "sa-solver",
    "er-sde",
    "dpmpp-3m-sde",
    "unipc3",
    "edm-stochastic",
    "ddim",
    "rho-heun",
)
"""Solvers with the most operations for each evaluation of their kinds; benchmarks/overhead.py counts for all."""


@pytest.mark.parametrize("image", [False, True])
def test_the_second_call_of_sample_costs_what_the_loop_costs(image):
    """At most 12 tensor operations for each evaluation and the network's one; a start from an image plans nothing anew."""
    model = fewstep.Denoiser.wrap(
        lambda x, t: x * 0.1,
        schedule=fewstep.schedule("ddpm-linear"),
        prediction="v",
        event_shape=(2,),
        data_mean=0.0,
        data_std=1.0,
    )
    start = {"image": torch.zeros(2), "strength": 0.5} if image else {}
    for name in COSTLY:
        method = fewstep.solvers.solver(name)
        zero = bool(method.default_grid[1].get("to_zero"))
        nfe = max(cost for k in range(1, 21) if (cost := method.nfe(k, ends_at_zero=zero)) <= 20)
        fewstep.sample(model, 1, solver=name, nfe=nfe, **start)
        with Operations() as operations:
            fewstep.sample(model, 1, solver=name, nfe=nfe, **start)
        assert operations.count <= 13 * nfe, name


class Limited(exact.GaussianMixture):
    """Out of memory above some samples, or once at an evaluation."""

    def __init__(self, most=10**9, at=None):
        super().__init__([[1.0, -1.0], [-1.0, 1.0]], [0.3, 0.2], [0.4, 0.6], SCHEDULE)
        self.most, self.at, self.count, self.sizes = most, at, 0, []

    def raw(self, x, t, **cond):
        self.count += 1
        self.sizes.append(len(x))
        if len(x) > self.most or self.count == self.at:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return super().raw(x, t, **cond)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dopri5"])
@pytest.mark.parametrize("limit", [{"most": 3}, {"most": 1}, {"at": 3}])
def test_out_of_memory_halves_the_batch_and_keeps_the_samples(solver, limit, caplog):
    options = {"solver": solver, "seed": 3, "save": "states", "batch_size": 6}
    options |= {"options": {"rtol": 1e-2}} if solver == "dopri5" else {"nfe": 4}
    model, progress = Limited(**limit), Counter()
    result = fewstep.sample(model, 10, progress=progress, **options)
    right = fewstep.sample(MODEL, 10, **options)
    tight = {"rtol": 1e-4, "atol": 1e-4} if solver == "dopri5" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(result.x, right.x, **tight)
    torch.testing.assert_close(result.states, right.states, **tight)
    assert "out of memory with 6 samples" in caplog.text
    if solver != "dopri5":
        assert progress.count == 2 * 4  # once an evaluation of a batch, however it was made
        assert result.nfe == right.nfe
    # Later batches begin with what fitted.
    assert max(model.sizes[-6:]) <= model.most
    assert model.sizes.count(6) <= (3 if "at" in limit else 1)


def test_halved_batches_begin_with_their_own_noise_and_image():
    noise, image = torch.randn(5, 2), torch.randn(5, 2)
    plan = fewstep.plan("ddim", SCHEDULE, nfe=3)
    runs = [
        fewstep.sample(model, noise=noise, image=image, strength=0.5, solver="ddim", nfe=3)
        for model in (MODEL, Limited(most=2))
    ]
    torch.testing.assert_close(*runs)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fewstep.sample(Limited(most=0), 4, plan=plan)
