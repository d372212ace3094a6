"""Comparisons: samplers at budgets from the same noise, with scores, verdicts and a report."""

from fewstep.comparison.entries import Entry as Entry
from fewstep.comparison.entries import read_entries as read_entries
from fewstep.comparison.entries import read_entry as read_entry
from fewstep.comparison.running import Comparison as Comparison
from fewstep.comparison.running import compare as compare
from fewstep.comparison.scores import METRICS as METRICS
from fewstep.comparison.store import Cell as Cell
