"""Trajectories on disk: recording, reading, verification."""

from fewstep.trajectories.checking import Verification as Verification
from fewstep.trajectories.checking import verify as verify
from fewstep.trajectories.conditions import Cycle as Cycle
from fewstep.trajectories.conditions import Uniform as Uniform
from fewstep.trajectories.recording import record as record
from fewstep.trajectories.recording import resume as resume
from fewstep.trajectories.store import Batch as Batch
from fewstep.trajectories.store import TrajectoryStore as TrajectoryStore
from fewstep.trajectories.summary import Statistics as Statistics
from fewstep.trajectories.summary import spectrum as spectrum
from fewstep.trajectories.summary import statistics as statistics
