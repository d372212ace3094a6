"""Training beyond recorded pairs: own states, consistency, the score difference, a run from another student."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

import fewstep
from fewstep.base.files import read_json, read_tensors, write_tensors
from fewstep.operators import DistillRecipe
from fewstep.operators.correctors import CORRECTORS, Corrector, Denoised, Draws, ScoreDifference
from fewstep.operators.distillation import distill
from fewstep.operators.losses import L2, mean_slope
from fewstep.operators.objectives import FlowMapObjective, Rows
from fewstep.operators.students import make_student
from stopping import Stopped, Stopping
from tiny_trajectories import Memory, teacher

SHORT = {
    "mode": "flow-map", "steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup": 2, "heldout": 2,
    "ema": 0.7, "checkpoint_every": 2,
}  # fmt: skip
SCORES = {"corrector": "score-difference", "corrector_rate": 1e-3}


def draws(count, places=None, part=0):
    return Draws(0, part, count, range(count) if places is None else places, torch.device("cpu"))


def flow_map(model, store):
    return make_student(model, DistillRecipe(mode="flow-map"), store.times.tolist())


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "change",
    [
        SCORES,
        {"corrector": "denoised", "corrector_weight": 0.5},
        {"own_states": 0.5, "consistency": 0.5, "accumulate": 2},
    ],
)
def test_a_run_is_resumed_bit_for_bit(change, model, store, tmp_path):
    settings = {**SHORT, **change}
    distill(model, store, tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        distill(
            model, store, tmp_path / "parts", progress=Stopping(5, stage="distilling"), **settings
        )
    distill(model, store, tmp_path / "parts", **settings)
    for name in ("operator.safetensors", "checkpoint.safetensors", "log.jsonl"):
        one, two = ((tmp_path / part / name).read_bytes() for part in ("whole", "parts"))
        assert one == two


def test_the_score_difference_is_not_in_the_student_and_begins_after_the_warmup(
    model, store, tmp_path
):
    distill(model, store, tmp_path / "plain", **{**SHORT, "steps": 2, "decay": 0})
    distill(model, store, tmp_path / "short", **{**SHORT, "steps": 2, "decay": 0, **SCORES})
    distill(model, store, tmp_path / "long", **{**SHORT, "steps": 3, "decay": 0, **SCORES})
    plain, short, long = (
        read_tensors(tmp_path / name / "operator.safetensors")
        for name in ("plain", "short", "long")
    )
    assert plain.keys() == short.keys()
    # The own network is trained from the first step, the student with it from the third.
    assert all(torch.equal(plain[key], short[key]) for key in plain)
    kept = read_tensors(tmp_path / "short" / "checkpoint.safetensors")
    own = {k for k in kept if k.startswith("more.corrector.network.")}
    student = {k for k in kept if k.startswith("network.")}
    assert len(own) == len(student)
    assert any(not torch.equal(plain[key], long[key]) for key in plain)
    assert len(log_of(tmp_path / "short")[0]["losses"]) == 3
    assert len(log_of(tmp_path / "plain")[0]["losses"]) == 1


def test_the_gradient_is_the_difference_of_the_predicted_data(model, store):
    student = flow_map(model, store)
    corrector = ScoreDifference.build(model, student, {"class_labels": torch.tensor([0])})
    x = torch.randn(6, 1, 8, 8).requires_grad_()
    first = torch.tensor([0, 1, 2, 3, 0, 2])
    cond = {"class_labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    loss, own, numbers = corrector.losses(x, first, cond, draws(6))
    # The second network starts as the teacher: no difference, and the teacher's loss on these samples.
    assert not loss.any()
    assert not numbers[:, 0].any()
    z, t, weight = corrector._noised(x.detach(), draws(6), "denoising")
    alpha, sigma = model.schedule.scales(t)
    assert bool(((alpha / sigma).log() > -4.51).all() and ((alpha / sigma).log() < 4.51).all())
    error = (model(z, t, prediction="x0", **cond) - x.detach()).square().flatten(1).mean(1)
    torch.testing.assert_close(own.detach(), weight * error)
    # Of a variance-preserving schedule that is the loss of a v-network.
    noise = (z - alpha.float().reshape(-1, 1, 1, 1) * x.detach()) / sigma.float().reshape(
        -1, 1, 1, 1
    )
    v = (
        alpha.float().reshape(-1, 1, 1, 1) * noise
        - sigma.float().reshape(-1, 1, 1, 1) * x.detach()
    )
    exact = (model(z, t, prediction="v", **cond) - v).square().flatten(1).mean(1)
    torch.testing.assert_close(own.detach(), exact, rtol=1e-3, atol=1e-5)
    # With another second network the gradient is the formula.
    with torch.no_grad():
        for parameter in corrector.network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    loss, own, _ = corrector.losses(x, first, cond, draws(6))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    z, t, _ = corrector._noised(x.detach(), draws(6), "score")
    with torch.no_grad():
        real = model(z, t, prediction="x0", **cond)
        fake = corrector.fake.predicted_data(z, t, first, **cond)
    size = (x.detach() - real).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(gradient, (fake - real) / size / 64)
    # The student gets no gradient from the second network's loss.
    assert torch.autograd.grad(own.sum(), x, allow_unused=True) == (None,)


def test_what_is_drawn_for_a_row_depends_on_its_place_alone(model, store):
    whole, some = draws(8), draws(8, [5, 2])
    torch.testing.assert_close(some.uniform("times"), whole.uniform("times")[[5, 2]])
    torch.testing.assert_close(some.normal("x", (3,)), whole.normal("x", (3,))[[5, 2]])
    one = whole.of(torch.tensor([4]))
    assert torch.equal(one.uniform("times"), whole.uniform("times")[4:5])
    assert not torch.equal(whole.uniform("times"), whole.uniform("others"))
    assert not torch.equal(whole.uniform("times"), draws(8, part=1).uniform("times"))
    # So are the losses of a batch in two parts.
    student = flow_map(model, store)
    recipe = DistillRecipe(mode="flow-map", warmup=0, own_states=0.5, consistency=0.5, **SCORES)
    corrector = ScoreDifference.build(model, student, {"class_labels": torch.tensor([0])})
    objective = FlowMapObjective(student, recipe, L2(), [1, 2, 3, 4], corrector)
    cond = {"class_labels": store.conditions["class_labels"][:8]}
    given = Rows(store.states[:8].float(), cond, 3, range(8), 8)
    whole, log = objective.losses(student, given)
    parts = [
        objective.losses(
            student,
            given._replace(
                states=given.states[rows],
                cond={"class_labels": cond["class_labels"][rows]},
                places=range(8)[rows],
            ),
        )
        for rows in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, whole)
    torch.testing.assert_close((parts[0][1] + parts[1][1]) / 2, log)


def test_consistency_is_with_steps_that_are_trained(model, store):
    student = flow_map(model, store)
    make = lambda pairs: FlowMapObjective(student, DistillRecipe(mode="flow-map", pairs=pairs), L2(), [1, 2, 3, 4])  # noqa: E731  # fmt: skip
    shares = [k / 100 for k in range(100)]
    ways = {tuple(make("steps").way(0, 4, share)) for share in shares}
    assert ways == {(0, 1, 4), (0, 2, 4)}  # no budget has the step from 0 to 3
    assert {tuple(make("all").way(0, 4, share)) for share in shares} == {*ways, (0, 3, 4)}
    assert make("steps").way(1, 3, 0.5) == [1, 2, 3]
    assert make("steps").way(2, 3, 0.5) == [2, 3]


def by_hand(model, store, x, first, second, row):
    """A step of the untrained flow map, which is one of DDIM."""
    label = store.conditions["class_labels"][row : row + 1]
    alpha, sigma = model.schedule.scales(store.times)
    data = model(x[None], float(store.times[first]), prediction="x0", class_labels=label)[0]
    eps = (x - alpha[first] * data) / sigma[first]
    return (alpha[second] * data + sigma[second] * eps).float()


@pytest.mark.parametrize("option", ["own_states", "consistency"])
def test_own_states_and_consistency_by_hand(option, model, store):
    student = flow_map(model, store)
    count, states = 12, store.states[:12].float()
    recipe = DistillRecipe(mode="flow-map", **{option: 1.0})
    objective = FlowMapObjective(student, recipe, L2(), [1, 2, 3, 4])
    cond = {"class_labels": store.conditions["class_labels"][:count]}
    loss, _ = objective.losses(student, Rows(states, cond, 0, range(count), count))
    between = draws(count).uniform("knot between").tolist()
    alpha, sigma = model.schedule.scales(store.times)
    total, changed = 0.0, 0
    with torch.no_grad():
        for row, (way, end) in enumerate(objective.steps(count, 0)):
            start, x, later = way[-1], states[row, way[-1]], states[row, end]
            if option == "own_states" and start:
                x, changed = states[row, 0], changed + 1
                for i, j in pairwise(way):
                    x = by_hand(model, store, x, i, j, row)
            if option == "consistency":
                knots = objective.way(start, end, between[row])
                changed += len(knots) == 3
                later = x if len(knots) == 3 else later
                for i, j in pairwise(knots) if len(knots) == 3 else ():
                    later = by_hand(model, store, later, i, j, row)
            keep, gain = (
                sigma[end] / sigma[start],
                alpha[end] - alpha[start] * sigma[end] / sigma[start],
            )
            label = cond["class_labels"][row : row + 1]
            slope = model(x[None], float(store.times[start]), prediction="x0", class_labels=label)[
                0
            ]
            target = mean_slope(x.double(), later.double(), keep, gain)
            total += float((slope - target).square().mean())
    assert changed > 2
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-3)


def test_the_teacher_s_data_at_little_noise_by_hand(model, store):
    corrector = Denoised.build(model, flow_map(model, store), {})
    x = torch.randn(3, 1, 8, 8).requires_grad_()
    cond = {"class_labels": torch.tensor([0, 1, 2])}
    loss, own, numbers = corrector.losses(x, torch.tensor([0, 1, 2]), cond, draws(3))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    t = model.schedule.time(3.3 + 1.0 * draws(3).uniform("grain"))
    alpha, sigma = (v.float().reshape(-1, 1, 1, 1) for v in model.schedule.scales(t))
    assert bool((sigma > 0.0135).all() and (sigma < 0.037).all())
    with torch.no_grad():
        difference = x - model(alpha * x, t, prediction="x0", **cond)
    size = difference.abs().flatten(1).mean(1)
    torch.testing.assert_close(gradient, difference.detach() / size.reshape(-1, 1, 1, 1) / 64)
    torch.testing.assert_close(numbers[:, 0], size)
    assert not own.any()


def test_grain_is_removed_and_both_modes_stay():
    """Data are -1 or 1 in all pixels, and the recorded samples have grain; the teacher's data have none."""
    model, states = two_modes()
    states = states.clone()
    states[:, 1] += 0.05 * torch.randn(
        states[:, 1].shape, generator=torch.Generator().manual_seed(1)
    )
    corrector = Denoised(model)
    x = states[:, 1].clone().requires_grad_()
    loss, _, _ = corrector.losses(x, torch.zeros(len(x)).long(), {}, draws(len(x)))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    better = states[:, 1] - 0.05 * 64 * gradient
    grain = lambda v: float((v - v.mean((1, 2, 3), keepdim=True)).square().mean().sqrt())  # noqa: E731
    assert grain(better) < 0.8 * grain(states[:, 1])
    assert torch.equal(better.mean((1, 2, 3)).sign(), states[:, 1].mean((1, 2, 3)).sign())


def test_the_score_difference_sharpens_what_a_regression_blurs():
    """The teacher's data are -1 or 1 in all pixels, the student's samples between, as an average is."""
    model, states = two_modes()
    times = [model.schedule.t_max, model.schedule.t_min]
    recipe = DistillRecipe(mode="flow-map", budgets=[1])
    student = make_student(model, recipe, times, sites=["embed"])
    corrector = ScoreDifference.build(model, student, {})
    optimizer = torch.optim.Adam(corrector.network.parameters(), lr=1e-2)
    x = 0.5 * states[:, 1]
    first, gradient = torch.zeros(len(x)).long(), torch.zeros_like(x)
    for step in range(120):
        sample = x.clone().requires_grad_()
        loss, own, _ = corrector.losses(sample, first, {}, draws(len(x), part=step))
        optimizer.zero_grad()
        own.mean().backward()
        optimizer.step()
        if step >= 60:
            gradient += torch.autograd.grad(loss.sum(), sample)[0]
    towards = -gradient.mean((1, 2, 3)) * x.mean((1, 2, 3)).sign()
    assert bool((towards > 0).all())


def two_modes(n=64):
    """A teacher whose data are -1 or 1 in all pixels, and pairs that do not tell which."""

    def data(x, t):
        alpha, sigma = schedule.scales(t.double())
        ratio = (alpha / sigma.square()).float().reshape(-1, 1, 1, 1)
        return torch.tanh(ratio * x.mean((1, 2, 3), keepdim=True) * 64).expand_as(x)

    schedule = fewstep.schedule("vp-cosine")
    model = fewstep.Denoiser.wrap(
        Two(data), schedule=schedule, prediction="x0", event_shape=(1, 8, 8)
    )
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, 1, 8, 8, generator=generator)
    ends = torch.sign(torch.randn(n, 1, 1, 1, generator=generator)).expand(n, 1, 8, 8)
    return model, torch.stack([start, ends], 1)


class Two(torch.nn.Module):
    """A teacher in closed form, with a correction that can be trained: the gain of the mean of the pixels."""

    def __init__(self, data):
        super().__init__()
        self.data = data
        self.embed = torch.nn.Linear(1, 8)
        self.head = torch.nn.Sequential(
            torch.nn.Linear(9, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1)
        )
        torch.nn.init.zeros_(self.head[-1].weight)
        torch.nn.init.zeros_(self.head[-1].bias)

    def forward(self, x, t):
        hidden = self.embed(t.float()[:, None])
        mean = 8 * x.mean((1, 2, 3))
        more = self.head(torch.cat([hidden, mean[:, None]], 1))
        return self.data(x, t.cpu()) + more[:, :, None, None]


def test_a_run_starts_from_another_student(model, store, tmp_path):
    first = tmp_path / "first"
    distill(model, store, first, **{**SHORT, "steps": 2})
    again = {**SHORT, "steps": 1, "learning_rate": 0.0, "initial": str(first)}
    student = distill(model, store, tmp_path / "second", **again)
    one, two = (read_tensors(f / "operator.safetensors") for f in (first, tmp_path / "second"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    before = fewstep.load(first).fingerprint()
    assert student.about["training"]["initial"] == before
    assert read_json(tmp_path / "second" / "checkpoint.json")["inputs"]["initial"] == before
    # A longer run with another student in that folder is not the same run.
    distill(model, store, first, overwrite=True, **{**SHORT, "steps": 3})
    with pytest.raises(ValueError, match="a run with other inputs"):
        distill(model, store, tmp_path / "second", **{**again, "steps": 2})
    with pytest.raises(
        ValueError, match=r"another layout than this run's \(budgets \[1, 2, 4\], now \[1, 2\]"
    ):
        distill(model, store, tmp_path / "third", **{**again, "budgets": [1, 2]})
    with pytest.raises(ValueError, match=r"operator\.json"):
        distill(model, store, tmp_path / "third", **{**again, "initial": str(tmp_path)})
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrector": "score"}, "score-difference"),
        ({"corrector_weight": -1.0, **SCORES}, "corrector_weight must be a number that is not negative"),
        ({"corrector_rate": float("inf"), "corrector": "score-difference"}, "corrector_rate must be"),
        ({"corrector_weight": 2.0}, "corrector_weight and corrector_rate are for a corrector"),
        ({"own_states": 1.5}, "own_states must be between 0 and 1"),
        ({"consistency": True}, "consistency must be between 0 and 1"),
        ({"mode": "endpoint", "own_states": 0.5}, "own_states are for the student flow-map"),
        ({"mode": "dsno", **SCORES}, "for the student flow-map, not for dsno"),
        ({"initial": 3}, "initial is the folder of a student, got 3"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DistillRecipe(**{"mode": "flow-map", **change})


def test_a_checkpoint_without_the_corrector_s_network_is_damaged(model, store, tmp_path):
    distill(model, store, tmp_path, **{**SHORT, "steps": 2, **SCORES})
    file = tmp_path / "checkpoint.safetensors"
    from fewstep.base.files import read_tensors_and_metadata

    tensors, about = read_tensors_and_metadata(file)
    kept = {k: v for k, v in tensors.items() if "corrector" not in k}
    about.pop("tensors")
    write_tensors(file, kept, about)
    with pytest.raises(ValueError, match="damaged: the corrector's network"):
        distill(model, store, tmp_path, **{**SHORT, "steps": 4, **SCORES})


def test_a_corrector_is_a_class_and_a_line(model, store, tmp_path, monkeypatch):
    class Darker(Corrector):
        """Adds the mean of the sample."""

        about = "darker"
        columns = 0

        def __init__(self):
            self.unused = torch.nn.Linear(1, 1)

        @classmethod
        def build(cls, teacher, student, example):
            return cls()

        @property
        def network(self):
            return self.unused

        def losses(self, x, first, cond, draws):
            own = self.unused(x.detach().flatten(1).mean(1, keepdim=True))[:, 0].square()
            return x.flatten(1).mean(1), own, x.new_zeros(len(x), 0)

    monkeypatch.setitem(CORRECTORS._entries, "darker", Darker)
    settings = {**SHORT, "steps": 12, "learning_rate": 1e-2, "warmup": 1}
    plain = distill(model, store, tmp_path / "plain", **settings)
    darker = distill(
        model, store, tmp_path / "darker", corrector="darker", corrector_weight=5.0, **settings
    )
    one, two = (fewstep.sample(s, 3, class_labels=[0, 1, 2]).mean() for s in (plain, darker))
    assert float(two) < float(one) - 0.05


def test_guided_trajectories_have_a_guided_score(model, store, tmp_path):
    student = flow_map(model, store)
    example = {"class_labels": torch.tensor([0])}
    guided = ScoreDifference.build(fewstep.Guided(model, 3.0), student, example)
    loss, _, _ = guided.losses(
        torch.randn(2, 1, 8, 8).requires_grad_(), torch.tensor([0, 1]), {"class_labels": torch.tensor([0, 1])}, draws(2)
    )  # fmt: skip
    assert loss.any()  # the second network starts as the model without guidance
    recorded = Memory(
        store.times, store.states, store.conditions, {**store.settings, "guidance": 3.0}
    )
    distill(model, recorded, tmp_path, **{**SHORT, "steps": 3, **SCORES})
    assert log_of(tmp_path)[-1]["losses"][1] > 0


def test_the_teacher_is_a_copy(store, tmp_path):
    made = teacher()
    before = made.fingerprint()
    distill(made, store, tmp_path, **{**SHORT, "steps": 3, **SCORES})
    assert made.fingerprint() == before
