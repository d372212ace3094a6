"""What makes studies and searches small, where their numbers are not what is tested.

The fixtures of tests/conftest.py do it for a test, fixtures of a module with a patch of their own.
"""

from __future__ import annotations

import functools

import pytest


def few_hypotheses(patch: pytest.MonkeyPatch) -> None:
    """The model check's 116 hypotheses are tested on closed forms; elsewhere some of each kind will do."""
    from fewstep.studies import checking

    patch.setattr(checking, "schedules_to_try", lambda claimed: [claimed])
    patch.setattr(checking, "conventions_for", lambda schedule: ["as claimed", "t / t_max"])


def coarse_references(patch: pytest.MonkeyPatch) -> None:
    """A quarter of the evaluations of reference trajectories."""
    from fewstep.studies import fit, stages

    patch.setattr(stages, "follow", functools.partial(stages.follow, intervals=12))
    patch.setattr(fit, "INTERVALS", 12)


def few_real_samples(patch: pytest.MonkeyPatch) -> None:
    """Searches are scored against 100 real samples instead of 2000."""
    from fewstep.learned import real_data

    patch.setattr(real_data, "MOST", 100)
