"""Flow maps: steps of any length between knots, what they learn, budgets and fresh noise."""

from __future__ import annotations

import json
import math

import pytest
import torch

import fewstep
from fewstep.base.files import read_json, read_tensors
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.operators import DistillRecipe, OperatorModel, flops, write_operator
from fewstep.operators.distillation import distill
from fewstep.operators.flow_map import FlowMap, spread
from fewstep.operators.losses import L2, mean_slope
from fewstep.operators.objectives import FlowMapObjective
from fewstep.operators.second_time import SecondTime
from fewstep.operators.students import make_student
from stopping import Stopped, Stopping
from tiny_trajectories import teacher

LABELS = {"class_labels": torch.tensor([0, 1, 2])}


def untrained(model, times, **change):
    return make_student(model, DistillRecipe(mode="flow-map", **change), times)


@pytest.mark.parametrize("prediction", ["v", "x0", "eps", "flow"])
@pytest.mark.parametrize("schedule", ["vp-cosine", "edm"])
def test_the_untrained_map_is_ddim_exactly(prediction, schedule):
    made = teacher(prediction, schedule=schedule).double()
    low, high = made.schedule.t_min, made.schedule.t_max
    times = [low + share * (high - low) for share in (1.0, 0.7, 0.4, 0.2, 0.0)]
    student = OperatorModel(untrained(made, times, output="convert"))
    noise = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    for nfe in (1, 2, 4):
        path = [times[k] for k in spread(4, nfe)]
        grid = fewstep.grid("explicit", made.schedule, nfe, times=path)
        expected = fewstep.sample(made, noise=noise, solver="ddim", grid=grid, **LABELS)
        result = fewstep.sample(student, noise=noise, nfe=nfe, **LABELS)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_a_last_knot_of_zero_noise_is_the_data():
    made = teacher(schedule="ddpm-linear").double()
    student = untrained(made, [999.0, 500.0, made.schedule.t_zero])
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    first, last = torch.ones(3, dtype=torch.int64), torch.full((3,), 2)
    with torch.no_grad():
        slope = student(x, first, last, **LABELS)
        torch.testing.assert_close(student.step(x, 1, 2, **LABELS), slope)
        expected = made(x, 500.0, prediction="x0", **LABELS)
    torch.testing.assert_close(slope, expected)


def gaussian(x, t, schedule, mean, std):
    """The predicted data of an isotropic Gaussian, in closed form."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)


def exact(x, t, s, schedule, mean, std):
    """The solution of the ODE of that Gaussian from t to s: the standardised state is constant."""
    spread = [torch.sqrt((schedule.alpha(u) * std) ** 2 + schedule.sigma(u) ** 2) for u in (t, s)]
    return schedule.alpha(s) * mean + spread[1] / spread[0] * (x - schedule.alpha(t) * mean)


@pytest.mark.parametrize("std", [0.0, 0.7])
def test_the_target_takes_the_exact_flow_to_its_end(std):
    """For a Gaussian the target of a pair is its mean slope, from which one step is exact; for data that are one
    point the slope is constant: the teacher's own prediction, so that the untrained map is exact."""
    model = teacher()
    schedule, mean = model.schedule, 0.3
    times = [schedule.t_max, 0.6, 0.2, 0.05]
    student = untrained(model, times).double()
    t, s = (torch.tensor(v, dtype=torch.float64) for v in (times[1], times[3]))
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    later = exact(x, t, s, schedule, mean, std)
    first, second = torch.full((5,), 1), torch.full((5,), 3)
    keep, gain = student.coefficients(first, second, x)
    slope = mean_slope(x, later, keep, gain)
    torch.testing.assert_close(keep * x + gain * slope, later)
    # The mean over kappa of the slope along the path, by quadrature.
    kappa = lambda u: schedule.alpha(u) / schedule.sigma(u)  # noqa: E731
    grid = torch.linspace(float(t), float(s), 4001, dtype=torch.float64)
    along = [gaussian(exact(x, t, u, schedule, mean, std), u, schedule, mean, std) for u in grid]
    weight = kappa(grid).diff()[:, None, None, None, None]
    values = torch.stack(along)
    mean_of = ((values[1:] + values[:-1]) / 2 * weight).sum(0) / weight.sum()
    torch.testing.assert_close(slope, mean_of, rtol=1e-5, atol=1e-5)
    if std == 0:
        torch.testing.assert_close(slope, torch.full_like(slope, mean))


def test_exact_slopes_give_one_sample_with_every_budget(monkeypatch):
    """A flow map with the exact slopes of a Gaussian: 1, 2 and 4 evaluations are the exact solution."""
    model = teacher()
    schedule, std = model.schedule, 0.5
    times = torch.tensor([schedule.t_max, 0.7, 0.4, 0.2, 0.001], dtype=torch.float64)
    student = untrained(model, times.tolist()).double()

    def slopes(self, x, first, second, **cond):
        t, s = times[int(first[0])], times[int(second[0])]
        later = exact(x, t, s, schedule, 0.0, std)
        return mean_slope(x, later, *self.coefficients(first, second, x))

    monkeypatch.setattr(FlowMap, "forward", slopes)
    noise = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    start = schedule.prior_std() * noise
    expected = exact(start, times[0], times[-1], schedule, 0.0, std)
    for nfe in (1, 2, 4):
        made = fewstep.sample(OperatorModel(student), noise=noise, nfe=nfe)
        torch.testing.assert_close(made, expected)


def test_pairs_are_the_steps_of_the_budgets(model, store):
    student = untrained(model, store.times.tolist())
    assert student.layout.budgets == (1, 2, 4)
    assert [student.path(n) for n in (1, 2, 4)] == [[0, 4], [0, 2, 4], [0, 1, 2, 3, 4]]
    make = lambda pairs: FlowMapObjective(student, DistillRecipe(mode="flow-map", pairs=pairs), L2(), [1, 2, 3, 4])  # noqa: E731  # fmt: skip
    first, second = make("steps").pairs(4000, 0)
    drawn = set(zip(first.tolist(), second.tolist(), strict=True))
    assert drawn == {(0, 4), (0, 2), (2, 4), (0, 1), (1, 2), (2, 3), (3, 4), (1, 4)}
    share = float(((first == 0) & (second == 4)).double().mean())
    assert share == pytest.approx(1 / 3 + 1 / 12 + 1 / 24, abs=0.03)
    first, second = make("all").pairs(4000, 0)
    drawn = set(zip(first.tolist(), second.tolist(), strict=True))
    assert drawn == {(i, j) for i in range(5) for j in range(i + 1, 5)}
    again = make("all").pairs(4000, 0)
    assert torch.equal(again[0], first)
    assert not torch.equal(make("all").pairs(4000, 1)[0], first)


def test_the_loss_is_that_of_the_mean_slopes(model, store, tmp_path):
    """The first row of the log, before the student has moved, against the formula by hand."""
    distill(
        model, store, tmp_path, mode="flow-map", loss="l2", learning_rate=0.0, steps=1,
        batch_size=22, heldout=2,
    )  # fmt: skip
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    student = untrained(model, store.times.tolist(), loss="l2")
    objective = FlowMapObjective(student, DistillRecipe(mode="flow-map"), L2(), [1, 2, 3, 4])
    order = torch.randperm(22, generator=fewstep.training.checkpoints.generator(0, "epoch", 0))
    first, second = objective.pairs(22, 0)
    alpha, sigma = model.schedule.scales(store.times)
    total = 0.0
    for row_, i, j in zip(order.tolist(), first.tolist(), second.tolist(), strict=True):
        x, later = store.states[row_, i].double(), store.states[row_, j].double()
        slope = (later / sigma[j] - x / sigma[i]) / (alpha[j] / sigma[j] - alpha[i] / sigma[i])
        label = store.conditions["class_labels"][row_ : row_ + 1]
        with torch.no_grad():
            made = model(
                x[None].float(), float(store.times[i]), prediction="x0", class_labels=label
            )
        total += float((made[0] - slope).square().mean())
    assert row["loss"] == pytest.approx(total / 22, rel=1e-3)
    assert len(row["heldout"]) == 3  # of 4, 2 and 1 evaluations
    assert row["heldout"][0] < row["heldout"][2]


def test_learns_and_is_resumed_bit_for_bit(model, store, tmp_path):
    settings = {
        "mode": "flow-map", "steps": 24, "batch_size": 11, "learning_rate": 1e-2, "warmup": 2,
        "ema": 0.7, "checkpoint_every": 8, "heldout": 2,
    }  # fmt: skip

    whole = distill(model, store, tmp_path / "whole", **settings)
    rows = [
        json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    with pytest.raises(Stopped):
        distill(
            model, store, tmp_path / "parts", progress=Stopping(13, stage="distilling"), **settings
        )
    distill(model, store, tmp_path / "parts", **settings)
    for name in ("operator.safetensors", "checkpoint.safetensors"):
        one, two = (read_tensors(tmp_path / part / name) for part in ("whole", "parts"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    # The folder has all that is needed.
    again = fewstep.load(tmp_path / "whole")
    assert isinstance(again.operator, FlowMap)
    assert read_json(tmp_path / "whole" / "operator.json")["layout"]["budgets"] == [1, 2, 4]
    assert again.fingerprint() == whole.fingerprint()
    assert flops(again.operator) == pytest.approx(flops(make_student(model, DistillRecipe(mode="endpoint"), store.times.tolist())), rel=0.05)  # fmt: skip


def moved(student):
    """The student with a second time that matters."""
    generator = torch.Generator().manual_seed(0)
    for module in student.modules():
        if isinstance(module, SecondTime):
            for parameter in module.layers[-1].parameters():
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return student.eval()


def filled(model, times):
    return OperatorModel(moved(untrained(model, times)))


def test_budgets_by_every_way_to_ask(model, store, tmp_path):
    student = filled(model, store.times.tolist())
    one = fewstep.sample(student, 3, **LABELS)
    assert torch.equal(one, fewstep.sample(student, 3, nfe=1, **LABELS))
    four = fewstep.sample(student, 3, nfe=4, save="states", **LABELS)
    assert four.nfe == 4
    assert four.times.tolist() == pytest.approx(store.times.tolist())
    assert four.states.shape == (5, 3, 1, 8, 8)
    assert not torch.allclose(four.x, one, atol=1e-3)
    # The states of the trajectory are its own steps.
    with torch.no_grad():
        step = student.operator.step(four.states[2], 2, 3, **LABELS)
    torch.testing.assert_close(step, four.states[3])
    resolved = fewstep.resolve(student, fewstep.SamplerRequest(nfe=2))
    assert (resolved.recipe.kind, resolved.recipe.nfe) == ("operator", 2)
    resolved.recipe.save(tmp_path / "r.json")
    two = fewstep.sample(student, 3, recipe=tmp_path / "r.json", **LABELS)
    assert torch.equal(two, fewstep.sample(student, 3, nfe=2, **LABELS))
    for change, message in (
        ({"nfe": 3}, "built-in sampler of 1, 2 or 4 evaluations and cannot use another; leave nfe=3 out"),
        ({"solver": "ddim"}, "leave solver out"),
        ({"nfe": 2, "options": {"eta": 1.0}}, "leave eta out"),
        ({"recipe": tmp_path / "r.json", "nfe": 4}, "this recipe makes 2 evaluations, not 4"),
        ({"options": {"fresh": 3}}, "fresh is true or false, got 3"),
        ({"recipe": fewstep.SamplerRecipe("operator", "operator", nfe=8)}, "makes 1, 2 or 4 evaluations, not 8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fewstep.sample(student, 2, **change)


def test_fresh_noise_between_steps(model, store, tmp_path):
    """Each step goes to the end; the noise up to the next knot is addressed by the sample."""
    student = filled(model, store.times.tolist())
    fresh = {"nfe": 2, "options": {"fresh": True}}
    made = fewstep.sample(student, 3, seed=5, **fresh, **LABELS)
    operator, source = student.operator, NoiseSource(5, range(3))
    alpha, sigma = model.schedule.scales(store.times)
    with torch.no_grad():
        x = sigma[0].float() * source.draw(INITIAL, (1, 8, 8))
        x = operator.step(x, 0, 4, **LABELS)
        ratio = float(alpha[2] / alpha[4])
        added = math.sqrt(float(sigma[2]) ** 2 - (ratio * float(sigma[4])) ** 2)
        x = ratio * x + added * source.draw(0, (1, 8, 8))
        x = operator.step(x, 2, 4, **LABELS)
    torch.testing.assert_close(made, x)
    alone = fewstep.sample(student, 3, seed=5, batch_size=1, **fresh, **LABELS)
    torch.testing.assert_close(alone, made, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fewstep.sample(student, 3, seed=5, nfe=2, **LABELS), made, atol=1e-3)
    recipe = fewstep.resolve(student, fewstep.SamplerRequest(**fresh)).recipe
    assert recipe.options == {"fresh": True}
    recipe.save(tmp_path / "r.json")
    again = fewstep.sample(student, 3, seed=5, recipe=tmp_path / "r.json", **LABELS)
    assert torch.equal(again, made)


class Own(torch.nn.Module):
    """A network whose embedding of the time has to be named."""

    def __init__(self):
        super().__init__()
        self.clock, self.out = torch.nn.Linear(1, 4), torch.nn.Conv2d(1, 4, 1)

    def forward(self, x, t):
        return (self.out(x) * self.clock(t[:, None])[:, :, None, None]).sum(1, keepdim=True)


def test_in_a_network_of_one_s_own():
    schedule = fewstep.schedule("ddpm-linear")
    own = fewstep.Denoiser.wrap(Own(), schedule=schedule, prediction="v", event_shape=(1, 8, 8))
    recipe, times = DistillRecipe(mode="flow-map"), [999.0, 500.0, 0.0]
    student = make_student(own, recipe, times, sites=["clock"])
    assert student.network.clock.temporal.layers[-1].out_features == 4
    model = OperatorModel(moved(student))
    one, two = (fewstep.sample(model, 3, nfe=n) for n in (1, 2))
    assert not torch.allclose(one, two, atol=1e-4)
    with pytest.raises(ValueError, match="the module that embeds the time in a WrappedNetwork is not known"):  # fmt: skip
        make_student(own, recipe, times)


@pytest.mark.diffusers
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_in_a_network_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    from fewstep.adapters.diffusers.loading import DiffusersModel
    from fewstep.adapters.diffusers.network_calls import ImageCall

    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=3,
    ).eval()  # fmt: skip
    made = DiffusersModel(
        ImageCall(network, 1), schedule=fewstep.schedule("ddpm-linear"),
        prediction=fewstep.Prediction.V, event_shape=(1, 8, 8),
    )  # fmt: skip
    student = moved(make_student(made, DistillRecipe(mode="flow-map"), [999.0, 500.0, 0.0]))
    expected = fewstep.sample(OperatorModel(student), 3, nfe=2, **LABELS)
    write_operator(tmp_path, student, dtype=torch.float32)
    again = fewstep.sample(fewstep.load(tmp_path), 3, nfe=2, **LABELS)
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [1, 8]}, "8 evaluations need as many intervals between times, and there are 4"),
        ({"budgets": [2, 1]}, "budgets are increasing numbers of evaluations, got"),
        ({"budgets": []}, "budgets are increasing numbers"),
        ({"frames": 2}, "a flow map has knots, not frames"),
        ({"pairs": "some"}, "pairs"),
        ({"mode": "endpoint", "budgets": [1]}, "budgets are for the student flow-map, not for endpoint"),
        ({"mode": "dsno", "pairs": "all"}, "pairs are for the student flow-map"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(change, message, model, store, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill(
            model, store, tmp_path, **{"mode": "flow-map", "steps": 1, "batch_size": 4, **change}
        )
    assert not list(tmp_path.iterdir())


def test_a_network_without_its_times_is_refused(model, store):
    student = untrained(model, store.times.tolist())
    with pytest.raises(ValueError, match="the two times of the network are not set"):
        student.model.raw(torch.zeros(1, 1, 8, 8), torch.zeros(1))
