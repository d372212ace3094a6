"""PlanScheduler in real pipelines of diffusers, against diffusers' own scheduler of the same method."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import tiny_pipelines as tiny
from forks import FORKS, in_fork

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from fewstep.adapters.diffusers import PlanScheduler, load_pipeline, plan_from_scheduler  # noqa: E402

pytestmark = [pytest.mark.slow, *tiny.MARKS]
LATENT = tiny.LATENT
seeded = tiny.seeded

ROUNDING = 2e-4
"""Of float32 through a network and a decoder; pictures are in [0, 1]."""


def embeddings(seed: int) -> torch.Tensor:
    return tiny.normal((1, 8, 16), seed)


TEXT = {"prompt_embeds": embeddings(1), "negative_prompt_embeds": embeddings(2)}
POOLED = {
    "pooled_prompt_embeds": embeddings(1)[:, 0],
    "negative_pooled_prompt_embeds": embeddings(2)[:, 0],
}
PICTURE = torch.rand(1, 3, 16, 16, generator=seeded(3))
MASK = (torch.rand(1, 1, 16, 16, generator=seeded(4)) > 0.5).float()


def ddpm(scheduler: Any) -> Any:
    return diffusers.DDPMPipeline(tiny.unet2d(), scheduler)


def ddim(scheduler: Any) -> Any:
    pipe = diffusers.DDIMPipeline(tiny.unet2d(), diffusers.DDIMScheduler(clip_sample=False))
    pipe.scheduler = scheduler
    return pipe


def dit(scheduler: Any) -> Any:
    return diffusers.DiTPipeline(tiny.dit(), tiny.vae(), scheduler)


def sdxl(scheduler: Any) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=tiny.vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=tiny.unet_text(True),
        scheduler=scheduler,
        add_watermarker=False,
    )


def sd3(scheduler: Any) -> Any:
    nothing = dict.fromkeys(
        (
            "text_encoder",
            "tokenizer",
            "text_encoder_2",
            "tokenizer_2",
            "text_encoder_3",
            "tokenizer_3",
        )
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=tiny.sd3_transformer(), scheduler=scheduler, vae=tiny.vae(4, 0.1), **nothing
    )


def video(scheduler: Any) -> Any:
    return diffusers.TextToVideoSDPipeline(
        vae=tiny.vae(),
        text_encoder=tiny.clip_text(),
        tokenizer=None,
        unet=tiny.unet3d(),
        scheduler=scheduler,
    )


def sd(kind: str) -> Callable[[Any], Any]:
    return lambda scheduler: tiny.stable_diffusion(scheduler, kind)


PIPELINES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "ddpm": (ddpm, {}),
    "ddim": (ddim, {}),
    "dit": (dit, {"class_labels": [1, 7]}),
    "text": (sd("StableDiffusionPipeline"), {**TEXT, "height": 16, "width": 16}),
    "img2img": (sd("StableDiffusionImg2ImgPipeline"), {**TEXT, "image": PICTURE, "strength": 0.6}),
    "inpaint": (
        sd("StableDiffusionInpaintPipeline"),
        {**TEXT, "image": PICTURE, "mask_image": MASK, "strength": 0.8, "height": 16, "width": 16},
    ),
    "sdxl": (sdxl, {**TEXT, **POOLED, "height": 16, "width": 16}),
    "sd3": (sd3, {**TEXT, **POOLED, "height": 16, "width": 16}),
    "video": (video, {**TEXT, "height": 16, "width": 16, "num_frames": 2}),
}


def draw(pipe: Any, arguments: dict[str, Any], steps: int = 6, seed: int = 0) -> numpy.ndarray:
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)  # DiT and SD3 pass no generator to the scheduler
    result = pipe(num_inference_steps=steps, generator=seeded(seed), output_type="np", **arguments)
    return numpy.asarray(result.frames if hasattr(result, "frames") else result.images)


DEIS = ("logrhoab1", "DEISMultistepScheduler", {"steps_offset": 1})
DDIM = ("ddim", "DDIMScheduler", {"clip_sample": False, "steps_offset": 1})
PP2M = ("dpmpp-2m", "DPMSolverMultistepScheduler", {"steps_offset": 1})
UNIPC = ("unipc2", "UniPCMultistepScheduler", {"steps_offset": 1})
HEUN = ("heun", "HeunDiscreteScheduler", {"steps_offset": 1})
EULER = ("ddim", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
FLOW_UNIPC = (
    "unipc2",
    "UniPCMultistepScheduler",
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
)
SAME = [
    ("ddpm", ("ddpm", "DDPMScheduler", {"clip_sample": False})),
    ("ddpm", ("ddpm", "DDPMScheduler", {"clip_sample": True})),
    ("ddpm", (*PP2M[:2], {})),
    ("ddim", (*DDIM[:2], {"clip_sample": False})),
    ("dit", DDIM),
    ("dit", PP2M),
    *[("text", case) for case in (DDIM, DEIS, PP2M, UNIPC)],
    *[("img2img", case) for case in (DDIM, DEIS, PP2M, UNIPC)],
    *[("inpaint", case) for case in (DDIM, DEIS, PP2M, UNIPC)],
    *[("sdxl", case) for case in (DDIM, DEIS, PP2M, UNIPC)],
    ("sd3", EULER),
    *[("video", case) for case in (DDIM, DEIS, PP2M, UNIPC)],
]


@pytest.mark.parametrize(
    ("name", "case"), SAME, ids=[f"{name}-{case[0]}-{n}" for n, (name, case) in enumerate(SAME)]
)
def test_same_pictures_as_diffusers(name, case):
    solver, twin, config = case
    build, arguments = PIPELINES[name]
    levels = LATENT if name in ("text", "img2img", "inpaint", "sdxl", "video") else {}
    theirs = getattr(diffusers, twin)(**config, **({} if "Flow" in twin else levels))
    want = draw(build(theirs), arguments)
    got = draw(build(PlanScheduler.from_config(theirs.config, solver=solver)), arguments)
    assert want.std() > 0.01
    assert numpy.abs(got - want).max() < ROUNDING


def test_latent_consistency_pipelines_run_the_plan_of_their_own_scheduler_and_any_solver():
    """They read the predicted data beside the next state, and pass original_inference_steps."""
    theirs = diffusers.LCMScheduler(**LATENT)
    kind, unet = "LatentConsistencyModelPipeline", tiny.unet_text(time_cond_proj_dim=8)
    arguments = {"prompt_embeds": TEXT["prompt_embeds"], "height": 16, "width": 16}

    def made(scheduler: Any, **more: Any) -> numpy.ndarray:
        pipe = tiny.stable_diffusion(scheduler, kind, unet=unet)
        return draw(pipe, {**arguments, **more}, 4)

    plan = plan_from_scheduler(theirs, 4).to_json()
    want = made(theirs)
    assert want.std() > 0.01
    got = made(PlanScheduler.from_config(theirs.config, recipe=plan))
    assert numpy.abs(got - want).max() < ROUNDING
    ours = PlanScheduler.from_config(theirs.config, solver="tab2")
    other = made(ours, original_inference_steps=20)
    assert numpy.isfinite(other).all()
    assert ours.timesteps.tolist() == [999, 749, 499, 249]


def test_unipc_in_a_flow_pipeline():
    """diffusers truncates the conditioning timesteps to integers: equal, but not to rounding."""
    solver, twin, config = FLOW_UNIPC
    build, arguments = PIPELINES["sd3"]
    theirs = getattr(diffusers, twin)(**config)
    want = draw(build(theirs), arguments)
    got = draw(build(PlanScheduler.from_config(theirs.config, solver=solver)), arguments)
    assert want.std() > 0.01
    assert numpy.abs(got - want).max() < 5 * ROUNDING


def test_heun_in_text_to_image():
    """Steps on training timesteps: between them diffusers interpolates otherwise."""
    solver, twin, _ = HEUN
    build, arguments = PIPELINES["text"]
    theirs = getattr(diffusers, twin)(**LATENT)
    want = draw(build(theirs), arguments, 10)
    ours = PlanScheduler.from_config(theirs.config, solver=solver)
    assert numpy.abs(draw(build(ours), arguments, 10) - want).max() < ROUNDING


@functools.cache
def _fine(name: str, **base: Any) -> numpy.ndarray:
    build, arguments = PIPELINES[name]
    ddim = PlanScheduler(solver="ddim", final_sigmas_type="zero", **base)
    return draw(build(ddim), arguments, 24)


@pytest.mark.parametrize("name", list(PIPELINES))
@pytest.mark.parametrize("solver", ["tab3", "rho-heun", "edm-stochastic"])
def test_other_solvers_run_and_agree_with_ddim_on_many_steps(name, solver):
    """Few steps of a good solver are near many of DDIM (stochastic: they run, and follow the seed)."""
    build, arguments = PIPELINES[name]
    if solver == "edm-stochastic" and name in ("img2img", "inpaint"):
        pytest.skip("it would add noise before the first call")
    steps = 4 if solver == "edm-stochastic" else 8
    base = {} if name == "sd3" else {"steps_offset": 0, "timestep_spacing": "linspace"}
    if name == "sd3":
        base["prediction_type"] = "flow_prediction"
    one = draw(
        build(PlanScheduler(solver=solver, final_sigmas_type="zero", **base)), arguments, steps
    )
    if solver == "edm-stochastic":
        again = PlanScheduler(solver=solver, final_sigmas_type="zero", **base)
        assert numpy.array_equal(one, draw(build(again), arguments, steps))
    else:
        assert numpy.abs(one - _fine(name, **base)).mean() < 0.05


def test_eight_threads_share_one_pipeline():
    build, arguments = PIPELINES["text"]
    pipe = build(PlanScheduler(solver="tab3", **LATENT))
    steps = [2, 3, 4, 5, 6, 7, 8, 9]
    alone = [draw(pipe, arguments, n, seed) for seed, n in enumerate(steps)]
    together: dict[int, numpy.ndarray] = {}
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(2):
                together[seed] = draw(pipe, arguments, steps[seed], seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed in range(8):
        assert numpy.abs(together[seed] - alone[seed]).max() < 1e-5


@pytest.mark.filterwarnings(FORKS)
def test_saved_pipelines_come_back_in_a_fresh_process(tmp_path):
    """DDIMPipeline puts its own scheduler in; load_pipeline puts ours back. One process for both."""
    wanted = {}
    for kind in ("ddpm", "ddim"):
        build, arguments = PIPELINES[kind]
        pipe, folder = build(PlanScheduler(solver="tab2", grid="log-rho")), tmp_path / kind
        pipe.save_pretrained(folder)
        wanted[folder] = draw(load_pipeline(folder), arguments, 4)
        assert numpy.abs(draw(pipe, arguments, 4) - wanted[folder]).max() < ROUNDING

    def come_back() -> None:
        from fewstep.adapters.diffusers import load_pipeline

        for folder, want in wanted.items():
            pipe = load_pipeline(folder)
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            result = pipe(num_inference_steps=4, generator=generator, output_type="np")
            assert pipe.scheduler.config.solver == "tab2"
            assert numpy.abs(result.images - want).max() < ROUNDING

    in_fork(come_back)


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model_index\.json"):
        load_pipeline(tmp_path)
