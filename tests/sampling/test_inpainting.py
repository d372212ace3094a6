"""Inpainting through ``sample``: the image is kept where the mask is 0, sample by sample."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep.models.exact import GaussianMixture
from fewstep.models.guidance import Inpainted
from reference import normal

VP = fewstep.schedule("vp-linear")
MODEL = GaussianMixture([[0.3, -0.6, 0.9]], [0.5], [1.0], VP)
IMAGE = torch.tensor([2.0, -1.0, 0.5])
MASK = torch.tensor([1, 0, 1])
ENDS = {"solver": "ddim", "options": {"to_zero": True}, "nfe": 6}


def test_is_the_wrapped_model() -> None:
    got = fewstep.sample(MODEL, 5, image=IMAGE, mask=MASK, seed=2, **ENDS)
    expected = fewstep.sample(Inpainted(MODEL, IMAGE, MASK), 5, seed=2, **ENDS)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got[:, 1], IMAGE[1].expand(5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [None, 0.6])
def test_each_sample_has_its_own_image_whatever_the_batch(strength: float | None) -> None:
    images = normal(5, 3, seed=3).float()
    options = {"image": images, "mask": MASK, "strength": strength, "seed": 2, **ENDS}
    whole = fewstep.sample(MODEL, 5, **options)
    parts = fewstep.sample(MODEL, 5, batch_size=2, **options)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(whole[:, 1], images[:, 1], rtol=0, atol=1e-5)
    noise = normal(5, 3, seed=4)
    given = fewstep.sample(MODEL, **{**options, "noise": noise})
    torch.testing.assert_close(given[:, 1].float(), images[:, 1], rtol=0, atol=1e-5)


def test_an_adaptive_solver_inpaints() -> None:
    got = fewstep.sample(MODEL, 3, image=IMAGE, mask=MASK, solver="dopri5")
    # It ends at the lowest time, with the noise that is left there.
    assert float((got[:, 1] - IMAGE[1]).abs().max()) < 5 * 0.011


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="give image= too"):
        fewstep.sample(MODEL, 3, mask=MASK, **ENDS)
    with pytest.raises(ValueError, match="mask must broadcast to a sample"):
        fewstep.sample(MODEL, 3, image=IMAGE, mask=torch.ones(4), **ENDS)
    with pytest.raises(ValueError, match="image must have shape"):
        fewstep.sample(MODEL, 3, image=torch.ones(2, 3), mask=MASK, **ENDS)
    with pytest.raises(ValueError, match="needs a start"):
        fewstep.sample(MODEL, 3, image=IMAGE, **ENDS)


def test_a_network_may_have_a_condition_of_that_name() -> None:
    def network(x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask

    model = fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps", event_shape=(3,))
    samples = fewstep.sample(model, 2, nfe=2, solver="ddim", mask=torch.ones(2, 3))
    assert samples.shape == (2, 3)
