"""Trajectories a second that the store gives, beside a plain memory map and simpler readers.

Random batches of 256 trajectories of 28 x 28, five states each (x_T and M = 4), from float16 on
disk to float32 tensors, on one thread, with the files in the page cache; medians of rounds, CPU
time (so a busy machine hurts all alike). The contenders:

- ``TrajectoryStore.read``, in random order, and in the order of an epoch (windows of shards);
- one flat file of all states as a ``numpy.memmap`` with fancy indexing: the least that can be done;
- ``safetensors.safe_open`` and a slice for each trajectory, all files kept open;
- the naive reader, which loads the whole shard for each trajectory.

All are checked to give the same numbers. It prints a table as in docs/results.md, and how long a
trajectory takes to write (a model that costs nothing).

With ``--spectrum`` instead: the spectrum over time of trajectories of the embedded model, in both
variables, which says how many modes and frames an operator needs (16 trajectories, 4096 network evaluations).

Run: ``python benchmarks/record.py [--n 32768] [--rounds 5] [--spectrum]``
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import fewstep
from fewstep.trajectories import Cycle, TrajectoryStore, spectrum
from fewstep.trajectories.shards import shard_file

BATCH, SHARD, FRAMES = 256, 1024, 4
PROMISED = 20_000
"""Trajectories a second that the store is to give."""

Reader = Callable[[list[int]], Tensor]


def write(folder: Path, n: int) -> TrajectoryStore:
    """Records with a network that costs next to nothing."""
    model = fewstep.Denoiser.wrap(
        lambda x, t: x * 0.1,
        schedule=fewstep.schedule("vp-linear"),
        prediction="eps",
        event_shape=(1, 28, 28),
    )
    return fewstep.record(
        model, folder, n=n, solver="ddim", nfe=FRAMES, shard_size=SHARD, batch_size=BATCH
    )


def flat(store: TrajectoryStore, folder: Path) -> Reader:
    """One file of all states, and fancy indexing."""
    shape = (len(store), FRAMES + 1, *store.event_shape)
    file = numpy.memmap(folder / "flat.bin", dtype=numpy.float16, mode="w+", shape=shape)
    for rows in torch.arange(len(store)).split(SHARD):
        states = store.read(rows).states.half()
        file[int(rows[0]) : int(rows[-1]) + 1] = states.numpy()
    file.flush()
    array = numpy.memmap(folder / "flat.bin", dtype=numpy.float16, mode="r", shape=shape)
    return lambda rows: torch.from_numpy(array[rows]).float()


def slices(store: TrajectoryStore) -> Reader:
    """The library's own slices, all files open."""
    files = [
        safe_open(str(shard_file(store.folder, shard)), framework="pt")
        for shard in range(-(-len(store) // SHARD))
    ]
    parts = [file.get_slice("states") for file in files]
    return lambda rows: torch.stack([parts[i // SHARD][i % SHARD] for i in rows]).float()


def naive(store: TrajectoryStore) -> Reader:
    """Loads a whole shard for each trajectory."""
    return lambda rows: torch.stack(
        [load_file(shard_file(store.folder, i // SHARD))["states"][i % SHARD] for i in rows]
    ).float()


def rate(reader: Reader, batches: list[list[int]]) -> float:
    """Returns trajectories a second of CPU time: other programs on the machine do not count."""
    begin = time.thread_time()
    for rows in batches:
        reader(rows)
    return sum(map(len, batches)) / (time.thread_time() - begin)


def print_spectrum(n: int = 16, states: int = 128) -> None:
    """Prints what an operator for the embedded model needs, by the variable of its frames."""
    model = fewstep.load("fashion")
    print("| frames even in | basis | J = 1 | 2 | 3 | 4 | J for 99 % | 99.9 % | spline M |")
    print("|---|---|---|---|---|---|---|---|---|")
    for variable, grid in (("the square root of t", "quadratic"), ("t", "uniform")):
        with tempfile.TemporaryDirectory() as name:
            options = {"n": n, "nfe": FRAMES, "grid": grid, "keep": f"{grid}:{FRAMES}"}
            store = fewstep.record(model, name, class_labels=Cycle(range(10)), **options)
            found = spectrum(store, model, n=n, states=states)
        for basis in (found.dct, found.dft):
            left = (1 - basis.energy.cumsum(0)).clamp_min(0)
            shares = " | ".join(f"{float(share):.1e}" for share in left[:4])
            print(
                f"| {variable} | {basis.name} | {shares} | {basis.modes_99} | {basis.modes} | "
                f"{found.spline_frames} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spectrum", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.spectrum:
        return print_spectrum()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        store = write(folder / "store", arguments.n)
        spent = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in (folder / "store").glob("shard-*"))
        print(
            f"wrote {arguments.n} trajectories, {size / 1e6:.0f} MB, {arguments.n / spent:.0f}/s"
        )

        generator = torch.Generator().manual_seed(0)
        many = torch.randint(arguments.n, (40, BATCH), generator=generator).tolist()
        epoch = store.order(seed=0, epoch=0)[: 40 * BATCH].split(BATCH)
        ordered = [rows.tolist() for rows in epoch]

        def ours(rows: list[int]) -> Tensor:
            return store.read(rows).states

        contenders: dict[str, tuple[Reader, list[list[int]]]] = {
            "TrajectoryStore.read, random order": (ours, many),
            "TrajectoryStore.read, order of an epoch": (ours, ordered),
            "numpy.memmap of one flat file, random order": (flat(store, folder), many),
            "safe_open, a slice for each, random order": (slices(store), many),
            "a shard loaded for each, random order": (naive(store), [many[0][:32]]),
        }
        for reader, _ in contenders.values():
            assert torch.equal(reader(many[0][:32]), ours(many[0][:32]))
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, (reader, batches) in contenders.items():
                rates[name].append(rate(reader, batches))
    print("\n| reader | trajectories a second on a core |\n|---|---|")
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):,.0f} |")
    first = statistics.median(next(iter(rates.values())))
    print(f"\npromised: {PROMISED:,}; {'kept' if first >= PROMISED else 'NOT kept'}")


if __name__ == "__main__":
    main()
