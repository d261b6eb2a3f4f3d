"""Zeroth-order fine-tuning of language models on sharded processes, with forward passes only."""

from __future__ import annotations

from zo_dist.anchor import Anchor
from zo_dist.carried import PerturbationMomentum
from zo_dist.coefficients import Clip, Raw, RootMeanSquare, SignOnly, Standardise
from zo_dist.composite import Composite
from zo_dist.curvature import DiagonalCurvature
from zo_dist.engines import DesyncError, pipeline
from zo_dist.estimators import OneSided, ThreeSided, TwoSided
from zo_dist.fitted import FittedAdaLeZO
from zo_dist.flipout import Flipout
from zo_dist.jacobian import JacobianWindow
from zo_dist.lowrank import LowRank
from zo_dist.mask import SmallWeights
from zo_dist.objective import Objective
from zo_dist.optimizer import NonFiniteLossError, ZeroOrder
from zo_dist.orthogonal import Orthogonal
from zo_dist.projection import Projection
from zo_dist.rules import SGD, Adam, Momentum, Sign
from zo_dist.samplers import AdaLeZO, Dense, Uniform
from zo_dist.scale import LearnedScale, RunningScale
from zo_dist.selfcheck import SelfCheckError
from zo_dist.tasks.generation import TextGenerator, TextScore
from zo_dist.tasks.scoring import causal_lm_loss, choice_loss
from zo_dist.trajectory import StepRecord, TrajectoryError, TrajectoryReader, TrajectoryWriter

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AdaLeZO",
    "Adam",
    "Anchor",
    "Clip",
    "Composite",
    "Dense",
    "DesyncError",
    "DiagonalCurvature",
    "FittedAdaLeZO",
    "Flipout",
    "JacobianWindow",
    "LearnedScale",
    "LowRank",
    "Momentum",
    "NonFiniteLossError",
    "Objective",
    "OneSided",
    "Orthogonal",
    "PerturbationMomentum",
    "Projection",
    "Raw",
    "RootMeanSquare",
    "RunningScale",
    "SelfCheckError",
    "Sign",
    "SignOnly",
    "SmallWeights",
    "Standardise",
    "StepRecord",
    "TextGenerator",
    "TextScore",
    "ThreeSided",
    "TrajectoryError",
    "TrajectoryReader",
    "TrajectoryWriter",
    "TwoSided",
    "Uniform",
    "ZeroOrder",
    "causal_lm_loss",
    "choice_loss",
    "pipeline",
]
