"""Recipes: a typed schema, YAML with ``extends``, dotted overrides. Bad recipes are refused in one clear line."""

from .chain import ChainRecipe, StageSpec
from .loading import (
    AnyRecipe,
    builtin_recipes,
    differences,
    load_recipe,
    override_section,
    parse_recipe,
    resolved,
    section_of,
    to_yaml,
    without_places,
)
from .named import AS_TEACHER, MethodSpec, NetworkSpec
from .schema import (
    ArenaSpec,
    ArmSpec,
    DistillRecipe,
    EvaluationSpec,
    LoraSpec,
    PromptSpec,
    RespaceSpec,
    ScheduleSpec,
    TeacherSpec,
    TrainRecipe,
)

__all__ = [
    "AS_TEACHER",
    "AnyRecipe",
    "ChainRecipe",
    "StageSpec",
    "ArenaSpec",
    "ArmSpec",
    "RespaceSpec",
    "DistillRecipe",
    "EvaluationSpec",
    "MethodSpec",
    "LoraSpec",
    "NetworkSpec",
    "PromptSpec",
    "ScheduleSpec",
    "TeacherSpec",
    "TrainRecipe",
    "builtin_recipes",
    "differences",
    "load_recipe",
    "override_section",
    "parse_recipe",
    "resolved",
    "section_of",
    "to_yaml",
    "without_places",
]
