"""How much of a network's own rate sampling reaches: fewstep and the loop of a diffusers pipeline.

Usage: python benchmarks/throughput.py [--model fashion|unet] [--device cpu] [--batch 64] [--batches 2]
           [--nfe 10] [--rounds 7] [--threads 1] [--precision float32] [--compile MODE] [--out FILE]

The network's own rate is that of its evaluations alone, on states that lie on the device, one after
another without a wait. Everything else draws whole batches from numbered noise: deterministic (``ddim``)
and stochastic (``ddpm``; in diffusers ``eta = 1``), with the initial and the step noise, up to samples
that have been checked for NaN. All contenders run in turn in each round; a ratio is the median over the
rounds of the ratio within a round, so what else the machine does matters little. Times of the
process (CPU seconds) are beside the clock's.

``unet`` is an untrained U-Net of diffusers with 36 million weights for (3, 32, 32).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from _common import print_table, say_what_runs
from fewstep.models.compiling import check_mode, compiled
from fewstep.models.denoiser import Denoiser

RESULTS = Path(__file__).parent / "results" / "throughput.json"
Contender = Callable[[], object]


def model_of(name: str, device: str, precision: torch.dtype) -> tuple[Denoiser, dict[str, Any]]:
    """Returns a model and its conditions for one sample."""
    if name != "unet":
        loaded = fewstep.load(name, device=device)
        if precision != torch.float32:
            loaded.to(precision)
        return loaded, {"class_labels": 3} if loaded.null_condition else {}
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    made = Denoiser.wrap(
        network,
        schedule=fewstep.schedule("ddpm-linear"),
        prediction="eps",
        event_shape=(3, 32, 32),
        device=device,
        dtype=precision,
    )
    return made, {}


def network_alone(
    model: Denoiser, cond: dict[str, Any], batch: int, batches: int, nfe: int
) -> Contender:
    """Returns what evaluates the network as often as a sampler, and does nothing else."""
    assert model.event_shape is not None
    x = torch.randn(batch, *model.event_shape, device=model.device)
    t = torch.linspace(model.schedule.t_max, model.schedule.t_min, nfe, device=model.device)
    times = [one.expand(batch) for one in t.unbind()]
    ready = model.prepare(batch, cond)

    def run() -> Tensor:
        value = x
        with torch.no_grad():
            for _ in range(batches):
                for k in range(nfe):
                    value = model.raw(x, times[k], **ready)
        return value.sum().cpu()

    return run


def ours(
    model: Denoiser, cond: dict[str, Any], batch: int, batches: int, nfe: int, solver: str
) -> Contender:
    """Returns a call of ``fewstep.sample``."""
    return lambda: fewstep.sample(
        model, batch * batches, solver=solver, nfe=nfe, batch_size=batch, **cond
    )


def of_diffusers(
    model: Denoiser, cond: dict[str, Any], batch: int, batches: int, nfe: int, eta: float
) -> Contender | None:
    """Returns the loop of ``DDIMPipeline`` over the same network, or ``None`` without diffusers."""
    try:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from diffusers.utils.torch_utils import randn_tensor
    except ImportError:
        return None
    assert model.event_shape is not None
    shape, device = (batch, *model.event_shape), model.device
    ready = model.prepare(batch, cond)
    scheduler = DDIMScheduler(clip_sample=False)

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.zeros(())
        with torch.no_grad():
            for _ in range(batches):
                x = randn_tensor(shape, generator=generator, device=device)
                scheduler.set_timesteps(nfe)
                for t in scheduler.timesteps:
                    output = model.raw(x, t.to(device).float().expand(batch), **ready)
                    x = scheduler.step(
                        output, t, x, eta=eta, generator=generator, return_dict=False
                    )[0]
        return x.sum().cpu()

    return run


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Returns seconds of the clock and of the process of each contender in each round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        order = list(contenders.items())
        for name, run in order if number % 2 else reversed(order):
            clock, process = time.perf_counter(), time.process_time()
            run()
            if number:
                times[name].append((time.perf_counter() - clock, time.process_time() - process))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--nfe", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bfloat16", "float16")
    )
    parser.add_argument("--compile", help="also measure with torch.compile in this mode")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    check_mode(chosen.compile)
    model, cond = model_of(chosen.model, chosen.device, getattr(torch, chosen.precision))
    sizes = (chosen.batch, chosen.batches, chosen.nfe)
    contenders: dict[str, Contender | None] = {
        "network alone": network_alone(model, cond, *sizes),
        "fewstep, deterministic": ours(model, cond, *sizes, "ddim"),
        "fewstep, stochastic": ours(model, cond, *sizes, "ddpm"),
        "diffusers loop, deterministic": of_diffusers(model, cond, *sizes, 0.0),
        "diffusers loop, stochastic": of_diffusers(model, cond, *sizes, 1.0),
    }
    if chosen.compile:
        for name in ("network alone", "fewstep, deterministic", "fewstep, stochastic"):
            contenders[f"{name}, compiled"] = inside(model, chosen.compile, contenders[name])
    times = measure({k: run for k, run in contenders.items() if run is not None}, chosen.rounds)

    where = "CPU" if model.device.type == "cpu" else torch.cuda.get_device_name(model.device)
    evaluations = chosen.batch * chosen.batches * chosen.nfe
    say_what_runs(
        f"{chosen.model} on {where}, {chosen.precision}, batch {chosen.batch}, {chosen.batches} batches, "
        f"{chosen.nfe} evaluations, {chosen.rounds} rounds.",
        ("diffusers",),
    )
    rows, results = [], {}
    base = times["network alone"]
    for name, measured in times.items():
        wall, process = (statistics.median(m[i] for m in measured) for i in (0, 1))
        ratios = [
            statistics.median(b[i] / m[i] for b, m in zip(base, measured, strict=True))
            for i in (0, 1)
        ]
        results[name] = {
            "seconds": wall,
            "cpu_seconds": process,
            "evaluations_per_second": evaluations / wall,
            "ratio": ratios[0],
            "ratio_of_cpu": ratios[1],
        }
        rows.append(
            [
                name,
                f"{evaluations / wall:.1f}",
                f"{100 * ratios[0]:.1f} %",
                f"{100 * ratios[1]:.1f} %",
            ]
        )
    print_table(("what", "evaluations a second", "of the network's rate", "in CPU seconds"), rows)
    settings = {k: v for k, v in vars(chosen).items() if k != "out"}
    if chosen.out.exists():
        known = json.loads(chosen.out.read_text())
    else:
        known = []
    known = [one for one in known if one["settings"] != settings]
    known.append(
        {"settings": settings, "device": where, "torch": torch.__version__, "results": results}
    )
    chosen.out.write_text(json.dumps(known, indent=1) + "\n")


def inside(model: Denoiser, mode: str, run: Contender | None) -> Contender:
    """Returns the same contender with the network compiled."""
    assert run is not None

    def compiled_run() -> object:
        with compiled(model, mode):
            return run()

    return compiled_run


if __name__ == "__main__":
    main()
