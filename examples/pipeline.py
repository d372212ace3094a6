"""A pipeline of diffusers with one of our schedulers: a line to set it, saved and loaded with the pipeline."""

import tempfile

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from fewstep.adapters.diffusers import PlanScheduler

# A tiny pipeline with random weights stands for yours: DiffusionPipeline.from_pretrained(...).
torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
)  # fmt: skip
pipeline = DDPMPipeline(unet, DDPMScheduler(clip_sample=False))
pipeline.set_progress_bar_config(disable=True)


def picture(steps: int) -> torch.Tensor:
    """The picture of one seed."""
    generator = torch.Generator().manual_seed(1)
    return torch.as_tensor(
        pipeline(generator=generator, num_inference_steps=steps, output_type="np").images
    )


pipeline.scheduler = PlanScheduler.from_config(pipeline.scheduler.config, solver="auto")
pictures = {steps: picture(steps) for steps in (5, 10, 100)}
for steps in (5, 10):
    far = float((pictures[steps] - pictures[100]).square().mean().sqrt())
    print(f"auto, {steps} evaluations: {far:.4f} from 100")

with tempfile.TemporaryDirectory() as folder:
    pipeline.save_pretrained(folder)
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    print("loaded again:", type(pipeline.scheduler).__name__, torch.equal(picture(5), pictures[5]))
