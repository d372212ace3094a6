"""Studies of one model: a check of its description, the sources of its error, the best sampler."""

from fewstep.studies.checking import ModelCheck as ModelCheck
from fewstep.studies.checking import Tested as Tested
from fewstep.studies.checking import model_check as model_check
from fewstep.studies.conventions import Hypothesis as Hypothesis
from fewstep.studies.curves import anatomy as anatomy
from fewstep.studies.fitting import fitting_error as fitting_error
from fewstep.studies.local_errors import Path as Path
from fewstep.studies.local_errors import measure_gain as measure_gain
from fewstep.studies.local_errors import path_of as path_of
from fewstep.studies.local_errors import step_errors as step_errors
from fewstep.studies.polishing import Candidate as Candidate
from fewstep.studies.polishing import polish as polish
from fewstep.studies.recommend import Advice as Advice
from fewstep.studies.recommend import Batch as Batch
from fewstep.studies.recommend import Tried as Tried
from fewstep.studies.recommend import advise as advise
from fewstep.studies.recommend import dynamic_grids as dynamic_grids
from fewstep.studies.recommend import fitted_grids as fitted_grids
from fewstep.studies.reference import Reference as Reference
from fewstep.studies.reference import follow as follow
from fewstep.studies.spectrum import Basis as Basis
from fewstep.studies.spectrum import Spectrum as Spectrum
from fewstep.studies.spectrum import time_spectrum as time_spectrum
from fewstep.studies.stages import Subject as Subject
from fewstep.studies.stages import share_study as share_study
from fewstep.studies.stages import study as study
