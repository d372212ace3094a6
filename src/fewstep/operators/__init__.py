"""Operators: networks that go to the end of a trajectory in one evaluation or few, and their training."""

from __future__ import annotations

from fewstep.operators.continued import continued as continued
from fewstep.operators.distillation import distill as distill
from fewstep.operators.flow_map import FlowMap as FlowMap
from fewstep.operators.folder import read_operator as read_operator
from fewstep.operators.folder import write_operator as write_operator
from fewstep.operators.insertion import TimeAxis as TimeAxis
from fewstep.operators.insertion import attach as attach
from fewstep.operators.insertion import detach as detach
from fewstep.operators.layout import Layout as Layout
from fewstep.operators.losses import LOSSES as LOSSES
from fewstep.operators.losses import Loss as Loss
from fewstep.operators.losses import loss_weights as loss_weights
from fewstep.operators.model import OperatorModel as OperatorModel
from fewstep.operators.model import OperatorSampler as OperatorSampler
from fewstep.operators.operator import Operator as Operator
from fewstep.operators.operator import TrajectoryOperator as TrajectoryOperator
from fewstep.operators.students import STUDENTS as STUDENTS
from fewstep.operators.students import DistillRecipe as DistillRecipe
from fewstep.operators.students import Student as Student
from fewstep.operators.students import flops as flops
from fewstep.operators.temporal import TemporalConv as TemporalConv
