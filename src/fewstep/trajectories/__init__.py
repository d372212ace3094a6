"""Trajectories on disk: recording them, reading them, checking them."""

from fewstep.trajectories.conditions import Cycle as Cycle
from fewstep.trajectories.conditions import Uniform as Uniform
from fewstep.trajectories.recording import record as record
from fewstep.trajectories.store import Batch as Batch
from fewstep.trajectories.store import TrajectoryStore as TrajectoryStore
