"""Samplers tuned for one model: plans whose numbers are parameters, and the search over them."""

from fewstep.learned.families import FAMILIES as FAMILIES
from fewstep.learned.families import Family as Family
from fewstep.learned.learned_plan import Base as Base
from fewstep.learned.learned_plan import LearnedPlan as LearnedPlan
from fewstep.learned.learned_plan import Start as Start
from fewstep.learned.objectives import OBJECTIVES as OBJECTIVES
from fewstep.learned.objectives import Objective as Objective
