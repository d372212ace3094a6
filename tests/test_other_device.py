"""Everything that runs a model keeps to the model's device; the numbers are those of the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy
import pytest
import torch

import fewstep
from fewstep.base.files import read_tensors
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
from fewstep.training.data import read_images
from fewstep.training.recipe import TrainRecipe
from fewstep.training.train import train
from other_device import OTHER, OtherTensor, both, on_other_device, other_device, plain
from tiny_models import write_tiny

pytestmark = pytest.mark.slow  # much is computed: `pytest -m "not slow"` is for while one writes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", size=4)


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with other_device() as result:
        yield result


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
    wanted, found = both(
        *(here, there),
        lambda model: fewstep.sample(model, 3, solver=solver, class_labels=labels, **options),
    )
    close(found, wanted)


def test_guided_samples(here, there):
    wanted, result = both(
        *(here, there),
        lambda model: fewstep.sample(fewstep.Guided(model, 2.0), 2, nfe=3, class_labels=[0, 2]),
    )
    close(result, wanted)


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.rand((12, 1, 4, 4), generator=generator) * 2 - 1, torch.arange(12) % 3


@pytest.mark.slow
def test_the_stages_of_a_study(here, there, monkeypatch):
    """Check, references, gains, polishing and fitting error: polishing failed on CUDA."""
    monkeypatch.setattr(checking, "schedules_to_try", lambda claimed: [claimed])
    monkeypatch.setattr(checking, "conventions_for", lambda schedule: ["as claimed"])
    images, labels = data()

    def work(model):
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
        assert len(polished.history) == 2
        return numbers

    wanted, found = both(here, there, work)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_a_comparison(here, there, tmp_path):
    result = both(
        *(here, there),
        lambda model: compare(
            model,
            "tab2,ddpm",
            nfe=(3,),
            folder=tmp_path / model.device.type,
            n=4,
            batch_size=3,
            reference_nfe=5,
            cond={"class_labels": [0, 1, 2, 0]},
        ),
    )
    for one, two in zip(*(f.cells for f in result), strict=True):
        assert two.scores["rms"].value == pytest.approx(one.scores["rms"].value, rel=1e-4)
    assert result[1].question["device"] == "meta"


TINY = {
    "steps": 2, "pairs": 8, "heldout": 8, "test": 8, "teacher_nfe": 4, "batch_size": 4,
    "evaluate_every": 2, "real_batch": 20,
}  # fmt: skip


@pytest.mark.usefixtures("few_real_samples")
def test_a_search(here, there):
    """Pairs, search, judgements and final scores, with data and conditions."""
    images = torch.rand((40, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    arguments = {"nfe": 1, "objective": "endpoint,mmd", "features": "pixels", "search": TINY}
    there_too = images.to(OTHER)
    one, two = both(
        *((here, images), (there, there_too)),
        lambda given: fewstep.tune(
            given[0], **arguments, data=given[1], class_labels=[0, 2]
        ).scores["after"],
    )
    for name, score in one.items():
        assert two[name]["value"] == pytest.approx(score["value"], rel=1e-2, abs=1e-4)


def test_trajectories_and_their_student(here, there, tmp_path):
    labels = torch.tensor([0, 1, 2, 0])
    rows = []
    for name, model in (("here", here), ("there", there)):
        fewstep.record(model, tmp_path / name, n=4, solver="ddim", nfe=4, class_labels=labels)
        rows.append(fewstep.TrajectoryStore.open(tmp_path / name).read(list(range(4))).states)
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-3)
    out = tmp_path / "student"
    fewstep.distill(there, tmp_path / "there", out, steps=1, batch_size=2, device=OTHER)
    assert (out / "operator.safetensors").is_file()


def test_training(tmp_path, monkeypatch):
    """torch knows no automatic precision on meta, so that is left out."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    pixels = numpy.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=numpy.uint8)
    numpy.savez(tmp_path / "data.npz", images=pixels, labels=numpy.arange(20) % 2)
    network = {"channels": [8], "blocks": [1], "attention": [], "num_classes": 2}
    more = {"batch_size": 4, "steps": 2, "warmup": 1, "precision": "float32"}
    recipe = TrainRecipe(network=network, schedule={"name": "ddpm-linear"}, **more)
    ends = []
    for device in ("cpu", OTHER):
        out = tmp_path / str(device)
        train(read_images(tmp_path / "data.npz"), out, recipe, device=device)
        ends.append(read_tensors(out / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    for name, weights in ends[0].items():
        torch.testing.assert_close(ends[1][name], weights, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_references")
def test_a_profile(here, there):
    one, two = both(*(here, there), lambda model: fewstep.fit(model, (2,), n=4, class_labels=1))
    assert two.solver_for(2) == one.solver_for(2)


@pytest.mark.slow
def test_likelihood(here, there):
    x = torch.rand((2, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"class_labels": [0, 1], "rtol": 0.1, "atol": 0.1}
    with plain():
        wanted = fewstep.log_likelihood(here, x, **options)
    result = fewstep.log_likelihood(there, x.to(OTHER), **options)
    torch.testing.assert_close(result.nats.cpu(), wanted.nats, rtol=1e-3, atol=1e-3)
