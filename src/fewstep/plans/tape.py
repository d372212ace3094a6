r"""The tape: solvers write their equations here, and what they wrote is the plan.

A :class:`Form` is a linear combination of registers. It can be added and scaled and nothing
else, so whatever can be written on a tape is a valid plan.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.scalars import vector
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Noise, Row, Structure

Scalar = Tensor | float


class Form:
    r"""A linear combination :math:`\sum_j c_j r_j` of registers; the weights are numbers or 0-dimensional tensors."""

    __slots__ = ("is_register", "weights")

    def __init__(self, weights: Mapping[int, Scalar], *, is_register: bool = False) -> None:
        self.weights = dict(weights)
        self.is_register = is_register

    def __add__(self, other: Form) -> Form:
        if not isinstance(other, Form):
            return NotImplemented
        weights = dict(self.weights)
        for register, c in other.weights.items():
            weights[register] = weights[register] + c if register in weights else c
        return Form(weights)

    def __mul__(self, scale: Scalar) -> Form:
        return Form({register: c * scale for register, c in self.weights.items()})

    __rmul__ = __mul__

    def __truediv__(self, scale: Scalar) -> Form:
        return Form({register: c / scale for register, c in self.weights.items()})

    def __neg__(self) -> Form:
        return self * -1.0

    def __sub__(self, other: Form) -> Form:
        return self + (-other)


class Tape:
    """Records rows; :attr:`x` is the initial state.

    Arguments:
        grid: The grid that the solver walks along.
        prediction: The prediction that the equations are written for.
    """

    def __init__(self, grid: TimeGrid, prediction: Prediction) -> None:
        self.grid = grid
        self.prediction = prediction
        self.x = self._register(0)
        self._rows: list[Row] = []
        self._values: list[Scalar] = []
        self._times: list[Scalar] = []
        self._noises = 0

    @staticmethod
    def _register(index: int) -> Form:
        return Form({index: 1.0}, is_register=True)

    def _append(self, row: Row) -> Form:
        self._rows.append(row)
        return self._register(len(self._rows))

    def state(self, form: Form, knot: int | None = None) -> Form:
        """Gives a form a register of its own; ``knot`` is the index of the grid point whose state it is."""
        row = Lin(tuple(form.weights), len(self._values), knot)
        self._values.extend(form.weights.values())
        return self._append(row)

    def evaluate(self, form: Form, t: Scalar) -> tuple[Form, Form]:
        """Evaluates the network at a form and a time; returns the form as a register, and the model output."""
        y = form if form.is_register else self.state(form)
        (register,) = y.weights
        self._times.append(t)
        return y, self._append(Eval(register, len(self._times) - 1))

    def noise(self) -> Form:
        """Draws a standard normal."""
        self._noises += 1
        return self._append(Noise(self._noises - 1))

    def finish(self, result: Form, name: str) -> Plan:
        """Returns the plan whose sample is ``result``."""
        if not result.is_register:
            result = self.state(result, self.grid.steps)
        (register,) = result.weights
        return Plan(
            Structure(self.prediction, tuple(self._rows), register),
            vector(self._values),
            vector(self._times),
            self.grid.times,
            self.grid.schedule,
            name=name,
            ends_at_zero=self.grid.ends_at_zero,
        )
