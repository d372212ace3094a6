"""Network evaluations of a part in progress, kept so that a part that was interrupted resumes within it.

A part of a study is a computation whose cost is its network evaluations. They are written beside the parts of
the run every few seconds, and when the process is interrupted. The same part, computed again, takes each evaluation
from there whose state, time and conditions are the same, so at most the last seconds are lost, and nothing
at Ctrl-C or SIGTERM. The files are removed when the part is written.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fewstep.base.interrupts import unbroken
from fewstep.base.runs import RunFolder
from fewstep.models.denoiser import Denoiser

SECONDS = 5.0
"""The time after which new evaluations are written."""

MOST = 1 << 26
"""The bytes of new evaluations after which they are written."""


FEW = 8
"""The conditions whose digests are remembered."""


class KeptEvaluations:
    """Keeps the evaluations of the parts of a run.

    .. code-block:: python

        kept = KeptEvaluations(run)
        with kept.of(denoiser), kept.part("budget-5"):
            run.write_record("budget-5", ...)  # evaluates the denoiser

    Arguments:
        run: The folder of the run; ``None`` keeps nothing.
    """

    def __init__(self, run: RunFolder | None) -> None:
        self._run = run
        self._parts: list[_Part] = []

    @contextmanager
    def of(self, denoiser: Denoiser) -> Iterator[None]:
        """Within the block, evaluations of the model inside of all wrappers are kept."""
        while isinstance(inner := getattr(denoiser, "inner", None), Denoiser):
            denoiser = inner
        before = vars(denoiser).get("raw")
        denoiser.raw = self.wrapped(denoiser.raw)  # type: ignore[method-assign]
        try:
            yield
        finally:
            if before is None:
                del denoiser.raw
            else:
                denoiser.raw = before  # type: ignore[method-assign]

    def wrapped(self, raw: Callable[..., Tensor], name: str = "") -> Callable[..., Tensor]:
        """Returns a function like :meth:`Denoiser.raw` whose evaluations are kept.

        Arguments:
            raw: The function.
            name: Distinguishes it from others that are evaluated in the same part.
        """

        def kept(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            part = self._parts[-1] if self._parts else None
            if part is None or (torch.is_grad_enabled() and x.requires_grad):
                return raw(x, t, **cond)
            value = part.find(name, x, t, cond)
            if value is None:
                value = raw(x, t, **cond)
                part.add(name, x, t, cond, value)
            return value

        return kept

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within the block a part of the run is computed and written."""
        if self._run is None:
            yield
            return
        part = _Part(self._run, name)
        self._parts.append(part)
        try:
            yield
        except KeyboardInterrupt:
            with unbroken():  # schedulers send SIGTERM more than once
                part.write()
            raise
        finally:
            self._parts.remove(part)
        part.remove()


class _Part:
    def __init__(self, run: RunFolder, name: str) -> None:
        self.run, self.name = run, name
        self.new: list[tuple[str, Tensor, Tensor, str, Tensor]] = []
        self.bytes, self.written = 0, time.monotonic()
        self.known: dict[str, Tensor] = {}
        self.read = 0  # the files that were read
        self.count = 0
        while run.tensors_file(self.file(self.count)).exists():
            self.count += 1
        self.left = self.count > 0
        self.conditions: OrderedDict[int, tuple[Any, str]] = OrderedDict()

    def file(self, number: int) -> str:
        return f"{self.name}.evaluations-{number}"

    def find(self, name: str, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor | None:
        """Returns the output of an evaluation of the interrupted part; they come in the same order again."""
        if not self.left:
            return None
        key = _key(name, x, t, self.digest_of(cond))
        while key not in self.known:
            if self.read == self.count:
                self.left, self.known = False, {}
                return None
            self.known = self.run.read_tensors(self.file(self.read)) or {}
            self.read += 1
        return self.known[key].to(x.device)

    def add(self, name: str, x: Tensor, t: Tensor, cond: Mapping[str, Any], value: Tensor) -> None:
        # Copies: executors write into states and outputs that nobody reads any more.
        digest = self.digest_of(cond)
        self.new.append((name, x.detach().clone(), t.clone(), digest, value.detach().clone()))
        self.bytes += 2 * x.numel() * x.element_size()
        if self.bytes > MOST or time.monotonic() - self.written > SECONDS:
            self.write()

    def write(self) -> None:
        if self.new:
            tensors = {_key(name, x, t, cond): value for name, x, t, cond, value in self.new}
            self.run.write_tensors(self.file(self.count), tensors)
            self.count += 1
            self.read = max(self.read, self.count)  # own ones are not looked for
        self.new.clear()
        self.bytes, self.written = 0, time.monotonic()

    def remove(self) -> None:
        for number in range(self.count):
            self.run.tensors_file(self.file(number)).unlink(missing_ok=True)

    def digest_of(self, cond: Mapping[str, Any]) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(cond.items()):
            # Often the same object in all evaluations of a batch.
            if id(value) not in self.conditions:
                own = hashlib.sha256()
                _add(own, value)
                self.conditions[id(value)] = value, own.hexdigest()
                if len(self.conditions) > FEW:
                    self.conditions.popitem(last=False)
            digest.update(f"{name}={self.conditions[id(value)][1]}".encode())
        return digest.hexdigest()


def _key(name: str, x: Tensor, t: Tensor, cond: str) -> str:
    digest = hashlib.sha256(f"{name} {cond}".encode())
    _add(digest, x)
    _add(digest, t)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(f"{key}:".encode())
            _add(digest, value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            _add(digest, one)
    else:
        digest.update(repr(value).encode())
