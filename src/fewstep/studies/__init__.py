"""Studies of one model: is it what it says, where its error comes from, which sampler suits it."""

from fewstep.studies.model_check import ModelCheck as ModelCheck
from fewstep.studies.model_check import model_check as model_check
from fewstep.studies.spectrum import Basis as Basis
from fewstep.studies.spectrum import Spectrum as Spectrum
from fewstep.studies.spectrum import time_spectrum as time_spectrum
