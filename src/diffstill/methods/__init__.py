"""Methods: what is trained against what. A method owns roles and a loss, never a loop. Importing registers ours."""

from . import composite, conditional, dash, encoder, fitnets, gap, guided, progressive, sfddm, single_head, supervised
from .base import (
    METHODS,
    Batch,
    Losses,
    Method,
    Options,
    Phase,
    PhasedMethod,
    RoleOptimizer,
    Setting,
    TeacherOutputs,
    register,
)
from .curriculum import Curriculum, CurriculumOptions

__all__ = [
    "METHODS",
    "Batch",
    "Curriculum",
    "CurriculumOptions",
    "Losses",
    "Method",
    "Options",
    "Phase",
    "PhasedMethod",
    "RoleOptimizer",
    "Setting",
    "TeacherOutputs",
    "composite",
    "conditional",
    "dash",
    "encoder",
    "fitnets",
    "gap",
    "guided",
    "progressive",
    "register",
    "sfddm",
    "single_head",
    "supervised",
]
