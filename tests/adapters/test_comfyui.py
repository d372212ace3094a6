"""The node pack, run with stand-ins for what ComfyUI documents: model patcher, guider, sampler functions."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.adapters import comfyui
from fewstep.models.exact import smooth
from reference import normal

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
SD, FLOW = fewstep.schedule("ddpm-scaled-linear"), fewstep.schedule("flow", t_max=1 - 1e-6)


class Sampling:
    """A model sampling: the table, timesteps, and how noise is added."""

    def __init__(self, kind: str, shift: float = 1.0) -> None:
        self.kind = kind
        t = torch.arange(1, 1001) / 1000
        self.sigmas = {
            "flow": shift * t / (1 + (shift - 1) * t),
            "edm": torch.linspace(math.log(0.002), math.log(80), 1000).exp(),
        }.get(kind, ((1 - SD.alphas_cumprod) / SD.alphas_cumprod).sqrt().float())

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def timestep(self, sigma: Tensor) -> Tensor:
        if self.kind == "flow":
            return sigma * 1000
        if self.kind == "edm":
            return 0.25 * sigma.log()
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(0).view(sigma.shape)

    def noise_scaling(
        self, sigma: Tensor, noise: Tensor, latent: Tensor, most: bool = False
    ) -> Tensor:
        if self.kind == "flow":
            return sigma * noise + (1 - sigma) * latent
        return noise * ((1 + sigma**2).sqrt() if most else sigma) + latent


class Patcher:
    """A model patcher around a network of one convention, exact for the smooth mixture."""

    def __init__(self, kind: str) -> None:
        self.sampling = Sampling(kind)
        self.kind = kind
        self.schedule = {"flow": FLOW, "edm": fewstep.schedule("edm")}.get(kind, SD)
        self.exact = smooth(self.schedule)

    def get_model_object(self, name: str) -> Sampling:
        assert name == "model_sampling"
        return self.sampling

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Input scaling, the network in its convention, and the conversion to data, as there."""
        wide = sigma[:, None]
        x, wide = x.double(), wide.double()
        c_in = 1 / (1 + wide**2).sqrt()
        if self.kind == "flow":
            return x - wide * self.exact(x, sigma.double(), prediction="flow")
        if self.kind == "edm":
            return self.exact(x, sigma.double(), prediction="x0")
        t = SD.time(-sigma.double().log())
        output = self.exact(x * c_in, t, prediction=self.kind)
        if self.kind == "v":
            return x * c_in**2 - wide * c_in * output
        return x - wide * output


class Guider:
    def __init__(self, patcher: Patcher) -> None:
        self.model_patcher, self.cfg, self.conds = patcher, 1.0, None

    def set_conds(self, positive: Any, negative: Any) -> None:
        self.conds = (positive, negative)

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        assert set(extra) == {"denoise_mask", "model_options", "seed"}
        return self.model_patcher.denoised(x, sigma).to(x)

    def sample(
        self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, seed: int
    ) -> Tensor:
        with torch.inference_mode():
            return sampler.sample(
                self, sigmas, {"model_options": {}, "seed": seed}, None, noise, latent
            )


class KSAMPLER:
    def __init__(self, function: Callable[..., Tensor], extra_options: Any = None) -> None:
        self.function = function

    def sample(
        self,
        guider: Guider,
        sigmas: Tensor,
        extra: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent: Tensor,
    ) -> Tensor:
        extra["denoise_mask"] = None
        model = types.SimpleNamespace(inner_model=guider)

        class Inpaint:
            inner_model = model.inner_model

            def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
                return guider(x, sigma, **options)

        sampling = guider.model_patcher.sampling
        most = math.isclose(float(sigmas[0]), float(sampling.sigma_max), rel_tol=1e-5)
        x = sampling.noise_scaling(sigmas[0], noise, latent, most)
        return self.function(
            Inpaint(), x, sigmas, extra_args=extra, callback=callback, disable=True
        )


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The node pack, imported as ComfyUI does."""
    comfy, samplers = types.ModuleType("comfy"), types.ModuleType("comfy.samplers")
    k_diffusion = types.ModuleType("comfy.k_diffusion")
    sampling = types.ModuleType("comfy.k_diffusion.sampling")
    folders = types.ModuleType("folder_paths")
    samplers.__dict__.update(
        KSAMPLER=KSAMPLER,
        CFGGuider=Guider,
        KSAMPLER_NAMES=["euler"],
        SAMPLER_NAMES=["euler", "ddim"],
        SCHEDULER_NAMES=["simple"],
        SCHEDULER_HANDLERS={},
        SchedulerHandler=lambda handler, use_ms=True: (handler, use_ms),
    )
    folders.get_output_directory = lambda: str(tmp_path)  # type: ignore[attr-defined]
    comfy.samplers, comfy.k_diffusion = samplers, k_diffusion  # type: ignore[attr-defined]
    k_diffusion.sampling = sampling  # type: ignore[attr-defined]
    for module in (comfy, samplers, k_diffusion, sampling, folders):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location(
        "fewstep_comfyui_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop(f"{spec.name}.nodes", None)


KINDS = ["eps", "v", "flow", "edm"]
Z = normal(4, 2, seed=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["unipc3", "tab3", "heun", "auto"])
def test_the_same_samples_as_through_sample(kind: str, solver: str, pack: Any) -> None:
    """From the same noise, along the levels of the sigmas node."""
    patcher = Patcher(kind)
    nodes = pack.NODE_CLASS_MAPPINGS
    (sampler,) = nodes["FewstepSampler"]().sampler(solver)
    (sigmas,) = nodes["FewstepSigmas"]().sigmas(patcher, "normal", 6)
    assert (sigmas.dtype, len(sigmas), float(sigmas[-1])) == (torch.float32, 7, 0.0)
    # There the prior of eps and v models has sqrt(1 + sigma^2), here sigma: the same state for another noise.
    top = float(sigmas[0])
    scale = {"flow": 1.0}.get(kind, top / (1 + top**2) ** 0.5)
    got = Guider(patcher).sample(Z * scale, torch.zeros(4, 2), sampler, sigmas, seed=3)
    schedule = comfyui.schedule_of(patcher.sampling)
    levels = sigmas.double()[:-1]
    rho = levels / (1 - levels) if kind == "flow" else levels
    times = schedule.time(-rho.log()).clamp(max=schedule.t_max).tolist()
    if kind == "flow":
        times[0] = schedule.t_max
    exact = smooth(schedule)
    expected = fewstep.sample(
        exact, noise=Z, solver=solver, options={"times": [*times, schedule.t_zero]}
    )
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_is_is_seen_from_what_it_does(kind: str) -> None:
    sampling = Sampling(kind)
    assert comfyui.is_flow(sampling) == (kind == "flow")
    names = {"flow": "flow", "edm": "edm"}
    schedule = comfyui.schedule_of(sampling)
    assert schedule.name == names.get(kind, "tabulated")
    assert comfyui.schedule_of(Sampling(kind)) is schedule
    if kind in ("eps", "v"):
        error = schedule.lam(torch.arange(1000.0).double()) - SD.lam(torch.arange(1000.0).double())
        assert float(error.abs().max()) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_levels_of_a_shifted_flow(shift: float) -> None:
    """ComfyUI's simple takes every N/K-th level of the table from the end, normal even timesteps through the shift."""
    sampling = Sampling("flow", shift)
    expected = [float(sampling.sigmas[-(1 + i * 200)]) for i in range(5)]
    got = comfyui.sigmas(sampling, "simple", 5)
    assert got.tolist() == pytest.approx([*expected, 0.0], abs=2e-6)
    u = torch.linspace(1, 1e-3, 5)
    expected = (shift * u / (1 + (shift - 1) * u)).tolist()
    got = comfyui.sigmas(sampling, "normal", 5, t_end=1e-3)
    assert got.tolist() == pytest.approx([*expected, 0.0], abs=2e-5)
    assert float(comfyui.sigmas(sampling, "bong_tangent", 8)[0]) == 1.0


def test_the_lists_of_ksampler(pack: Any) -> None:
    import comfy.samplers
    from comfy.k_diffusion import sampling

    patcher = Patcher("eps")
    for solver in comfyui.SAMPLERS:
        name = comfyui.listed(solver)
        for names in (comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSAMPLER_NAMES):
            assert names.count(name) == 1
        sampler = KSAMPLER(getattr(sampling, f"sample_{name}"))
        sigmas = comfyui.sigmas(patcher.sampling, "normal", 4)
        samples = Guider(patcher).sample(Z.float(), torch.zeros(4, 2), sampler, sigmas, seed=1)
        assert bool(samples.isfinite().all())
    for grid in comfyui.SCHEDULERS:
        handler, uses_sampling = comfy.samplers.SCHEDULER_HANDLERS[comfyui.listed(grid)]
        assert uses_sampling
        assert len(handler(patcher.sampling, 5)) == 6
    pack.nodes.register()  # again
    assert comfy.samplers.SAMPLER_NAMES.count("fewstep_tab3") == 1


def test_a_share_of_the_steps(pack: Any) -> None:
    """denoise is the share of the grid: its first level is that of the whole grid there."""
    patcher = Patcher("eps")
    node = pack.NODE_CLASS_MAPPINGS["FewstepSigmas"]()
    (whole,), (part,) = node.sigmas(patcher, "karras", 9), node.sigmas(patcher, "karras", 5, 0.5)
    assert torch.allclose(part[:-1], whole[4:-1], rtol=1e-5)
    (sampler,) = pack.NODE_CLASS_MAPPINGS["FewstepSampler"]().sampler("unipc2")
    image = torch.zeros(4, 2)
    assert Guider(patcher).sample(Z.float(), image, sampler, part, seed=1).shape == (4, 2)
    empty = Guider(patcher).sample(Z.float(), image, sampler, torch.tensor([3.0]), seed=1)
    assert empty.shape == (4, 2)


def test_a_model_is_measured_and_sampled_with_it(pack: Any, tmp_path: Path) -> None:
    patcher = Patcher("eps")
    nodes = pack.NODE_CLASS_MAPPINGS
    node = nodes["FewstepMeasure"]()
    latent = {"samples": torch.zeros(1, 2)}
    (report,) = node.measure(patcher, [], [], latent, 4.0, "5", 4, 0, "mine")
    assert report.startswith("5 steps: ")
    assert (tmp_path / "fewstep" / "mine.json").is_file()
    assert nodes["FewstepMeasured"].INPUT_TYPES()["required"]["file"][0] == ["mine.json"]
    assert nodes["FewstepMeasured"].IS_CHANGED(patcher, "mine.json", 5) > 0
    sampler, sigmas = nodes["FewstepMeasured"]().measured(patcher, "mine.json", 5)
    assert len(sigmas) == 6
    top = float(sigmas[0])
    noise = Z * (top / (1 + top**2) ** 0.5)
    got = Guider(patcher).sample(noise, torch.zeros(4, 2), sampler, sigmas, seed=0)
    schedule = comfyui.schedule_of(patcher.sampling)
    profile = fewstep.Profile.load(tmp_path / "fewstep" / "mine.json")
    expected = fewstep.sample(smooth(schedule), noise=Z, profile=profile, nfe=5, force=True)
    # It ends at the lowest timestep; states there are x0 + sigma z, here alpha of that.
    expected = expected / schedule.alpha(torch.zeros(()).double())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="made for another model"):
        comfyui.sigmas_of(profile, Sampling("edm"), 5)
    for name in ("../x", "", "a/b"):
        with pytest.raises(ValueError, match="plain name of a file"):
            node.measure(patcher, [], [], latent, 4.0, "5", 4, 0, name)
    with pytest.raises(ValueError, match="budgets are numbers of evaluations"):
        node.measure(patcher, [], [], latent, 4.0, "five", 4, 0, "x")


def test_nodes_are_described_as_comfyui_reads_them(pack: Any) -> None:
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        assert name in pack.NODE_DISPLAY_NAME_MAPPINGS
        assert callable(getattr(node(), node.FUNCTION))
        assert node.CATEGORY.startswith("sampling/")
        for section in node.INPUT_TYPES().values():
            for kind, *options in section.values():
                assert isinstance(kind, (str, list))
                assert len(options) <= 1
    with pytest.raises(TypeError, match="no option 'eta'"):
        pack.NODE_CLASS_MAPPINGS["FewstepSampler"]().sampler("tab3", eta=0.5)


def test_the_workflow_fits_the_nodes(pack: Any) -> None:
    content = json.loads((PACK / "workflow.json").read_text(encoding="utf-8"))
    by_id = {node["id"]: node for node in content["nodes"]}
    assert content["last_node_id"] == max(by_id)
    for link, source, slot, target, place, kind in content["links"]:
        output, given = by_id[source]["outputs"][slot], by_id[target]["inputs"][place]
        assert link in output["links"]
        assert given["link"] == link
        assert output["type"] == given["type"] == kind
    ours = [node for node in content["nodes"] if node["type"] in pack.NODE_CLASS_MAPPINGS]
    assert {node["type"] for node in ours} == {"FewstepSampler", "FewstepSigmas"}
    for node in ours:
        inputs = pack.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        widgets = [
            spec for section in inputs.values() for spec in section.values() if spec[0] != "MODEL"
        ]
        assert len(node["widgets_values"]) == len(widgets)
        for value, (kind, *_) in zip(node["widgets_values"], widgets, strict=True):
            assert not isinstance(kind, list) or value in kind


def test_the_picture_of_the_workflow_has_its_nodes() -> None:
    pytest.importorskip("matplotlib")
    path = PACK.parents[1] / "scripts" / "comfyui_picture.py"
    spec = importlib.util.spec_from_file_location("comfyui_picture", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    content = json.loads((PACK / "workflow.json").read_text(encoding="utf-8"))
    texts = {text.get_text() for text in script.picture(content).axes[0].texts}
    for node in content["nodes"]:
        assert script.TITLES[node["type"]] in texts
        assert {str(v) for v in node["widgets_values"] if isinstance(v, str)} <= texts
    assert "](workflow.png)" in (PACK / "README.md").read_text(encoding="utf-8")
    assert (PACK / "workflow.png").read_bytes().startswith(b"\x89PNG")


def test_the_nodes_of_a_new_user(pack: Any) -> None:
    """Theirs by name in both nodes, and ours in the lists of KSampler."""
    nodes, patcher = pack.NODE_CLASS_MAPPINGS, Patcher("eps")
    (sampler,) = nodes["FewstepSampler"]().sampler("dpmpp-2m")
    (sigmas,) = nodes["FewstepSigmas"]().sigmas(patcher, "beta57", 6)
    zeros = torch.zeros(4, 2)
    samples = Guider(patcher).sample(Z * sigmas[0], zeros, sampler, sigmas, seed=3)
    assert samples.shape == (4, 2)
    assert bool(samples.isfinite().all())
    assert "fewstep_unipc3" in sys.modules["comfy.samplers"].SAMPLER_NAMES
