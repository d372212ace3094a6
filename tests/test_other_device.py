"""Everything that runs a model keeps to the model's device; the numbers are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import torch

import fewstep
from fewstep.comparison import compare
from fewstep.solvers import solver
from fewstep.studies import (
    Batch,
    Candidate,
    advise,
    checking,
    fitting_error,
    follow,
    measure_gain,
    model_check,
    path_of,
    polish,
)
from fewstep.studies.reference import draw_noise
from other_device import OTHER, OtherTensor, on_other_device, other_device
from tiny_models import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", size=4)


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with other_device() as made:
        yield made


@pytest.fixture
def here(folder):
    return fewstep.load(folder, device="cpu")


@pytest.fixture
def there(folder):
    return on_other_device(fewstep.load(folder, device="cpu"))


def close(one, two):
    assert isinstance(one, OtherTensor)
    torch.testing.assert_close(one.cpu(), two, rtol=1e-3, atol=1e-4)


def test_the_stand_in_refuses_what_a_device_refuses(device):
    x = torch.randn(3, 4).to(device)
    assert x.device == torch.zeros(2, device=device).device == OTHER
    for mix in (
        lambda: x + torch.ones(4),
        lambda: torch.ones(3, 4).add_(x),
        lambda: torch.stack([x, torch.ones(3, 4)]),
        lambda: torch.ones(3)[torch.tensor([0]).to(device)],
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match="numpy"):
        numpy.asarray(x.numpy())
    # What CUDA allows: numbers without dimensions, indices of the CPU, copies.
    for value in (x * torch.tensor(2.0), x[torch.tensor([0, 2])], x.add_(1), x.to(torch.float64)):
        assert value.device == OTHER
    for value in (x.cpu(), torch.zeros(3, 4).copy_(x)):
        assert value.device.type == "cpu"
    assert torch.zeros(3, 4, device=device).copy_(torch.ones(3, 4)).tolist() == [[1.0] * 4] * 3


@pytest.mark.parametrize("solver", ["auto", "unipc3", "ddpm", "dopri5"])
def test_samples(here, there, solver):
    options = {"options": {"rtol": 0.3, "atol": 0.3}} if solver == "dopri5" else {"nfe": 5}
    labels = numpy.arange(3)
    wanted = fewstep.sample(here, 3, solver=solver, class_labels=labels, **options)
    close(fewstep.sample(there, 3, solver=solver, class_labels=labels, **options), wanted)


def test_guided_samples(here, there):
    wanted, found = (
        fewstep.sample(fewstep.Guided(model, 2.0), 2, nfe=3, class_labels=[0, 2])
        for model in (here, there)
    )
    close(found, wanted)


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.rand((12, 1, 4, 4), generator=generator) * 2 - 1, torch.arange(12) % 3


@pytest.mark.slow
def test_the_stages_of_a_study(here, there, monkeypatch):
    """Check, references, gains, polishing and fitting error: polishing failed on CUDA."""
    monkeypatch.setattr(checking, "schedules_to_try", lambda claimed: [claimed])
    monkeypatch.setattr(checking, "conventions_for", lambda schedule: ["as claimed"])
    images, labels = data()
    results = []
    for model in (here, there):
        check = model_check(model, images, n=2, cond={"class_labels": labels[:2]})
        noise = draw_noise(model, 2, 0)
        cond = model.prepare(2, {"class_labels": [0, 1]})
        reference = follow(model, noise, cond, intervals=4, substeps=1)
        path = path_of(reference, model, measure_gain(model, reference, places=2))
        start = Candidate(solver("tab2"), reference.times[[0, 1, 2, 4]])
        polished = polish(model, start, noise, reference.end, cond, iterations=1)
        plan = polished.candidate.plan(model)
        batch = Batch(noise, reference.end, cond)
        advice = advise(model, path, 3, batch, batch, {}, solvers=("tab2",), deadline=0.0)
        fit = fitting_error(model, reference, path, images, labels, plan=plan, samples=2, every=3)
        numbers = [check.best.relative_error, *path.gain.tolist(), *polished.history]
        numbers += [advice.best.held_out, fit["end"], *fit["noised"]["rms"]]
        results.append(numbers)
        assert len(polished.history) == 2
    assert results[1] == pytest.approx(results[0], rel=1e-3)


def test_a_comparison(here, there, tmp_path):
    found = [
        compare(
            model,
            "tab2,ddpm",
            nfe=(3,),
            folder=tmp_path / name,
            n=4,
            batch_size=3,
            reference_nfe=5,
            cond={"class_labels": [0, 1, 2, 0]},
        )
        for name, model in (("here", here), ("there", there))
    ]
    for one, two in zip(*(f.cells for f in found), strict=True):
        assert two.scores["rms"].value == pytest.approx(one.scores["rms"].value, rel=1e-4)
    assert found[1].question["device"] == "meta"
