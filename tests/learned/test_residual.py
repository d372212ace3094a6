"""The spatial residual: exact at the start, small, learned, stored beside the recipe, refused where it cannot run."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep.adapters import kdiffusion
from fewstep.comparison.entries import identity
from fewstep.learned import Base
from fewstep.learned.condition_pool import ConditionPool
from fewstep.learned.families import family
from fewstep.learned.objectives import Outcome
from fewstep.learned.teachers import Source
from fewstep.learned.unrolled import Unrolled, backpropagate
from fewstep.sampling.module import SamplerModule
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.residual import MOST_BYTES, Residual

SIGMAS = torch.tensor([14.0, 3.0, 0.5, 0.0])
LEVELS = fewstep.schedule("ddpm-linear")
SHAPE = (2, 6, 6)


class Network(torch.nn.Module):
    """A smooth network of pictures, whose model output is not a function of single pixels."""

    def __init__(self):
        super().__init__()
        kernel = torch.tensor([[0.1, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.2, 0.1]]).double()
        self.register_buffer("kernel", kernel.expand(2, 1, 3, 3).clone())

    def forward(self, x, t):
        blurred = torch.nn.functional.conv2d(x, self.kernel.to(x), padding=1, groups=2)
        return (blurred * torch.sigmoid(t / 500)[:, None, None, None].to(x)).tanh()


def model(prediction: str = "eps"):
    return fewstep.Denoiser.wrap(
        Network(), schedule=LEVELS, prediction=prediction, event_shape=SHAPE
    )


def learned(steps: int = 3, *, move: float = 0.0, **options):
    base = Base.of(LEVELS, SamplerRequest("dpmpp-2m", nfe=steps))
    base = Base(base.solver, base.grid, shape=SHAPE)
    made = family("gs", base, residual=True, **options)
    if move:
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(made.count, generator=generator, dtype=torch.float64)
        made.load_vector(move * noise)
    return made


def recipe(move: float = 0.3) -> SamplerRecipe:
    made = learned(move=move, times=False, corrections=False, shifts=False)
    return SamplerRecipe(
        kind="plan", name="mine", plan=made.plan(), residual=made.residual().detached()
    )


NOISE = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_it_starts_as_nothing_and_then_changes_samples(prediction):
    denoiser = model(prediction)
    zero, moved = recipe(0.0), recipe()
    plain = fewstep.sample(denoiser, plan=zero.plan, noise=NOISE)
    torch.testing.assert_close(
        fewstep.sample(denoiser, recipe=zero, noise=NOISE), plain, rtol=0, atol=1e-12
    )
    x = fewstep.sample(denoiser, recipe=moved, noise=NOISE)
    assert float((x - plain).abs().max()) > 1e-3
    # Step by step, and in batches of one, it is the same.
    *_, last = fewstep.steps(denoiser, recipe=moved, noise=NOISE)
    assert torch.equal(last.x, x)
    one = fewstep.sample(denoiser, recipe=moved, noise=NOISE, batch_size=1)
    torch.testing.assert_close(one, x, rtol=0, atol=1e-12)


def test_a_search_runs_what_sample_runs():
    denoiser, made = model("v"), learned(move=0.1)
    run = Unrolled(denoiser, made.structure, residual=made.residual)
    source = Source.of(denoiser, made.base.plan(), ConditionPool())
    x = source.start(NOISE)
    with torch.no_grad():
        unrolled = run(made(), x, [], {}).x
    sampler = PlanSampler(made.plan(), denoiser, residual=made.residual().detached())
    sampled = fewstep.sample(denoiser, noise=NOISE, recipe=SamplerRecipe(
        kind="plan", name="x", plan=sampler.plan, residual=sampler.residual))  # fmt: skip
    # Stored in single precision.
    torch.testing.assert_close(unrolled, sampled, rtol=0, atol=1e-5)


def test_a_search_judges_samples_with_the_residual():
    denoiser, made = model("v"), recipe()
    source = Source.of(denoiser, made.plan, ConditionPool())
    x, _ = source.sampled(made.plan, 5, 3, batch_size=2, residual=made.residual)
    wanted = fewstep.sample(denoiser, 3, recipe=made, seed=5)
    torch.testing.assert_close(x, wanted.to(x), rtol=0, atol=1e-5)


def gradient(made, *, remat=False, microbatch=None):
    denoiser = model("v")
    run = Unrolled(denoiser, made.structure, remat=remat, residual=made.residual)
    made.zero_grad()

    def loss(outcome: Outcome) -> torch.Tensor:
        return outcome.x.square().mean() + outcome.x.mean().square()

    value = backpropagate(made, run, NOISE, [], {}, loss, microbatch=microbatch)
    return value, torch.cat([p.grad.reshape(-1) for p in made.parameters()])


def test_its_gradients_are_right_and_exact_in_parts():
    made = learned(move=0.1)
    _, plain = gradient(made)
    for options in ({"remat": True}, {"microbatch": 2}):
        torch.testing.assert_close(gradient(made, **options)[1], plain, rtol=1e-9, atol=1e-12)
    vector = made.vector()
    for place in range(0, made.count, made.count // 8):
        ends = []
        for sign in (1, -1):
            moved = vector.clone()
            moved[place] += sign * 1e-5
            made.load_vector(moved)
            ends.append(float(gradient(made)[0]))
        quotient = (ends[0] - ends[1]) / 2e-5
        assert quotient == pytest.approx(float(plain[place]), rel=1e-4, abs=1e-8), place


def test_it_is_stored_beside_the_recipe(tmp_path):
    made = recipe()
    path = made.save(tmp_path / "tuned.json")
    file = tmp_path / "tuned.residual.safetensors"
    assert file.stat().st_size < MOST_BYTES
    again = SamplerRecipe.load(path)
    denoiser = model()
    x = fewstep.sample(denoiser, recipe=path, noise=NOISE)
    assert torch.equal(x, fewstep.sample(denoiser, recipe=made, noise=NOISE))
    assert again.residual.digest() == made.residual.digest()
    text = SamplerRecipe.from_json(made.to_json())  # as a text it holds the file itself
    assert text.residual.digest() == made.residual.digest()
    with pytest.raises(ValueError, match="load the recipe by its path"):
        SamplerRecipe.from_json(path.read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "tuned.json").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="is missing"):
        SamplerRecipe.load(other / "tuned.json")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        SamplerRecipe.load(path)


@pytest.mark.parametrize("name", ["../tuned.residual.safetensors", "/etc/passwd", 3])
def test_its_file_is_nowhere_else(name, tmp_path):
    with pytest.raises(ValueError, match="beside its recipe"):
        Residual.from_record({"file": name, "sha256": "0" * 64}, tmp_path)


def test_where_it_cannot_run_it_is_refused(tmp_path):
    made, denoiser = recipe(), model()
    for attempt, message in (
        (lambda: made.plan_for(LEVELS), "spatial residual"),
        (lambda: fewstep.record(denoiser, tmp_path / "s", n=4, recipe=made), "spatial residual"),
        (lambda: SamplerModule(made.build(denoiser)), "spatial residual"),
        (
            lambda: kdiffusion.sampler(lambda x, s: x, NOISE, SIGMAS, recipe=made),
            "spatial residual",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    grey = fewstep.Denoiser.wrap(
        Network(), schedule=LEVELS, prediction="eps", event_shape=(1, 6, 6)
    )
    with pytest.raises(ValueError, match="2 channels"):
        fewstep.sample(grey, 2, recipe=made)
    plan = fewstep.plan("ddim", LEVELS, nfe=4)
    with pytest.raises(ValueError, match="corrects 3 evaluations"):
        SamplerRecipe(kind="plan", plan=plan, residual=made.residual)
    with pytest.raises(ValueError, match="give the plan"):
        SamplerRecipe(name="ddim", nfe=3, residual=made.residual)


def test_comparisons_tell_it_from_its_plan():
    made, denoiser = recipe(), model()
    bare = SamplerRecipe(kind="plan", name="mine", plan=made.plan)
    assert identity(made.build(denoiser)) != identity(bare.build(denoiser))


@pytest.mark.parametrize(
    ("steps", "shape", "message"),
    [(3, (5,), "over images"), (3, None, "over images"), (5, SHAPE, "2 to 4"), (1, SHAPE, "2 to 4"), (4, (99, 4, 4), "bytes")],
)  # fmt: skip
def test_families_refuse_what_it_is_not_for(steps, shape, message):
    base = Base.of(LEVELS, SamplerRequest("ddim", nfe=steps))
    with pytest.raises(ValueError, match=message):
        family("gs", Base(base.solver, base.grid, shape=shape), residual=True)


def test_it_costs_little_of_the_network():
    """Below 2 % of the operations of the embedded network, and below 200 kB."""
    from torch.utils.flop_counter import FlopCounterMode

    denoiser = fewstep.load("fashion", device="cpu")
    base = Base.of(denoiser.schedule, SamplerRequest("ddim", nfe=4))
    residual = family(
        "gs", Base(base.solver, base.grid, shape=(1, 28, 28)), residual=True
    ).residual()
    assert residual.bytes < MOST_BYTES
    x = torch.zeros(1, 1, 28, 28)
    counts = []
    correct = residual.detached().begin(base.plan().prediction, base.plan().scales)
    for call in (
        lambda: denoiser(x, 500.0, class_labels=torch.zeros(1, dtype=torch.long)),
        lambda: correct(0, x, x),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        counts.append(counter.get_total_flops())
    assert 0 < counts[1] < 0.02 * counts[0]


def test_a_search_with_a_residual(tmp_path):
    denoiser = model()
    out = tmp_path / "tuned.json"
    tuned = fewstep.tune(
        denoiser, nfe=2, objective="endpoint", family_options={"residual": True}, out=out,
        keep_worse=True,
        search={"steps": 20, "pairs": 16, "heldout": 24, "test": 24, "teacher_nfe": 8, "batch_size": 8},
    )  # fmt: skip
    assert tuned.recipe.residual is not None
    assert (tmp_path / "tuned.residual.safetensors").exists()
    scores = [
        tuned.scores[w]["rms to the teacher (trained on)"]["value"] for w in ("before", "after")
    ]
    assert scores[1] < scores[0]
    x = fewstep.sample(denoiser, recipe=out, noise=NOISE)
    bare = fewstep.sample(denoiser, plan=tuned.plan, noise=NOISE)
    assert float((x - bare).abs().max()) > 1e-4


@pytest.mark.diffusers
@pytest.mark.peer
@pytest.mark.parametrize("form", ["path", "text"])
def test_it_runs_in_a_pipeline_of_diffusers(tmp_path, form):
    pytest.importorskip("diffusers")
    from fewstep.adapters.diffusers import PlanScheduler

    made, denoiser = recipe(), model("v")
    given = str(made.save(tmp_path / "tuned.json")) if form == "path" else made.to_json()
    scheduler = PlanScheduler(recipe=given, prediction_type="v_prediction")
    again = PlanScheduler.from_config(scheduler.config)
    wanted = fewstep.sample(denoiser, recipe=made, noise=NOISE)
    for each in (scheduler, again):
        each.set_timesteps(3)
        state = NOISE * each.init_noise_sigma
        for t in each.timesteps:
            state = each.step(denoiser.network(state, t.double().expand(3)), t, state).prev_sample
        # diffusers keeps timesteps in float32.
        torch.testing.assert_close(state, wanted, rtol=0, atol=1e-4)
    clipping = PlanScheduler(recipe=given, clip_sample=True)
    with pytest.raises(ValueError, match="without clipping"):
        clipping.set_timesteps(3)
