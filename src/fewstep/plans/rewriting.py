r"""The same sampler for another prediction: rows rewritten exactly, once per plan."""

from __future__ import annotations

from dataclasses import replace

import torch

from fewstep.diffusion.prediction import Prediction, coefficients
from fewstep.diffusion.scalars import column
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin
from fewstep.plans.tape import Form, Tape

SMALL_ALPHA = 1e-3
"""Below it an eps-plan and a network that predicts something else are merged in float64."""


def convert_plan(plan: Plan, prediction: Prediction | str, *, shared: bool = False) -> Plan:
    r"""Returns the same sampler, written for another prediction of the network.

    Each model output F is replaced by :math:`a Y + b F'` with the maps of
    :func:`fewstep.diffusion.prediction.coefficients`: an exact rewriting of rows. Differentiable in the
    plan's values and times.

    Arguments:
        plan: The plan.
        prediction: The prediction to write it for.
        shared: Whether each converted model output becomes a row of its own, up to a factor that leaves
            one operation to it, instead of being written into every row that reads it.
    """
    target = Prediction.of(prediction)
    if target is plan.prediction:
        return plan
    a, b = coefficients(target, plan.prediction, alpha=plan.scales[:, 0], sigma=plan.scales[:, 1])
    by_state = (a.detach().abs() >= b.detach().abs()).tolist()
    # Numbers, or tensors where there are gradients to carry.
    a, b, values, times = (column(v) for v in (a, b, plan.values, plan.times))
    tape = Tape(plan.grid, target)
    registers: list[Form] = [tape.x]
    for row in plan.structure.rows:
        if isinstance(row, Lin):
            total = Form({})
            for place, r in enumerate(row.terms, start=row.offset):
                total = total + registers[r] * values[place]
            registers.append(tape.state(total, row.state))
        elif isinstance(row, Eval):
            k = row.at
            y, f = tape.evaluate(registers[row.of], times[k])
            if not shared:
                registers.append(y * a[k] + f * b[k])
            elif by_state[k]:
                registers.append(tape.state(y + f * (b[k] / a[k])) * a[k])
            else:
                registers.append(tape.state(y * (a[k] / b[k]) + f) * b[k])
        else:
            registers.append(tape.noise())
    converted = tape.finish(registers[plan.structure.result], plan.name)
    return replace(converted, head=plan.head)


def plan_for(plan: Plan, prediction: Prediction) -> Plan:
    r"""Returns the same sampler for the prediction that a network makes, at the fewest operations.

    Rewritten once for each plan and prediction; numbers only, without gradients. The conversions are
    written into the rows or are rows of their own, whichever costs less; where :math:`\alpha` is
    nearly zero they are always written into the rows, so that no large terms cancel in float32.
    """
    if prediction is plan.prediction:
        return plan
    native = plan.derived.get(prediction)
    if native is None:
        with torch.no_grad():
            native = _cheapest(plan, prediction)
        plan.derived[prediction] = native
    return native


def _cheapest(plan: Plan, prediction: Prediction) -> Plan:
    merged = convert_plan(plan, prediction)
    if float(plan.scales[:, 0].min()) < SMALL_ALPHA:
        return merged
    apart = convert_plan(plan, prediction, shared=True)
    return apart if operations(apart) < operations(merged) else merged


def operations(plan: Plan) -> int:
    """Returns the tensor operations of a run without the network: one a term, none for a factor of 1."""
    total = 0
    for row in plan.structure.rows:
        if isinstance(row, Lin):
            weights = plan.numbers[row.offset : row.offset + len(row.terms)]
            total += len(weights) - (len(weights) > 1 and 1.0 in weights)
    return total
