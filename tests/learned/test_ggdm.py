"""GGDM tables: Theorem 1, special cases, and rows from any solver."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep.learned import Base
from fewstep.learned.families import family
from fewstep.learned.ggdm import Table, marginals, matched_table, table_of, vars_table
from fewstep.learned.state_families import GGDM
from fewstep.plans.execute import execute
from fewstep.sampling.request import SamplerRequest
from tiny_searches import MODEL, VP, base_of, run


def random_table(count: int, seed: int = 0) -> Table:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Table(draw(count), draw(count, count).tril(-1), draw(count))


def theorem_1(table: Table) -> tuple[list[float], list[float]]:
    """The recursion of the paper as printed, with its indices: x_K is the noise, t from K down to 1."""
    last = len(table.data)

    def mu(t: int, u: int) -> float:
        row = last - t
        return float(table.data[row]) if u == 0 else float(table.states[row, last - u])

    def s(t: int) -> float:
        return float(table.noise[last - t])

    a_all, v_all = [], []
    for t in range(last, 0, -1):
        a = {u: mu(t, u) for u in [0, *range(t + 1, last + 1)]}
        v = s(t) ** 2
        for i in range(1, last - t + 1):
            weight = a[t + i]
            v += (weight * s(t + i)) ** 2
            for u in [0, *range(t + i + 1, last + 1)]:
                a[u] = weight * mu(t + i, u) + a[u]
        a_all.append(a[0])
        v_all.append(v)
    return a_all, v_all


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_marginals_are_those_of_theorem_1(count):
    table = random_table(count, seed=count)
    a, v = marginals(table)
    told_a, told_v = theorem_1(table)
    torch.testing.assert_close(
        a, torch.tensor(told_a, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        v, torch.tensor(told_v, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_matched_tables_keep_the_marginals():
    grid = base_of("ddim", 6).grid
    weights = 0.3 * random_table(7, seed=3).states
    table = matched_table(weights, grid.alpha, grid.sigma)
    a, v = marginals(table)
    torch.testing.assert_close(a, grid.alpha, rtol=0, atol=1e-14)
    torch.testing.assert_close(v, grid.sigma.square(), rtol=0, atol=1e-14)
    assert float(table.noise[1:].abs().max()) > 0.1


def test_matched_rows_that_are_too_long_are_scaled_down():
    grid = base_of("ddim", 4).grid
    table = matched_table(20 * random_table(5, seed=1).states, grid.alpha, grid.sigma)
    _, v = marginals(table)
    torch.testing.assert_close(v, grid.sigma.square(), rtol=0, atol=1e-13)
    assert float(table.noise[1:].abs().max()) == 0


@pytest.mark.parametrize("kind", ["linear", "quadratic", "logsnr"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_ddim_as_ggdm(kind, eta, steps):
    base = base_of("ddim", steps, kind, eta=eta)
    plan = GGDM(base).plan()
    assert plan.n_noise == steps - 1  # noises that start at zero are drawn all the same
    torch.testing.assert_close(run(plan), run(base.plan()), rtol=0, atol=1e-10)


def test_ddim_as_ggdm_in_single_precision():
    base = base_of("ddim", 5)
    truth = run(base.plan())
    got = run(GGDM(base).plan(), dtype=torch.float32)
    assert float((got - truth).abs().max()) < 3e-5


def test_one_call_returns_the_prediction():
    base = base_of("ddim", 1)
    x = torch.randn((4, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = GGDM(base).plan()
    got = execute(plan, lambda y, t: MODEL(y, t, prediction="eps"), x)
    torch.testing.assert_close(got, MODEL(x, VP.t_max, prediction="x0"), rtol=0, atol=1e-10)


MULTISTEP = [
    "tab1", "tab2", "tab3", "rhoab2", "logrhoab3", "ipndm", "dpmpp-2m", "dpmpp-3m", "unipc2", "unipc3",
]  # fmt: skip


@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize("steps", [5, 10])
def test_multistep_solvers_are_ggdms(solver, steps):
    base = base_of(solver, steps)
    truth = run(base.plan())
    size = float(truth.abs().max())
    for pred in (None, "vars", "free"):
        got = run(GGDM(base, pred=pred, noise=False).plan())
        assert float((got - truth).abs().max()) < 1e-10 * size, pred
    a, v = marginals(table_of(base.plan()))
    torch.testing.assert_close(a, base.grid.alpha, rtol=0, atol=1e-10)
    torch.testing.assert_close(v, base.grid.sigma.square(), rtol=0, atol=1e-10)


def test_a_last_row_that_is_not_the_prediction_is_learned_too():
    """A grid that ends above sigma = 0: the sample is a combination of states as well."""
    base = Base.of(VP, SamplerRequest("tab3", nfe=5, grid="quadratic"))
    model = GGDM(base, noise=False)
    torch.testing.assert_close(run(model.plan()), run(base.plan()), rtol=0, atol=1e-10)
    assert model.count > GGDM(base_of("tab3", 5), noise=False).count


@pytest.mark.parametrize("steps", [2, 5])
def test_vars_is_ddpm_where_the_variances_are_the_diffusions(steps):
    base = base_of("ddpm", steps)
    table, truth = vars_table(base.grid.sigma.square()), table_of(base.plan())
    for got, wanted in zip(table, truth, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_what_is_no_ggdm_is_refused():
    with pytest.raises(ValueError, match="evaluations in"):
        GGDM(Base.of(VP, SamplerRequest("rho-heun", nfe=6)))
    with pytest.raises(ValueError, match="does not preserve the marginals"):
        GGDM(Base.of(VP, SamplerRequest("euler", nfe=4)))
    with pytest.raises(ValueError, match="starts from ddpm"):
        family("vars", base_of("ddim", 3))
    with pytest.raises(ValueError, match="preserves variance"):
        family(
            "vars", Base.of(fewstep.schedule("ve"), SamplerRequest("ddpm", nfe=3, grid="karras"))
        )
    with pytest.raises(ValueError, match="Theorem 1"):
        GGDM(base_of("ddim", 3), matched=True, pred="vars")
