"""Pipelines that were saved with a PlanScheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from fewstep.adapters.diffusers.scheduler import PlanScheduler
from fewstep.base.files import read_json
from fewstep.base.paths import check_path


def load_pipeline(path: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Loads a pipeline that was saved with a :class:`PlanScheduler`.

    Importing this module is what ``DiffusionPipeline.from_pretrained`` needs; some pipelines
    (DDIM's) then exchange the scheduler for their own, which is undone here.

    Arguments:
        path: The folder of the pipeline.
        kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``.

    Raises:
        ValueError: If there is no such folder.
    """
    check_path(path, "path")
    folder = Path(path)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"the folder {str(path)!r} holds no pipeline: it has no model_index.json")
    kwargs.setdefault("use_safetensors", True)
    pipe = DiffusionPipeline.from_pretrained(folder, **kwargs)
    if "scheduler" not in kwargs and not isinstance(pipe.scheduler, PlanScheduler):
        file = folder / "scheduler" / "scheduler_config.json"
        config = (
            read_json(file, what="scheduler", infinite=True, foreign=True)
            if file.is_file()
            else None
        )
        if isinstance(config, dict) and config.get("_class_name") == "PlanScheduler":
            pipe.scheduler = PlanScheduler.from_pretrained(folder, subfolder="scheduler")
    return pipe
