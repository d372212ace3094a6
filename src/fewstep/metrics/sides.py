"""The two sets that a metric compares, as features."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fewstep.metrics.features import FeatureMap, extractor, identity, name_of
from fewstep.metrics.reference import Reference

Extractor = Callable[[Tensor], Tensor]


def two_sides(
    a: Tensor, b: Tensor | Reference, features: FeatureMap, *, least: int, heldout: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Returns the features of two sets, float64 on the CPU, shapes (n, D) and (m, D).

    Raises:
        ValueError: If a side has fewer than ``least`` samples, the dimensions differ, a value is
            not finite, or all features are constant on both sides.
    """
    if isinstance(b, Reference):
        left = against(a, b, features, least=least)
        right = _checked("second", b.heldout if heldout else b.features, extractor(None), least)
    else:
        if heldout:
            raise ValueError("heldout chooses a part of a Reference; the second set is a tensor")
        extract = extractor(features)
        left, right = (
            _checked(name, side, extract, least) for name, side in (("first", a), ("second", b))
        )
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"the two sets have {left.shape[1]} and {right.shape[1]} features; they must agree"
        )
    if float(left.detach().std(0).max()) == 0 == float(right.detach().std(0).max()):
        raise ValueError("the features are constant on both sides; there is nothing to compare")
    return left, right


def against(a: Tensor, reference: Reference, features: FeatureMap, *, least: int) -> Tensor:
    """Returns the features of a set by the extractor of a reference, float64, shape (n, D).

    Raises:
        ValueError: If other features are requested than those of the reference, the samples do
            not have the shape of its data, or they are not valid (see :func:`two_sides`).
    """
    width = reference.features.shape[1]
    shape = reference.event_shape
    if isinstance(a, Tensor) and a.ndim == 2 and a.shape[1] == width and shape != (width,):
        extract = extractor(None)  # features already
    else:
        extract = _agreed(features, reference)
        if isinstance(a, Tensor) and shape is not None and tuple(a.shape[1:]) != shape:
            raise ValueError(
                f"the data of the reference {reference.name!r} have shape {shape}, the samples "
                f"{tuple(a.shape[1:])}"
            )
    return _checked("first", a, extract, least)


def _agreed(features: FeatureMap, reference: Reference) -> Extractor:
    if features is None or features is reference.extractor:
        return extractor(reference.extractor)
    extract = extractor(features)
    if not identity(extract) or identity(extract) != reference.features_sha256:
        raise ValueError(
            f"the reference {reference.name!r} holds features of {reference.features_name!r}, but "
            f"those of {name_of(extract)!r} are requested; leave features out, or make "
            "a reference with Reference.load(data, features)"
        )
    return extract


def _checked(name: str, side: Tensor, extract: Extractor, least: int) -> Tensor:
    if not isinstance(side, Tensor) or side.ndim < 2:
        got = tuple(side.shape) if isinstance(side, Tensor) else type(side).__name__
        raise ValueError(f"the {name} set must be a tensor with shape (n, *), got {got}")
    if side.is_complex():
        raise ValueError(f"the {name} set must be real numbers, got {side.dtype}")
    if len(side) < least:
        raise ValueError(f"the {name} set has {len(side)} samples; at least {least} are needed")
    values = extract(side).flatten(1).cpu().double()
    if not bool(values.detach().isfinite().all()):
        raise ValueError(f"the features of the {name} set are not all finite")
    return values
