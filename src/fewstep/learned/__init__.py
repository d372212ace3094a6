"""Samplers that are searched for one model: plans whose numbers are parameters, and the search."""

from fewstep.learned.families import FAMILIES as FAMILIES
from fewstep.learned.learned_plan import Base as Base
from fewstep.learned.learned_plan import LearnedPlan as LearnedPlan
