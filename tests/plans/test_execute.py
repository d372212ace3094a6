"""The two executors: the same numbers, few operations, little memory, gradients, one compilation."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from fewstep.diffusion.noise import NoiseSource
from fewstep.diffusion.prediction import Prediction
from fewstep.models import exact
from fewstep.plans.execute import Execution, execute, functional
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Structure
from fewstep.sampling.binding import bind
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.protocol import Run

SCHEDULE = fewstep.schedule("vp-linear")
MODEL = exact.smooth(SCHEDULE)

WITH_PLANS = [name for name, build in fewstep.SOLVERS.items() if not build().adaptive]


def plan_of(name, nfe=6, schedule=SCHEDULE, **options):
    """The solver's plan at the first budget from ``nfe`` on that it can meet."""
    for budget in range(nfe, nfe + 12):
        try:
            return fewstep.plan(name, schedule, nfe=budget, **options)
        except ValueError as error:
            if "nearest" not in str(error):
                raise
    raise AssertionError(f"{name} meets no budget from {nfe} on")


def network_of(plan, model=MODEL):
    return lambda x, t: model(x, t, prediction=plan.prediction)


def noises(plan, shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(plan.n_noise)]


def start(n=3, dtype=torch.float64):
    return torch.randn((n, 2), generator=torch.Generator().manual_seed(0), dtype=dtype)


NETWORKS = {
    "exact": None,
    "identity": lambda x, t: x,
    "view": lambda x, t: x.view(-1, 2)[:],
    "reversed rows, a view of the input": lambda x, t: x.T.contiguous().T,
    "half the input": lambda x, t: 0.5 * x,
}


@pytest.mark.parametrize("name", WITH_PLANS)
def test_in_place_equals_functional(name):
    plan = plan_of(name)
    x, z = start(), noises(plan, (3, 2))
    before = x.clone()
    for network, function in NETWORKS.items():
        f = function or network_of(plan)
        ours = execute(plan, f, x, draw=z.__getitem__)
        theirs = functional(plan.structure, plan.values, plan.times, f, x, draw=z.__getitem__)
        assert torch.equal(x, before), network
        assert not torch.equal(theirs, x), network
        size = float(theirs.abs().max())
        torch.testing.assert_close(
            ours, theirs, rtol=1e-10, atol=1e-10 * size, msg=lambda m, n=network: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", WITH_PLANS)
def test_run_equals_flat_form(name):
    plan = plan_of(name)
    x, z = start(), noises(plan, (3, 2))
    inputs, outputs = [], []

    def f(x, t):
        inputs.append(x.clone())
        outputs.append(network_of(plan)(x, t))
        return outputs[-1]

    result = execute(plan, f, x, draw=z.__getitem__)
    flat = plan.flat()
    assert flat.B.shape == (plan.nfe + 1, plan.nfe)
    assert torch.equal(flat.B.tril(-1), flat.B)
    rows = torch.stack([*inputs, result])
    expected = torch.einsum("k,bd->kbd", flat.a, x) + torch.einsum(
        "kj,jbd->kbd", flat.B, torch.stack(outputs)
    )
    if z:
        expected = expected + torch.einsum("km,mbd->kbd", flat.C, torch.stack(z))
    # Terms of the flat form cancel, so its rounding is relative to the size of its weights.
    size = max(float(t.abs().max()) for t in flat if t.numel())
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-11 * max(1.0, size))


@pytest.mark.parametrize("name", WITH_PLANS)
def test_stepper_equals_sample(name):
    nfe = plan_of(name).nfe
    noise = start()
    whole = fewstep.sample(MODEL, solver=name, nfe=nfe, noise=noise, seed=3)
    followed = list(fewstep.steps(MODEL, solver=name, nfe=nfe, noise=noise, seed=3))
    assert torch.equal(followed[-1].x, whole)
    assert [step.index for step in followed] == list(range(len(followed)))
    times = [step.t for step in followed]
    assert times == sorted(times, reverse=True)
    trajectory = fewstep.sample(MODEL, solver=name, nfe=nfe, noise=noise, seed=3, save="states")
    assert torch.equal(torch.stack([step.x for step in followed]), trajectory.states[1:])
    assert torch.equal(trajectory.x, whole)


def test_step_has_both_predictions():
    """x = alpha x0 + sigma eps holds at the input of the evaluation."""
    noise = start()
    plan = plan_of("ddim")
    trajectory = fewstep.sample(MODEL, plan=plan, noise=noise, save="states")
    for k, step in enumerate(fewstep.steps(MODEL, plan=plan, noise=noise)):
        alpha, sigma = plan.scales[k]
        torch.testing.assert_close(alpha * step.x0 + sigma * step.eps, trajectory.states[k])
        torch.testing.assert_close(step.eps, MODEL(trajectory.states[k], plan.times[k]))


def test_callback_states_are_never_overwritten():
    plan = plan_of("rho-rk4", 12)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def on_state(knot, state):
        seen[knot] = (state, state.clone())

    execute(plan, network_of(plan), start(), on_state=on_state)
    assert sorted(seen) == [1, 2, 3]
    for state, copy in seen.values():
        assert torch.equal(state, copy)


def test_output_after_the_end_is_refused():
    plan = plan_of("ddim", 1)
    run = Execution(plan, start())
    run.advance(start())
    assert run.request is None
    with pytest.raises(RuntimeError, match="over"):
        run.advance(start())


def test_draws_need_a_source():
    plan = plan_of("ddpm")
    with pytest.raises(ValueError, match="6 times; give a source"):
        Execution(plan, start())
    with pytest.raises(ValueError, match="give a source"):
        functional(plan.structure, plan.values, plan.times, network_of(plan), start())


# Cost


class Tracker(TorchDispatchMode):
    """Counts operations that compute, views apart."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class Memory(TorchDispatchMode):
    """Follows the tensors of the state's size that are alive, by weak references to them."""

    def __init__(self, size):
        super().__init__()
        self.size, self.refs, self.most = size, [], 0

    def follow(self, tensor):
        if tensor.numel() == self.size:
            self.refs.append(weakref.ref(tensor))
        self.refs = [ref for ref in self.refs if ref() is not None]
        memories = {ref().untyped_storage().data_ptr() for ref in self.refs}
        self.most = max(self.most, len(memories))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.follow(out)
        return out


OPERATIONS = {"ddim": 4, "dpmpp-2m": 4, "tab3": 6, "unipc3": 10}


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("nfe", [10])
def test_operations_of_a_step(name, nfe):
    plan = fewstep.plan(name, SCHEDULE, nfe=nfe)
    x = start()
    run = Execution(plan, x)
    outputs = [torch.randn_like(x) for _ in range(nfe)]
    most, total = 0, 0
    for output in outputs:
        with Tracker() as tracker:
            run.advance(output)
        most, total = max(most, tracker.count), total + tracker.count
    assert run.request is None
    assert most <= OPERATIONS[name]
    assert total >= nfe  # something was counted


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("native", ["eps", "x0", "v"])
def test_operations_of_the_whole_sampler(name, native):
    """PlanSampler.run with a network that costs none; conversion adds at most two a step.

    What a batch costs once (times and factors, one check for NaN) drops out of the
    difference between 40 and 20 steps.
    """
    x = start()
    output = torch.randn_like(x)
    denoiser = fewstep.Denoiser.wrap(lambda x, t: output, schedule=SCHEDULE, prediction=native)
    counts = []
    for nfe in (20, 40):
        plan = fewstep.plan(name, SCHEDULE, nfe=nfe)
        sampler, run = PlanSampler(plan, denoiser), Run(NoiseSource(0, range(len(x))))
        sampler.run(x, run)
        with Tracker() as tracker:
            sampler.run(x, run)
        counts.append(tracker.count)
    extra = 0 if native == plan.prediction.value else 2
    assert 2 <= (counts[1] - counts[0]) / 20 <= OPERATIONS[name] + extra
    assert counts[0] - (counts[1] - counts[0]) < 40  # once a batch


@pytest.mark.parametrize(
    ("name", "most"), [("ddim", 3), ("dpmpp-2m", 4), ("tab3", 6), ("rho-rk4", 6)]
)
def test_tensors_alive(name, most):
    """State-sized memories alive at once, the caller's initial state and the new output included."""
    plan = fewstep.plan(name, SCHEDULE, nfe=12)
    x = torch.randn(16, 16, dtype=torch.float64)
    gc.collect(0)
    with torch.no_grad(), Memory(x.numel()) as memory:
        memory.follow(x)
        run = Execution(plan, x)
        while run.request is not None:
            run.advance(run.request.x * 0.5)
    assert memory.most == most
    denoiser = fewstep.Denoiser.wrap(
        lambda x, t: x * 0.5, schedule=SCHEDULE, prediction=plan.prediction
    )
    with Memory(x.numel()) as memory:
        memory.follow(x)
        execute(plan, lambda x, t: x * 0.5, x)
    assert memory.most == most
    with Memory(x.numel()) as memory:
        memory.follow(x)
        PlanSampler(plan, denoiser).run(x, Run(NoiseSource(0, range(16))))
    assert memory.most == most


READS = ("item", "tolist", "nonzero", "__float__", "__int__", "__bool__", "cpu", "numpy")


def forbid_reads(monkeypatch):
    for name in READS:

        def read(self, *args, name=name, **kwargs):
            raise AssertionError(f"Tensor.{name} reads from the device")

        monkeypatch.setattr(torch.Tensor, name, read)


@pytest.mark.parametrize("name", WITH_PLANS)
def test_no_device_read_in_the_loop(name, monkeypatch):
    plan = plan_of(name)
    x, z = start(), noises(plan, (3, 2))
    run = Execution(plan, x, draw=z.__getitem__)
    native = "v" if plan.prediction is Prediction.X0 else "x0"
    denoiser = fewstep.Denoiser.wrap(
        lambda x, t: torch.tanh(x), schedule=SCHEDULE, prediction=native
    )
    call = bind(denoiser, plan, len(x), {}, x)
    evaluations = 0
    with monkeypatch.context() as patched, torch.no_grad():
        forbid_reads(patched)
        with pytest.raises(AssertionError, match="reads"):
            bool(x.sum() > 0)  # the alarm works
        while run.request is not None:
            run.advance(call(run.request.x, run.request.at))
            evaluations += 1
    assert evaluations == plan.nfe
    assert bool(run.result.isfinite().all())


# Gradients


def grid_with(times):
    return fewstep.grid("explicit", SCHEDULE, None, times=times)


GRADIENT_SOLVERS = ["ddim", "tab2", "rhoab1", "dpmpp-2m", "unipc3", "rho-heun", "dpm3", "ipndm"]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", GRADIENT_SOLVERS)
def test_gradcheck_in_values_and_times(name, checkpoint):
    plan = plan_of(name, 3, t_start=0.8, t_end=0.1)
    x = start(2)

    def f(values, times):
        network = network_of(plan)
        return functional(plan.structure, values, times, network, x, checkpoint=checkpoint)

    values, times = plan.values.clone().requires_grad_(), plan.times.clone().requires_grad_()
    assert torch.autograd.gradcheck(f, (values, times), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", GRADIENT_SOLVERS)
def test_gradients_through_the_grid(name):
    """Times that require gradients -> coefficients -> samples -> loss."""
    solver = fewstep.SOLVERS[name]()
    x = start(2)

    def loss(times):
        plan = solver.plan(grid_with(times))
        sample = functional(plan.structure, plan.values, plan.times, network_of(plan), x)
        return sample.square().mean()

    times = torch.tensor([0.8, 0.5, 0.3, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (times,), atol=1e-6, rtol=1e-4)
    (gradient,) = torch.autograd.grad(loss(times), times)
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("name", GRADIENT_SOLVERS)
def test_rematerialised_gradients_are_identical(name):
    plan = plan_of(name, 4)
    result = []
    for checkpoint in (False, True):
        values, times = plan.values.clone().requires_grad_(), plan.times.clone().requires_grad_()
        sample = functional(
            plan.structure, values, times, network_of(plan), start(), checkpoint=checkpoint
        )
        result.append(torch.autograd.grad(sample.square().sum(), (values, times)))
    for plain, again in zip(*result, strict=True):
        assert torch.equal(plain, again)


def test_rematerialisation_stores_less():
    """With checkpoint=True what autograd keeps for a call does not grow with the network."""
    plan = plan_of("tab2", 8)
    stored = {}
    for checkpoint in (False, True):
        sizes = []

        def deep(x, t):
            for _ in range(20):
                x = torch.tanh(x)
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor,
            lambda tensor: tensor,
        )
        with hooks:
            functional(
                plan.structure,
                plan.values.clone().requires_grad_(),
                plan.times,
                deep,
                start().requires_grad_(),
                checkpoint=checkpoint,
            )
        stored[checkpoint] = sum(sizes)
    assert stored[True] < stored[False] / 3


# Compilation


@pytest.mark.diffusers
def test_one_compilation_serves_two_grids():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    plans = [fewstep.plan("tab2", SCHEDULE, nfe=5, grid=name) for name in ("uniform", "quadratic")]
    assert plans[0].structure == plans[1].structure
    assert not torch.equal(plans[0].values, plans[1].values)

    def network(x, t):
        return torch.tanh(x) * t

    def run(values, times, x):
        return functional(plans[0].structure, values, times, network, x)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    x = start(dtype=torch.float32)
    results = [compiled(plan.values, plan.times, x) for plan in plans]
    assert len(compilations) == 1
    for plan, result in zip(plans, results, strict=True):
        assert torch.equal(result, run(plan.values, plan.times, x))
    assert not torch.equal(*results)
    torch._dynamo.reset()


@pytest.mark.diffusers
def test_structure_as_an_argument_compiles_once():
    """Each plan's own structure: equal, but another object."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    plans = [fewstep.plan("dpmpp-2m", SCHEDULE, nfe=4, grid=g) for g in ("uniform", "log-rho")]
    torch._dynamo.reset()
    compiled = torch.compile(functional, fullgraph=True, backend=backend)
    x = start(dtype=torch.float32)
    for plan in plans:
        args = (plan.structure, plan.values, plan.times, lambda x, t: torch.tanh(x), x)
        torch.testing.assert_close(compiled(*args), functional(*args))
    assert len(compilations) == 1
    torch._dynamo.reset()


# Types


def test_a_float32_state_stays_float32():
    plan = plan_of("tab2")
    x = start(dtype=torch.float32)
    seen = []

    def f(x, t):
        seen.append((x.dtype, t.dtype))
        return x

    out = functional(plan.structure, plan.values, plan.times, f, x)
    assert out.dtype == execute(plan, f, x).dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float32)}


def test_times_stay_float32_for_a_half_precision_state():
    """In bfloat16 the time 999 would become 1000."""
    plan = fewstep.plan("ddim", fewstep.schedule("ddpm-linear"), nfe=2, grid="uniform")
    seen = []

    def f(x, t):
        seen.append(float(t))
        return x

    execute(plan, f, start().to(torch.bfloat16))
    functional(plan.structure, plan.values, plan.times, f, start().to(torch.bfloat16))
    assert seen == [999.0, plan.times[1].item()] * 2


def test_an_aliasing_answer_is_not_overwritten():
    """The three-row example by hand: y = 2 x, f = y itself, z = 3 y, result = z + f."""
    rows = (Lin((0,), 0), Eval(1, 0), Lin((1,), 1), Lin((3, 2), 2))
    structure = Structure(Prediction.EPS, rows, 4)
    values = torch.tensor([2.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    times = torch.tensor([0.5], dtype=torch.float64)
    knots = torch.tensor([0.5, 0.1], dtype=torch.float64)
    plan = Plan(structure, values, times, knots, SCHEDULE)
    x = torch.ones(1, 2, dtype=torch.float64)
    assert execute(plan, lambda y, t: y, x).tolist() == [[8.0, 8.0]]
    assert execute(plan, lambda y, t: y[:, :], x).tolist() == [[8.0, 8.0]]
