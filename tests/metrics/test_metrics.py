"""Metrics against closed forms and independent references; their intervals against their level."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from fewstep import metrics
from fewstep.metrics.intervals import student


def _normal(n: int, dimension: int, *, seed: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn((n, dimension), generator=generator, dtype=torch.float64)


def test_frechet_distance_of_two_gaussians_in_closed_form() -> None:
    # N(0, I) and N(m, s^2 I) in D dimensions: D m^2 + D (1 - s)^2.
    one = metrics.Statistics(torch.zeros(3).double(), torch.eye(3).double(), 10)
    two = metrics.Statistics(torch.full((3,), 0.5).double(), 4 * torch.eye(3).double(), 10)
    assert float(metrics.frechet_distance(one, two)) == pytest.approx(3 * 0.25 + 3, rel=1e-12)


def test_fid_equals_the_formula_with_a_matrix_root_by_scipy() -> None:
    from scipy.linalg import sqrtm

    a, b = _normal(300, 6, seed=0) @ _normal(6, 6, seed=1), _normal(200, 6, seed=2, mean=0.3)
    sa, sb = numpy.cov(a.numpy(), rowvar=False), numpy.cov(b.numpy(), rowvar=False)
    root = sqrtm(sa @ sb).real
    gap = a.mean(0) - b.mean(0)
    expected = float(gap @ gap) + numpy.trace(sa + sb - 2 * root)
    assert metrics.fid(a, b).value == pytest.approx(expected, rel=1e-9)


def test_fid_has_a_gradient_also_where_covariances_are_singular() -> None:
    a = _normal(5, 8, seed=0).requires_grad_()
    b = metrics.Statistics.of(_normal(50, 8, seed=1))
    (gradient,) = torch.autograd.grad(metrics.frechet_distance(metrics.Statistics.of(a), b), a)
    step = 1e-6 * _normal(5, 8, seed=2)
    change = [
        float(metrics.frechet_distance(metrics.Statistics.of(a.detach() + s * step), b))
        for s in (1, -1)
    ]
    assert float((gradient * step).sum()) == pytest.approx((change[0] - change[1]) / 2, rel=1e-3)


def test_extrapolation_removes_most_of_the_bias_of_fid() -> None:
    plain, infinite = [], []
    for seed in range(8):
        a, b = _normal(200, 8, seed=seed), _normal(200, 8, seed=100 + seed)
        plain.append(metrics.fid(a, b, blocks=2).value)
        infinite.append(metrics.fid(a, b, extrapolate=True, blocks=2).value)
    assert numpy.mean(plain) > 0.15  # the truth is 0
    assert abs(numpy.mean(infinite)) < 0.25 * numpy.mean(plain)


@pytest.mark.parametrize(("kernel", "power"), [("linear", 1), ("cubic", 3)])
def test_kid_is_the_double_sum_of_its_definition(kernel: str, power: int) -> None:
    x, y = _normal(7, 4, seed=0).numpy(), _normal(9, 4, seed=1, mean=0.5).numpy()

    def k(u: numpy.ndarray, v: numpy.ndarray) -> float:
        return float(u @ v / 4) if power == 1 else float((u @ v / 4 + 1) ** 3)

    xx = numpy.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = numpy.mean([k(y[i], y[j]) for i in range(9) for j in range(9) if i != j])
    xy = numpy.mean([k(u, v) for u in x for v in y])
    value = metrics.kid(torch.from_numpy(x), torch.from_numpy(y), kernel=kernel).value
    assert value == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_kid_is_unbiased() -> None:
    values = [
        metrics.kid(_normal(30, 3, seed=s), _normal(40, 3, seed=900 + s), blocks=2).value
        for s in range(200)
    ]
    error = numpy.std(values) / len(values) ** 0.5
    assert abs(numpy.mean(values)) < 3.5 * error


def test_linear_kid_of_shifted_gaussians_in_closed_form() -> None:
    # The linear kernel gives the squared distance of the means, divided by the dimension.
    a, b = _normal(1500, 5, seed=0), _normal(1500, 5, seed=1, mean=1.0)
    result = metrics.kid(a, b, kernel="linear")
    assert result.low < 1.0 < result.high
    assert result.high - result.low < 0.3


def test_precision_recall_density_coverage_by_brute_force() -> None:
    a, b, k = _normal(40, 3, seed=0, mean=0.6), _normal(50, 3, seed=1), 3
    x, y = a.numpy(), b.numpy()

    def radius(points: numpy.ndarray, i: int) -> float:
        return sorted(numpy.linalg.norm(points - points[i], axis=1))[k]

    real = [radius(y, j) for j in range(len(y))]
    fake = [radius(x, i) for i in range(len(x))]
    gap = [[numpy.linalg.norm(u - v) for u in x] for v in y]
    inside = [[gap[j][i] < real[j] for i in range(len(x))] for j in range(len(y))]
    expected = (
        numpy.mean([any(inside[j][i] for j in range(len(y))) for i in range(len(x))]),
        numpy.mean([any(gap[j][i] < fake[i] for i in range(len(x))) for j in range(len(y))]),
        numpy.sum(inside) / (k * len(x)),
        numpy.mean([min(gap[j]) < real[j] for j in range(len(y))]),
    )
    result = metrics.precision_recall(a, b, neighbours=k)
    assert [e.value for e in result] == pytest.approx(list(expected), abs=1e-12)


def test_precision_and_recall_see_different_faults() -> None:
    data = _normal(400, 2, seed=0)
    narrow = metrics.precision_recall(_normal(400, 2, seed=1, std=0.3), data)
    wide = metrics.precision_recall(_normal(400, 2, seed=2, std=4.0), data)
    assert narrow.precision.value > 0.95 > 0.6 > narrow.recall.value
    assert wide.recall.value > 0.9 > 0.5 > wide.precision.value


def test_sliced_wasserstein_of_shifted_points_is_the_shift() -> None:
    a = _normal(300, 1, seed=0)
    assert metrics.sliced_wasserstein(a, a + 0.7).value == pytest.approx(0.7, rel=1e-9)
    # In two dimensions a shift d has a mean square projection d^2 / 2.
    b = _normal(300, 2, seed=1)
    shifted = b + torch.tensor([0.6, 0.8])
    value = metrics.sliced_wasserstein(b, shifted, projections=4000).value
    assert value == pytest.approx(0.5**0.5, rel=0.02)


def test_sliced_wasserstein_of_different_sizes_uses_quantiles() -> None:
    a = _normal(500, 1, seed=0)
    doubled = torch.cat([a, a])
    assert metrics.sliced_wasserstein(a, doubled).value == pytest.approx(0.0, abs=1e-12)


def student_of_scipy(share: float, freedom: int) -> float:
    """The quantile; scipy.stats is imported here because it costs every process of a run a second."""
    from scipy.stats import t

    return float(t.ppf(share, freedom))


def test_rms_is_the_root_mean_square_and_its_interval_is_students() -> None:
    a, b = _normal(50, 4, seed=0), _normal(50, 4, seed=1)
    result = metrics.rms(a, b)
    squares = ((a - b) ** 2).mean(1).numpy()
    half = student_of_scipy(0.975, 49) * squares.std(ddof=1) / 50**0.5
    assert result.value == pytest.approx(squares.mean() ** 0.5)
    assert result.low == pytest.approx((squares.mean() - half) ** 0.5, rel=1e-4)
    assert result.high == pytest.approx((squares.mean() + half) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("freedom", [8, 18, 38])
def test_student_quantiles(level: float, freedom: int) -> None:
    expected = student_of_scipy((1 + level) / 2, freedom)
    assert student(level, freedom) == pytest.approx(expected, rel=1e-3)


def _against_known(a: Tensor, b: Tensor, level: float) -> metrics.Estimate:
    del b
    known = metrics.Statistics(torch.zeros(2).double(), torch.eye(2).double(), 10**6)
    nothing = torch.zeros(2, 2)
    reference = metrics.Reference(nothing, nothing, known, "normal", "", "")
    return metrics.fid(a, reference, level=level, blocks=10)


COVERING = {
    "kid": (80, lambda a, b, level: metrics.kid(a, b, level=level)),
    "fid": (80, lambda a, b, level: metrics.fid(a, b, level=level)),
    "fid, known": (80, _against_known),
    "fid, extrapolated": (
        30,
        lambda a, b, level: metrics.fid(a, b, level=level, extrapolate=True, blocks=10),
    ),
    "sliced": (
        60,
        lambda a, b, level: metrics.sliced_wasserstein(
            a, b, level=level, projections=16, blocks=10
        ),
    ),
    "rms": (80, lambda a, b, level: metrics.rms(a, b[:120], level=level)),
    "manifold": (80, lambda a, b, level: metrics.precision_recall(a, b, level=level, blocks=10)),
}


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.slow
def test_intervals_cover_at_their_nominal_rate(name: str) -> None:
    trials, function = COVERING[name]
    level, rows = 0.9, []
    for seed in range(trials):
        a, b = _normal(120, 2, seed=seed, mean=0.8), _normal(150, 2, seed=10_000 + seed)
        result = function(a, b, level)
        rows.append(result if isinstance(result, tuple) else (result,))
    spread = (level * (1 - level) / trials) ** 0.5
    for intervals in zip(*rows, strict=True):
        # What an interval is about is the expected value at this number of samples.
        centre = float(numpy.mean([e.value for e in intervals]))
        rate = sum(e.low <= centre <= e.high for e in intervals) / trials
        assert level - 3.5 * spread <= rate <= level + 3.5 * spread


@pytest.mark.parametrize("function", [metrics.fid, metrics.kid, metrics.precision_recall])
def test_clear_errors(function) -> None:
    good = _normal(40, 3, seed=0)
    with pytest.raises(ValueError, match="has 1 samples; at least"):
        function(good[:1], good)
    with pytest.raises(ValueError, match="3 and 4 features"):
        function(good, _normal(40, 4, seed=1))
    with pytest.raises(ValueError, match="constant on both sides"):
        function(torch.ones(40, 3), torch.ones(40, 3))
    with pytest.raises(ValueError, match="not all finite"):
        function(good.clone().fill_(float("nan")), good)
    with pytest.raises(
        ValueError, match=r"Unknown feature extractor 'fashon'\. Did you mean 'fashion'"
    ):
        function(good, good, features="fashon")


def test_a_callable_gives_the_features() -> None:
    a, b = _normal(60, 3, seed=0), _normal(60, 3, seed=1, mean=1)
    only_first = metrics.fid(a, b, features=lambda x: x[:, :1])
    assert only_first.value == pytest.approx(metrics.fid(a[:, :1], b[:, :1]).value, rel=1e-12)


def test_clear_errors_of_those_that_need_no_features() -> None:
    good = _normal(40, 3, seed=0)
    for function in (metrics.sliced_wasserstein, metrics.rms):
        with pytest.raises(ValueError, match=r"at least 2|n >= 2"):
            function(good[:1], good[:1])
        with pytest.raises(ValueError, match=r"3 and 4 features|of one shape"):
            function(good, _normal(40, 4, seed=1))
        with pytest.raises(ValueError, match="not all finite"):
            function(good.clone().fill_(float("inf")), good)


@pytest.mark.peer
@pytest.mark.parametrize("k", [1, 5])
def test_precision_recall_density_coverage_equal_prdc(k: int) -> None:
    """The package of Naeem et al., the authors of density and coverage."""
    prdc = pytest.importorskip("prdc")
    a, b = _normal(300, 6, seed=0, mean=0.3), _normal(250, 6, seed=1)
    theirs = prdc.compute_prdc(real_features=b.numpy(), fake_features=a.numpy(), nearest_k=k)
    ours = metrics.precision_recall(a, b, neighbours=k)
    for name, value in theirs.items():
        assert getattr(ours, name).value == pytest.approx(value, abs=1e-12), name
    assert 0 < ours.precision.value < 1
    assert 0 < ours.coverage.value < 1


def test_the_jackknife_of_precision_and_recall_counts_anew_without_each_block() -> None:
    """The lists of nearest points, kept for speed, against measuring each time from scratch."""
    a, b, k = _normal(60, 2, seed=0), _normal(70, 2, seed=1, mean=0.7), 3
    # Whole clusters go out together, so that the kept lists run short.
    a[:30] = a[:30] * 1e-3
    result = metrics.precision_recall(a, b, neighbours=k, blocks=2, seed=4)
    generator = torch.Generator().manual_seed(4)
    variance = torch.zeros(4, dtype=torch.float64)
    for side, n in enumerate((60, 70)):
        values = []
        for block in torch.randperm(n, generator=generator).tensor_split(2):
            stored = torch.ones(n, dtype=torch.bool)
            stored[block] = False
            sides = [a[stored], b] if side == 0 else [a, b[stored]]
            again = metrics.precision_recall(*sides, neighbours=k, blocks=2)
            values.append(torch.tensor([e.value for e in again], dtype=torch.float64))
        both = torch.stack(values)
        variance += 0.5 * (both - both.mean(0)).square().sum(0)
    width = student(0.95, 2) * variance.sqrt()
    value = torch.tensor([e.value for e in result], dtype=torch.float64)
    low, high = value - width, value + width
    for ends in (low, high):  # all but the density are shares
        ends[[0, 1, 3]] = ends[[0, 1, 3]].clamp(0, 1)
    assert [e.low for e in result] == pytest.approx(low.tolist(), rel=1e-9)
    assert [e.high for e in result] == pytest.approx(high.tolist(), rel=1e-9)


@pytest.mark.parametrize("kernel", ["linear", "cubic", "gaussian"])
def test_the_kernel_distance_has_the_gradient_of_its_value(kernel: str) -> None:
    function = metrics.KERNELS[kernel]
    b = _normal(6, 3, seed=1)
    options = {"width": 1.3} if kernel == "gaussian" else {}

    def distance(a: Tensor) -> Tensor:
        return metrics.mmd2(*(function(x, y, **options) for x, y in ((a, a), (b, b), (a, b))))

    assert torch.autograd.gradcheck(distance, _normal(5, 3, seed=0).requires_grad_())


def test_the_frechet_distance_has_the_gradient_of_its_value() -> None:
    b = metrics.Statistics.of(_normal(50, 3, seed=1))
    assert torch.autograd.gradcheck(
        lambda a: metrics.frechet_distance(metrics.Statistics.of(a), b),
        _normal(8, 3, seed=0).requires_grad_(),
    )


@pytest.mark.parametrize("m", [7, 12])
def test_the_sliced_distance_has_the_gradient_of_its_value(m: int) -> None:
    a, b = _normal(7, 3, seed=0), _normal(m, 3, seed=1)
    value = metrics.sliced_distance(a, b, projections=20, seed=3)
    known = metrics.sliced_wasserstein(a, b, projections=20, seed=3).value
    assert float(value.sqrt()) == pytest.approx(known, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: metrics.sliced_distance(x, b, projections=20, seed=3), a.requires_grad_()
    )


def test_features_of_the_embedded_classifier_pass_gradients() -> None:
    extractor = metrics.Features.load("fashion")
    x = torch.zeros(3, 1, 28, 28).normal_(generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    reference = metrics.Reference.load("fashion")
    features = extractor(x)
    loss = metrics.frechet_distance(metrics.Statistics.of(features.double()), reference.statistics)
    (gradient,) = torch.autograd.grad(loss, x)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        change = [
            metrics.frechet_distance(
                metrics.Statistics.of(extractor(x + s * step).double()), reference.statistics
            )
            for s in (1, -1)
        ]
    expected = float((gradient.double() * step.double()).sum())
    assert float(change[0] - change[1]) / 2 == pytest.approx(expected, rel=0.05)


class _Given(metrics.Features):
    """A classifier of samples that are themselves the probabilities."""

    def log_probabilities(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        return images.log()


GIVEN = _Given(lambda images: images, name="given", sha256="")


@pytest.mark.parametrize(
    ("rows", "score"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 3.0),
        ([[1, 0, 0], [1, 0, 0], [1, 0, 0]], 1.0),
        ([[0.2, 0.3, 0.5]] * 3, 1.0),
        # KL(p_i || p) of (0.9, 0.1) and (0.1, 0.9) to (0.5, 0.5): ln 2 - H(0.9).
        ([[0.9, 0.1], [0.1, 0.9]], 2 * 0.9**0.9 * 0.1**0.1),
    ],
)
def test_inception_score_in_closed_form(rows: list[list[float]], score: float) -> None:
    p = torch.tensor(rows, dtype=torch.float64).repeat(20, 1)
    assert metrics.inception_score(p, GIVEN).value == pytest.approx(score, rel=1e-12)


def test_inception_score_of_images_is_that_of_their_logits() -> None:
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = metrics.Features.load("fashion")
    p = torch.softmax(known.module(images).double(), 1)  # pyright: ignore
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp()
    found = metrics.inception_score(images)
    assert found.value == pytest.approx(float(expected), rel=1e-5)
    assert found.low < found.value < found.high


def test_inception_score_refuses_what_it_cannot_score() -> None:
    with pytest.raises(ValueError, match="does not classify"):
        metrics.inception_score(torch.zeros(4, 1, 28, 28), metrics.Features.load("pixels"))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        metrics.inception_score(torch.zeros(1, 1, 28, 28))
    with pytest.raises(ValueError, match="not finite"):
        metrics.inception_score(torch.full((4, 1, 28, 28), float("nan")))
