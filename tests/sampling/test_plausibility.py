"""Implausible samples: a warning with a hint."""

from __future__ import annotations

import logging

import pytest
import torch

import fewstep

VP = fewstep.schedule("vp-linear")
MODEL = fewstep.exact.GaussianMixture([[0.5, 0.5]], [0.3], [1.0], VP)


def wrapped(prediction, scale=1.0, **options):
    return fewstep.Denoiser.wrap(
        lambda x, t: scale * MODEL(x / scale, t, prediction="eps"),
        schedule=VP,
        prediction=prediction,
        event_shape=(2,),
        **options,
    )


def warnings_of(caplog, model, **options):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fewstep"):
        fewstep.sample(model, 4, batch_size=2, **options)
    return caplog.messages


@pytest.mark.parametrize("schedule", ["vp-linear", "ddpm-linear", "flow", "edm", "ve"])
@pytest.mark.parametrize("options", [{"nfe": 5}, {"nfe": 10}, {"solver": "ddim", "nfe": 10}])
def test_a_noise_prediction_taken_for_a_score(caplog, schedule, options):
    """The score is -eps / sigma: taken for one, the noise is added instead of removed."""
    levels = fewstep.schedule(schedule)
    exact = fewstep.exact.GaussianMixture([[0.5, 0.5]], [0.3], [1.0], levels)
    model = fewstep.Denoiser.wrap(exact.raw, schedule=levels, prediction="score", event_shape=(2,))
    messages = warnings_of(caplog, model, **options)
    assert len(messages) == 1  # once, not for each batch
    assert "model_check(denoiser, data)" in messages[0]
    assert "'fewstep analyze'" in messages[0]
    assert "prediction='score'" in messages[0]


def test_plausible_samples_are_not_commented(caplog):
    assert warnings_of(caplog, wrapped("eps"), solver="ddim", nfe=10) == []
    assert warnings_of(caplog, MODEL, solver="dopri5", options={"rtol": 1e-2, "atol": 1e-2}) == []


def test_noise_that_is_left_is_no_fault(caplog):
    model = fewstep.exact.GaussianMixture([[0.5, 0.5]], [0.3], [1.0], fewstep.schedule("edm"))
    messages = warnings_of(caplog, model, solver="ddim", nfe=1, options={"t_end": 79.0})
    assert messages == []


def test_data_that_are_large_say_so_by_their_statistics(caplog):
    def large(x, t):
        return torch.zeros_like(x)

    options = {"solver": "ddim", "nfe": 1, "noise": torch.full((4, 2), 3e4)}
    model = fewstep.Denoiser.wrap(large, schedule=VP, prediction="eps", event_shape=(2,))
    assert len(warnings_of(caplog, model, **options)) == 1
    known = fewstep.Denoiser.wrap(
        large, schedule=VP, prediction="eps", event_shape=(2,), data_mean=0.0, data_std=1e6
    )
    assert warnings_of(caplog, known, **options) == []
