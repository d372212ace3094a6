"""Evaluations in parts, when a batch is out of memory."""

import pytest
import torch

import fewstep
from fewstep.models.guidance import ProjectedGuidance
from fewstep.models.splitting import split_evaluations
from fewstep.models.wrappers import Guided
from fewstep.studies import model_check
from tiny_trajectories import teacher


def limited(model, most, sizes):
    raw = model.raw

    def few(x, t, **cond):
        sizes.append(len(x))
        if len(x) > most:
            raise RuntimeError("MPS backend out of memory")
        return raw(x, t, **cond)

    model.raw = few
    return model


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda model: model,
        lambda model: Guided(model, 2.0),
        lambda model: ProjectedGuidance(model, 2.0, momentum=-0.5),
    ],
    ids=["plain", "guided", "momentum"],
)
def test_split_evaluations_are_those_of_the_batch(wrapped):
    sizes = []
    x, labels = torch.randn(5, 1, 8, 8), torch.arange(5) % 3
    right, small = wrapped(teacher()), wrapped(limited(teacher(), 4, sizes))
    with torch.no_grad(), split_evaluations(small):
        for t in (0.9, 0.5):
            torch.testing.assert_close(
                small(x, t, class_labels=labels),
                right(x, t, class_labels=labels),
                rtol=1e-4,
                atol=1e-5,
            )
    assert max(sizes) > 4 >= sizes[-1]
    assert "raw" not in vars(small)


def test_a_measurement_goes_on_with_half_of_its_samples():
    options, model = {"nfe": (4,), "n": 4}, fewstep.load("mixture-smooth", device="cpu")
    right = fewstep.fit(model, **options).table()
    result = fewstep.fit(limited(model, 2, []), **options).table()
    assert result[0]["solver"] == right[0]["solver"]
    assert result[0]["error"] == pytest.approx(right[0]["error"], rel=1e-2)


def test_the_model_check_goes_on_with_half_of_its_samples():
    """An evaluation that is out of memory is no sign of another convention."""
    model = fewstep.load("mixture-smooth", device="cpu")
    right = model_check(model, n=4).to_record()
    found = model_check(limited(model, 2, []), n=4).to_record()
    assert found["verdict"] == right["verdict"]
    network = fewstep.Denoiser.wrap(
        lambda x, t: (_ for _ in ()).throw(RuntimeError("CUDA out of memory")),
        schedule=fewstep.schedule("vp-linear"),
        prediction="eps",
        event_shape=(2,),
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        model_check(network, n=4)
