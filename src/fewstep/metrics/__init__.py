"""Measures of sample quality; each returns a value with an interval."""

from fewstep.metrics.features import Features as Features
from fewstep.metrics.frechet import fid as fid
from fewstep.metrics.frechet import frechet_distance as frechet_distance
from fewstep.metrics.inception import inception_score as inception_score
from fewstep.metrics.intervals import Estimate as Estimate
from fewstep.metrics.kernel import KERNELS as KERNELS
from fewstep.metrics.kernel import kid as kid
from fewstep.metrics.kernel import mmd2 as mmd2
from fewstep.metrics.manifold import PrecisionRecall as PrecisionRecall
from fewstep.metrics.manifold import precision_recall as precision_recall
from fewstep.metrics.reference import Reference as Reference
from fewstep.metrics.statistics import Statistics as Statistics
from fewstep.metrics.transport import rms as rms
from fewstep.metrics.transport import sliced_distance as sliced_distance
from fewstep.metrics.transport import sliced_wasserstein as sliced_wasserstein
