"""Studies that are interrupted, or shared by processes: no evaluation is made twice, and the results are the same."""

import json

import pytest
import torch

import fewstep
from fewstep.base import sharing
from fewstep.models import kept
from forks import FORKS, Fork
from small_studies import coarse_references, few_hypotheses

SMOOTH = fewstep.load("mixture-smooth")
FILES = ("grid.json", "recipe-3.json", "recipe-4.json")
SMALL = {"nfe": [3, 4], "n": 4, "budget": 10, "data": "mixture-smooth"}

pytestmark = pytest.mark.usefixtures("few_hypotheses", "coarse_references", "undrawn")


class Lost(RuntimeError):
    """The end of a process that saves nothing any more."""


class Network:
    """Counts its evaluations, and stops at some."""

    def __init__(self, error=KeyboardInterrupt):
        self.count, self.stops, self.error = 0, [], error

    def __call__(self, x, t):
        if self.stops and self.count == self.stops[0]:
            self.stops.pop(0)
            raise self.error
        self.count += 1
        return SMOOTH(x, t[0], prediction="eps")

    def model(self):
        return fewstep.Denoiser.wrap(
            self, schedule=SMOOTH.schedule, prediction="eps", event_shape=(2,)
        )


def repeated(call, network, stops):
    """Returns the result of a call that is given again after each stop; all evaluations are counted."""
    network.stops = list(stops)
    for _ in stops:
        with pytest.raises(network.error):
            call(network.model())
    return call(network.model())


def spread(count):
    return [count // 9, count // 2, 3 * count // 4]


def test_a_measurement_makes_no_evaluation_twice(tmp_path):
    def fit(model, **more):
        return fewstep.fit(model, (3, 4), n=8, **more)

    whole, counted = Network(), Network()
    expected = fit(whole.model())
    found = repeated(
        lambda model: fit(model, folder=tmp_path / "parts"), counted, spread(whole.count)
    )
    assert counted.count == whole.count
    assert found.entries == expected.entries
    assert not (tmp_path / "parts" / "parts").exists()


def timeless(folder):
    results = json.loads((folder / "results.json").read_text())
    return [
        {k: v for k, v in results.items() if k not in ("seconds", "content_sha256")},
        *((folder / name).read_bytes() for name in FILES),
    ]


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory):
    """The folder of an analysis, and its evaluations."""
    folder = tmp_path_factory.mktemp("analysis") / "out"
    with pytest.MonkeyPatch.context() as patch:
        few_hypotheses(patch)
        coarse_references(patch)
        network = Network()
        fewstep.analyze(network.model(), **SMALL, out=folder)
    return folder, network.count


def test_an_analysis_makes_no_evaluation_twice(analyzed, tmp_path):
    folder, count = analyzed
    network = Network()
    repeated(
        lambda model: fewstep.analyze(model, **SMALL, out=tmp_path / "out"), network, spread(count)
    )
    assert network.count <= count  # what is evaluated twice in one run is found the second time
    assert timeless(tmp_path / "out") == timeless(folder)


def test_a_killed_analysis_loses_the_last_seconds_only(analyzed, tmp_path, monkeypatch):
    folder, count = analyzed
    monkeypatch.setattr(kept, "SECONDS", 0.0)
    network = Network(Lost)
    repeated(
        lambda model: fewstep.analyze(model, **SMALL, out=tmp_path / "out"), network, spread(count)
    )
    assert network.count <= count
    assert timeless(tmp_path / "out") == timeless(folder)


def test_evaluations_that_are_damaged_are_made_again(analyzed, tmp_path):
    folder, count = analyzed
    network, out = Network(), tmp_path / "out"
    network.stops = [count // 2]
    with pytest.raises(KeyboardInterrupt):
        fewstep.analyze(network.model(), **SMALL, out=out)
    (file,) = (out / "parts").glob("*.evaluations-0.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    fewstep.analyze(network.model(), **SMALL, out=out)
    assert network.count > count
    assert timeless(out) == timeless(folder)


def test_processes_of_a_launch_share_an_analysis(analyzed, tmp_path, monkeypatch):
    folder, count = analyzed
    monkeypatch.setattr(sharing, "POLL", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    out, network = tmp_path / "out", Network()
    monkeypatch.setenv("RANK", "1")
    network.stops = [count // 3]
    with pytest.raises(KeyboardInterrupt):
        fewstep.analyze(network.model(), **SMALL, out=out)
    monkeypatch.setenv("RANK", "0")
    analysis = fewstep.analyze(network.model(), **SMALL, out=out)
    assert network.count <= count
    assert timeless(out) == timeless(folder)
    assert not (out / "parts").exists()
    # One that comes late finds the results.
    monkeypatch.setenv("RANK", "1")
    before = network.count
    late = fewstep.analyze(network.model(), **SMALL, out=out)
    assert network.count == before
    assert (late.advice, late.recipes) == (analysis.advice, analysis.recipes)
    with pytest.raises(ValueError, match="exists"):
        fewstep.analyze(network.model(), **SMALL, seed=1, out=out)
    with pytest.raises(ValueError, match="--overwrite with several processes"):
        fewstep.analyze(network.model(), **SMALL, out=out, overwrite=True)


@pytest.mark.filterwarnings(FORKS)
@pytest.mark.slow
def test_two_processes_at_once(analyzed, tmp_path):
    folder, _ = analyzed
    started = [
        Fork(
            lambda: fewstep.analyze(Network().model(), **SMALL, out=tmp_path / "out"),
            fresh=False,
            RANK=rank,
            WORLD_SIZE="2",
        )
        for rank in "01"
    ]
    assert [process.wait() for process in started] == [0, 0]
    assert timeless(tmp_path / "out") == timeless(folder)


def test_evaluations_under_guidance_are_kept(tmp_path):
    """The network inside is what is kept; guidance around it is computed again."""
    calls = []

    def network(x, t, label):
        calls.append(len(x))
        return SMOOTH(x, t[0], prediction="eps") * (1 + 0.1 * label[:, None])

    model = fewstep.Denoiser.wrap(
        network,
        schedule=SMOOTH.schedule,
        prediction="eps",
        event_shape=(2,),
        null_condition={"label": 0},
    )
    run = kept.RunFolder(tmp_path, "test", outputs=())
    x, label = torch.randn(3, 2), torch.tensor([1, 2, 3])
    guided = fewstep.Guided(model, 2.0)
    expected = guided(x, 0.5, prediction="eps", label=label)
    calls.clear()
    with run.running({}):
        for evaluations in (1, 1, 2):
            keeping = kept.KeptEvaluations(run)
            try:
                with keeping.of(guided), keeping.part("one"):
                    assert torch.equal(guided(x, 0.5, prediction="eps", label=label), expected)
                    if evaluations == 2:
                        guided(x, 0.5, prediction="eps", label=label + 1)
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                assert len(calls) == evaluations
    assert "raw" not in vars(model)
