"""Measures of sample quality."""

from fewstep.metrics.features import Features as Features
