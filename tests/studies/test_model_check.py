"""The model check: models that are wrapped wrongly, in each way."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep.models.exact import DataSet, sharp, smooth
from fewstep.studies import model_check
from fewstep.studies.conventions import CONVENTIONS, between, conventions_for, range_of

pytestmark = pytest.mark.slow  # much is computed: `pytest -m "not slow"` is for while one writes

DDPM = fewstep.schedule("ddpm-linear")
VP = fewstep.schedule("vp-linear")
TRUTH = smooth(DDPM)
DATA = TRUTH.draw(4096, seed=1)


def wrap(network=None, **options):
    """The mixture, wrapped as somebody who knows nothing of it might."""
    options = {"schedule": DDPM, "prediction": "eps", "event_shape": (2,), **options}
    return fewstep.Denoiser.wrap(network or (lambda x, t: TRUTH.raw(x, t)), **options)


def check(denoiser, data=DATA):
    return model_check(denoiser, data, n=700 if data is not None else 256)


@pytest.mark.parametrize("data", [DATA, None], ids=["data", "samples"])
def test_a_right_claim_stands(data):
    found = check(wrap(), data)
    assert found.wrong == ()
    assert found.claimed.relative_error < 0.9
    assert found.source == ("samples" if data is None else "data")
    assert found.ok == (found.outcome == "passed") == (data is not None)
    if found.ok:
        assert "is as claimed" in found.summary()
    if data is not None:  # the optimal denoiser of the very data: nothing is better than itself
        assert found.hypotheses[0].relative_error >= 0.99 * found.claimed.relative_error


@pytest.mark.parametrize("right", ["eps", "x0", "v", "score", "flow"])
def test_a_wrong_prediction_is_named(right):
    model = wrap(lambda x, t: TRUTH(x, t, prediction=right), prediction=right)
    assert check(model).wrong == ()
    wrong = "x0" if right != "x0" else "eps"
    found = check(wrap(lambda x, t: TRUTH(x, t, prediction=right), prediction=wrong))
    assert found.wrong == ("prediction",)
    assert found.best.hypothesis.prediction == right
    assert f"prediction='{right}'" in found.summary()


@pytest.mark.parametrize(("right", "wrong"), [("eps", "x0"), ("x0", "eps"), ("v", "eps")])
def test_a_wrong_prediction_shows_without_data_too(right, wrong):
    model = wrap(lambda x, t: TRUTH(x, t, prediction=right), prediction=wrong)
    found = model_check(model, n=256)
    assert found.wrong == ("prediction",)
    assert found.best.hypothesis.prediction == right
    assert f"prediction='{right}'" in found.summary()


@pytest.mark.parametrize("name", ["ddpm-scaled-linear", "ddpm-cosine"])
def test_a_wrong_schedule_is_named(name):
    found = check(wrap(schedule=fewstep.schedule(name)))
    assert found.wrong == ("schedule",)
    assert found.best.hypothesis.schedule == DDPM
    assert "ddpm-linear" in found.summary()


@pytest.mark.parametrize(
    ("network", "options", "name"),
    [
        (lambda x, t: TRUTH.raw(x, t * 999), {}, "t / t_max"),
        (lambda x, t: TRUTH.raw(x, 999 - t), {}, "t_max - t"),
        (lambda x, t: TRUTH.raw(x, 999 - 999 * t), {}, "1 - t / t_max"),
        (
            lambda x, t: TRUTH.raw(x, DDPM.time(-4 * t.double().clamp(-1.3, 1.3))),
            {},
            "log(sigma) / 4",
        ),
        (None, {"to_model_time": lambda t: t / 999}, "t"),
    ],
    ids=["fraction", "backwards", "fraction backwards", "log sigma", "needlessly scaled"],
)
def test_a_wrong_time_is_named(network, options, name):
    found = check(wrap(network, **options))
    assert found.wrong == ("time",)
    assert found.best.hypothesis.time == name
    assert "to_model_time=lambda t: " in found.summary()


def test_times_of_continuous_schedules():
    exact = smooth(VP)
    found = check(wrap(lambda x, t: exact.raw(x, t / 1000), schedule=VP), exact.draw(4096, seed=1))
    # 1000 levels of the same beta are the same model, in other times.
    claim = found.best.hypothesis
    assert claim.time in ("1000 t", "999 t") or (claim.schedule, claim.time) == (
        DDPM,
        "as claimed",
    )
    assert len(found.wrong) == 1


def test_two_mistakes_at_once():
    model = wrap(lambda x, t: TRUTH(x, t * 999, prediction="v"))
    found = check(model)
    assert set(found.wrong) == {"prediction", "time"}
    assert found.best.hypothesis.prediction == "v"
    assert found.best.hypothesis.time == "t / t_max"


def test_a_wrong_range_is_named():
    points = (torch.rand((40, 3), generator=torch.Generator().manual_seed(3)) > 0.5).double()
    images = points * 2 - 1
    for truth, name in ((points, "[0, 1]"), (images * 0.5, "[-0.5, 0.5]")):
        exact = DataSet(truth, DDPM)
        assert check(exact, truth).wrong == ()
        found = check(exact, images)
        assert found.wrong == ("range",)
        assert found.best.hypothesis.range == name
        assert f"data in {name}" in found.summary()
    assert (found.low, found.high) == (-1, 1)


def test_an_untrained_model_is_reported():
    found = check(wrap(lambda x, t: torch.zeros_like(x), prediction="x0"))
    assert not found.ok
    assert found.claimed.relative_error > 1
    found = check(wrap(lambda x, t: torch.sin(50 * x)))
    assert not found.ok


def test_a_network_that_knows_whole_indices_only():
    def table(x, t):
        if t.is_floating_point():
            raise TypeError("indices")
        return TRUTH.raw(x, t)

    assert check(wrap(table, integer_times=True)).ok
    found = check(wrap(table, integer_times=True, prediction="v"))
    assert found.wrong == ("prediction",)


def test_the_check_leaves_the_model_alone():
    model = wrap(to_model_time=lambda t: t / 999)
    before = model.to_model_time
    check(model)
    assert model.to_model_time is before


def test_every_convention_is_written_as_it_is_done():
    for s in (DDPM, VP):
        times = torch.linspace(s.t_min + 0.1, s.t_max, 5, dtype=torch.float64)
        for name in conventions_for(s)[1:]:
            made = hypothesis(s, name)
            written = eval(made.to_model_time(), {"schedule": s})
            assert torch.allclose(written(times), made.model_time(times), atol=1e-12)
    assert {*conventions_for(DDPM), *conventions_for(VP)} == {"as claimed", *CONVENTIONS}


def hypothesis(s, name):
    from fewstep.diffusion.prediction import Prediction
    from fewstep.studies.conventions import Hypothesis

    return Hypothesis(Prediction.EPS, s, name)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([-1, 0.9], "[-1, 1]"),
        ([0, 0.9], "[0, 1]"),
        ([-0.5, 0.5], "[-0.5, 0.5]"),
        ([0, 200], "[0, 255]"),
        ([-1.5, 1], None),
        ([0, 1.5], None),
    ],
)
def test_ranges(values, name):
    assert range_of(torch.tensor(values)) == name


def test_maps_between_ranges():
    scale, shift = between("[0, 255]", "[0, 1]")
    assert (scale * 255 + shift, shift) == (1, 0)
    scale, shift = between("[0, 1]", "[-1, 1]")
    assert (scale + shift, shift) == (1, -1)


def test_what_cannot_be_checked():
    with pytest.raises(ValueError, match=r"shape \(N, 2\)"):
        check(wrap(), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="give data"):
        check(fewstep.Denoiser.wrap(lambda x, t: x, schedule=DDPM, prediction="eps"), None)


def test_the_numbers_are_json():
    import json

    found = check(wrap(prediction="x0"))
    text = json.loads(json.dumps(found.to_record(), allow_nan=False))
    assert text["wrong"] == ["prediction"]
    assert text["best"]["prediction"] == "eps"


FLOW = fewstep.schedule("flow")
RECTIFIED = smooth(FLOW)
POINTS = RECTIFIED.draw(1024, seed=1)


def test_a_flow_network_with_noise_at_zero_is_found():
    """t = 0 is noise, and the velocity goes from noise to data: x0 - eps at 1 - t."""
    network = lambda x, t: -RECTIFIED(x, 1 - t, prediction="flow")  # noqa: E731
    found = model_check(wrap(network, schedule=FLOW, prediction="flow"), POINTS, n=1024)
    assert set(found.wrong) == {"negated", "time"}
    best = found.best.hypothesis
    assert (best.prediction, best.negated, best.time) == ("flow", True, "t_max - t")
    assert best.schedule == FLOW
    assert "with time_reversed=True it is" in found.summary()
    right = wrap(network, schedule=FLOW, prediction="flow", time_reversed=True)
    assert model_check(right, POINTS, n=1024).outcome == "passed"


@pytest.mark.parametrize(("prediction", "data"), [("flow", POINTS), ("v", POINTS), ("flow", None)])
def test_a_velocity_of_the_other_sign_is_found(prediction, data):
    network = lambda x, t: -RECTIFIED(x, t, prediction=prediction)  # noqa: E731
    found = model_check(wrap(network, schedule=FLOW, prediction=prediction), data, n=512)
    assert found.wrong == ("negated",)
    assert found.best.hypothesis.negated
    assert f"the negative of prediction='{prediction}'" in found.summary()


def test_undecided_hypotheses_are_named():
    """Of its own samples a rectified flow explains as well as one with t = 0 at noise."""
    network = lambda x, t: -RECTIFIED(x, 1 - t, prediction="flow")  # noqa: E731
    found = model_check(wrap(network, schedule=FLOW, prediction="flow"), n=256)
    assert (found.outcome, found.ok) == ("undecided", False)
    rivals = [item.hypothesis for item in found.undecided]
    assert any(r.negated and r.time == "t_max - t" and r.schedule == FLOW for r in rivals)
    assert "cannot be distinguished from it on its own samples" in found.summary()
    assert found.to_record()["outcome"] == "undecided"


def test_few_data_do_not_tell_near_schedules_apart():
    network = lambda x, t: RECTIFIED(x, t, prediction="flow")  # noqa: E731
    claimed = wrap(network, schedule=FLOW, prediction="flow")
    few, many = (model_check(claimed, POINTS, n=n) for n in (16, 1024))
    assert few.outcome == "undecided"
    assert "schedule=fewstep.schedule('vp-cosine')" in few.summary()
    assert many.outcome == "passed"
    # The same function of state and noise level is no rival, whatever its convention is called.
    assert all(item.hypothesis.time != "t" for item in many.hypotheses)


EXACT = ("ddpm-linear", "ddpm-scaled-linear", "ddpm-cosine", "vp-linear", "ve", "edm", "flow")


@pytest.mark.usefixtures(
    "few_hypotheses"
)  # without data a claim below 1 stands, whatever else is tried
@pytest.mark.parametrize("name", EXACT)
def test_without_data_a_right_claim_is_not_called_wrong(name):
    """Its own samples come from a grid that suits every schedule; even steps in the time of edm left noise."""
    noise = fewstep.schedule(name)
    mixture = sharp(noise)
    right = "flow" if name == "flow" else "eps"
    model = fewstep.Denoiser.wrap(
        lambda x, t: mixture(x.double(), t.double(), prediction=right).to(x.dtype),
        schedule=noise,
        prediction=right,
        event_shape=(2,),
    )
    check = model_check(model)
    assert check.claimed.relative_error < 0.8
    assert check.outcome in ("passed", "undecided")
    assert check.best is check.claimed
