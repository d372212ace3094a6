"""Plans: what they check, how they are stored, and that nothing hostile gets in."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fewstep
from fewstep.base.files import MOST_NESTED
from fewstep.diffusion.prediction import Prediction
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Noise, Structure

SCHEDULE = fewstep.schedule("vp-linear")
FUZZ = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

# Two steps, 1.0 -> 0.4 by DDIM and 0.4 -> 0.01 by stochastic DDIM with eta = 1/2.
HAND = {
    "format": "fewstep.plan",
    "version": 1,
    "prediction": "eps",
    "schedule": {"name": "vp-linear", "beta_min": 0.1, "beta_max": 20.0},
    "times": [1.0, 0.4],
    "knots": [1.0, 0.4, 0.01],
    "scales": [],
    "rows": [
        {"eval": [0, 0]},
        {"lin": [[0, 67.25], [1, -66.5]], "state": 1},
        {"eval": [2, 1]},
        {"noise": 0},
        {"lin": [[2, 2.25], [3, -1.75], [4, 0.0625]], "state": 2},
    ],
    "result": 5,
}
t = torch.tensor(HAND["times"], dtype=torch.float64)
HAND["scales"] = torch.stack([SCHEDULE.alpha(t), SCHEDULE.sigma(t)], 1).tolist()

WITH_PLANS = [name for name, build in fewstep.SOLVERS.items() if not build().adaptive]


def changed(**entries):
    return json.dumps({**HAND, **entries})


def test_flat_form_by_hand():
    """y1 = 67.25 x - 66.5 f0; result = 2.25 y1 - 1.75 f1 + 0.0625 z."""
    a, b, c = Plan.from_json(json.dumps(HAND)).flat()
    assert a.tolist() == [1.0, 67.25, 2.25 * 67.25]
    assert b.tolist() == [[0, 0], [-66.5, 0], [2.25 * -66.5, -1.75]]
    assert c.tolist() == [[0], [0], [0.0625]]


def test_properties():
    plan = Plan.from_json(json.dumps(HAND))
    assert (plan.nfe, plan.n_noise, plan.stochastic) == (2, 1, True)
    assert plan.prediction is Prediction.EPS
    assert plan.structure.last_reads == ((), (0, 1), (), (), (2, 3, 4))
    assert "2 evaluations, 1 draws" in repr(plan)


@pytest.mark.parametrize("name", WITH_PLANS)
def test_round_trip_bit_for_bit(name, tmp_path):
    """Through a file; on every schedule it is tested with the solvers."""
    plan = fewstep.plan(name, fewstep.schedule("ddpm-linear"), steps=4, to_zero=False)
    path = plan.save(tmp_path / "plan.json")
    again = Plan.load(path)
    assert again.structure == plan.structure
    assert hash(again.structure) == hash(plan.structure)
    for field in ("values", "times", "knots"):
        assert torch.equal(getattr(again, field), getattr(plan, field))
    assert (again.schedule, again.name, again.head) == (plan.schedule, plan.name, plan.head)
    assert again.to_json() == plan.to_json()


def test_head_is_stored():
    plan = fewstep.plan("ddim", SCHEDULE, nfe=3, head_start=0.7)
    assert plan.head
    assert Plan.from_json(plan.to_json()).head


REFUSED = {
    "version 2": ({"version": 2}, "version 2"),
    "other format": ({"format": "pickle"}, "'pickle'"),
    "unknown key": ({"hook": "os.system"}, "unknown key 'hook'"),
    "unknown prediction": ({"prediction": "epz"}, "Did you mean 'eps'"),
    "unknown schedule": ({"schedule": {"name": "vp-linaer"}}, "Did you mean 'vp-linear'"),
    "unknown option": ({"schedule": {"name": "flow", "beta": 1}}, "beta"),
    "a schedule that is no object": ({"schedule": "vp-linear"}, "of the plan must be an object"),
    "negative register": ({"rows": [{"eval": [-1, 0]}], "result": 1}, "from 0"),
    "register of the future": ({"rows": [{"eval": [1, 0]}], "result": 1}, "not defined before"),
    "huge register": ({"rows": [{"eval": [10**30, 0]}], "result": 1}, "from 0 to"),
    "evaluations out of order": ({"rows": [{"eval": [0, 1]}], "result": 1}, "in order"),
    "draws out of order": ({"rows": [{"noise": 3}], "result": 1}, "draws noise 3"),
    "a register twice": ({"rows": [{"lin": [[0, 1.0], [0, 2.0]]}], "result": 1}, "twice"),
    "no terms": ({"rows": [{"lin": []}], "result": 1}, "list of"),
    "no call": ({"rows": [{"lin": [[0, 1.0]]}], "result": 1, "times": [], "scales": []}, "once"),
    "a row of another kind": ({"rows": [{"exec": "x"}], "result": 1}, "row 1 must be one of"),
    "rows that are no list": ({"rows": 7}, "'rows' of the plan must be a list"),
    "result beyond the rows": ({"result": 6}, "register 6 of 6"),
    "boolean register": ({"result": True}, "'result' of the plan must be an integer"),
    "text as a time": ({"times": ["1.0", 0.4]}, "must be a list of at most 200000 numbers"),
    "too few times": ({"times": [1.0]}, "times have shape"),
    "time outside": ({"times": [1.5, 0.4]}, "outside"),
    "time zero": ({"times": [1.0, 0.0]}, "outside"),
    "knots out of order": ({"knots": [1.0, 0.01, 0.4]}, "decrease strictly"),
    "one knot": ({"knots": [1.0]}, "two knots"),
    "first knot outside": ({"knots": [7.0, 0.4, 0.01]}, "outside"),
    "state without a knot": ({"knots": [1.0, 0.01]}, "state 2"),
    "scales of another schedule": ({"scales": [[0.5, 0.5], [0.5, 0.5]]}, "file was changed"),
    "scales of another length": ({"scales": [[0.5, 0.5]]}, "2 pairs"),
    "scales with three": ({"scales": [[1, 2, 3], [1, 2, 3]]}, "2 pairs"),
    "head as a number": ({"head": 1}, "true or false"),
    "huge integer as a coefficient": (
        {"rows": [{"eval": [0, 0]}, {"lin": [[0, 10**400]]}], "result": 2},
        "finite number",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_with_a_reason(case):
    entries, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        Plan.from_json(changed(**entries))


@pytest.mark.parametrize("key", ["rows", "times", "scales", "schedule", "result", "prediction"])
def test_missing_key_is_named(key):
    content = {k: v for k, v in HAND.items() if k != key}
    with pytest.raises(ValueError, match=f"no '{key}'"):
        Plan.from_json(json.dumps(content))


TEXTS = {
    "NaN": (json.dumps(HAND).replace("67.25", "NaN"), "NaN is not a number"),
    "infinity": (json.dumps(HAND).replace("67.25", "-Infinity"), "Infinity is not a number"),
    "overflow": (json.dumps(HAND).replace("67.25", "1e999"), "1e999 is not a number"),
    "a key twice": ('{"format": "fewstep.plan", "format": "fewstep.plan"}', "repeated"),
    "nested": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "nested a little too deep": ("[" * (MOST_NESTED + 1) + "]" * (MOST_NESTED + 1), "nested"),
    "an integer of 10000 digits": ("9" * 10_000, "not valid JSON"),
    "cut": (json.dumps(HAND)[:-20], "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "a list": ("[]", "object, got list"),
    "null": ("null", "object, got NoneType"),
    "not text": (b"\xff\xfe\x00\x80", "not valid JSON"),
    "a pickle": (b"\x80\x04\x95cos\nsystem\n", "not valid JSON"),
}


@pytest.mark.parametrize("case", list(TEXTS))
def test_text_is_refused_with_a_reason(case):
    text, reason = TEXTS[case]
    with pytest.raises(ValueError, match=reason):
        Plan.from_json(text)


@pytest.mark.parametrize("levels", [10**12, 10**30, True, 2.5, 1, -5])
@pytest.mark.parametrize("name", ["ddpm-linear", "ddpm-scaled-linear", "ddpm-cosine"])
def test_hostile_levels_allocate_nothing(name, levels):
    kind = "must be a number, got True" if levels is True else "an integer from 2 to 1000000"
    with pytest.raises(ValueError, match=f"levels.* {kind}"):
        Plan.from_json(changed(schedule={"name": name, "levels": levels}))


def test_missing_or_damaged_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.json' cannot be read: No such file"):
        Plan.load(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="cannot be read"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"plan.json': the plan has the format None"):
        Plan.load(tmp_path / "plan.json")


def loads_to_itself_or_is_refused(text):
    try:
        plan = Plan.from_json(text)
    except ValueError:
        return
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    assert all(math.isfinite(v) for v in plan.values.tolist())
    plan.flat()


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2, 10**6, 10**12, 10**400, 2**63]),
    st.floats(allow_nan=False),
    st.text(max_size=5),
)
JSON = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@FUZZ
@given(st.sampled_from(sorted(HAND)), JSON)
def test_fuzzed_entries(key, value):
    loads_to_itself_or_is_refused(json.dumps({**HAND, key: value}))


@FUZZ
@given(JSON)
def test_fuzzed_values(value):
    loads_to_itself_or_is_refused(json.dumps(value))


@FUZZ
@given(st.binary(max_size=60))
def test_fuzzed_bytes(data):
    loads_to_itself_or_is_refused(data)


def places(value, path=()):
    """All paths in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


def edited(value, path, edit):
    """A copy of a JSON value with the entry at a path replaced, or removed if ``edit`` is None."""
    if not path:
        return edit(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = edited(value[path[0]], path[1:], edit)
    return copy


@FUZZ
@given(st.data())
def test_random_edits_of_a_valid_plan(data):
    content = json.loads(fewstep.plan("unipc2", SCHEDULE, nfe=3).to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(content))))
        new = data.draw(JSON)
        twice = data.draw(st.booleans())
        content = edited(
            content,
            path,
            lambda old, new=new, twice=twice: (
                [*old, *old] if twice and isinstance(old, list) else new
            ),
        )
    loads_to_itself_or_is_refused(json.dumps(content))


@FUZZ
@given(st.integers(0, 2000), st.integers(0, 255))
def test_random_bytes_of_a_valid_plan(place, byte):
    text = bytearray(json.dumps(HAND).encode())
    text[place % len(text)] = byte
    loads_to_itself_or_is_refused(bytes(text))
    loads_to_itself_or_is_refused(bytes(text[: place % len(text)]))


# Plans made by hand in Python


def test_structure_refuses_an_empty_row():
    with pytest.raises(ValueError, match="adds up nothing"):
        Structure(Prediction.EPS, (Eval(0, 0), Lin((), 0)), 2)


def test_structure_refuses_a_wrong_offset():
    with pytest.raises(ValueError, match="start at coefficient 0"):
        Structure(Prediction.EPS, (Lin((0,), 5),), 1)


def test_a_register_nobody_reads_dies_where_it_is_made():
    structure = Structure(Prediction.EPS, (Eval(0, 0), Noise(0), Lin((1,), 0)), 3)
    assert structure.last_reads == ((0,), (2,), (1,))


@pytest.mark.parametrize(
    ("field", "value", "error", "reason"),
    [
        ("values", torch.zeros(5), TypeError, "values of a plan are float64"),
        ("times", torch.zeros(3, dtype=torch.float64), ValueError, r"times have shape \(3,\)"),
        ("values", torch.full((5,), math.nan, dtype=torch.float64), ValueError, "finite"),
        ("knots", torch.tensor([1.0, 0.4, 0.01]), TypeError, "knots of a plan are float64"),
        ("knots", torch.full((3,), math.nan, dtype=torch.float64), ValueError, "decrease"),
    ],
)
def test_numbers_are_checked_at_birth(field, value, error, reason):
    with pytest.raises(error, match=reason):
        replace(Plan.from_json(json.dumps(HAND)), **{field: value})


def test_with_values_keeps_the_structure():
    plan = Plan.from_json(json.dumps(HAND))
    other = plan.with_values(2 * plan.values)
    assert other.structure is plan.structure
    assert torch.equal(other.flat().a[1:], torch.tensor([2, 4]) * plan.flat().a[1:])


def test_another_schedule_is_refused_with_the_time():
    plan = fewstep.plan("ddim", SCHEDULE, nfe=4, t_start=0.9)
    with pytest.raises(ValueError, match=r"at t = 0.9 \(vp-linear\).*Rebuild the plan"):
        plan.check_schedule(fewstep.schedule("vp-linear", beta_max=19.0))
    plan.check_schedule(fewstep.schedule("vp-linear"))


def test_an_equal_schedule_of_another_name_is_accepted():
    """Only the scales at the evaluations matter."""
    ddpm = fewstep.schedule("ddpm-linear")
    table = fewstep.schedule("tabulated", alphas_cumprod=ddpm.alphas_cumprod)
    plan = fewstep.plan("ddim", ddpm, nfe=4)
    assert ddpm != table
    plan.check_schedule(table)
