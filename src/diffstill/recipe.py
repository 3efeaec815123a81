"""Recipes: a typed schema, YAML with ``extends``, dotted overrides. Bad recipes are refused in one clear line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from .data.sources import DataSpec
from .diffusion.guidance import parse_guidance
from .diffusion.prediction import PredictionType
from .diffusion.sampling import ClipMode
from .diffusion.schedule import NoiseSchedule
from .engine.settings import TrainSettings
from .errors import InputError
from .methods import METHODS, Options
from .models.adapters import FAMILIES


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScheduleSpec(Section):
    """The forward process."""

    name: Literal["cosine", "linear", "scaled_linear"] = Field("cosine", description="cosine is DASH's")
    num_train_timesteps: int = Field(1000, ge=2, le=100_000, description="T")

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.create(self.name, self.num_train_timesteps)


class NetworkSpec(BaseModel):
    """A network by family; all other keys are the family's options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    family: str = Field("unet2d", description="unet2d or dit")
    init: Literal["fresh", "inherit", "magnitude"] | None = Field(
        None, description="how a student starts; null: as its method says (fresh, for most)"
    )

    @model_validator(mode="after")
    def _known(self) -> NetworkSpec:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; one of {', '.join(FAMILIES)}")
        known = FAMILIES[self.family].options
        for key in self.model_extra or {}:
            if key not in known:
                raise ValueError(f"unknown key {key!r}{_nearest(key, known)}; {self.family} knows {', '.join(known)}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class MethodSpec(BaseModel):
    """A method by name; all other keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="after")
    def _known(self) -> MethodSpec:
        if self.name not in METHODS:
            raise ValueError(f"unknown method {self.name!r}{_nearest(self.name, METHODS)}; one of {', '.join(METHODS)}")
        self.build_options()
        return self

    def build_options(self) -> Options:
        options_class = METHODS[self.name].options_class
        for key in self.model_extra or {}:
            if key not in options_class.model_fields:
                known = ", ".join(options_class.model_fields)
                raise ValueError(f"unknown key {key!r}{_nearest(key, known.split(', '))}; {self.name} knows {known}")
        try:
            return options_class(**(self.model_extra or {}))
        except ValidationError as error:
            raise ValueError(str(_one_line(error))) from None


class EvaluationSpec(Section):
    """The protocol of the evaluation after training, and of ``diffstill eval``."""

    extractor: str = Field("classifier", description="classifier | inception[:PATH] | torchscript:PATH")
    samples: int = Field(1000, ge=20, description="generated images a seed and guidance setting")
    steps: int = Field(50, ge=1, description="DDIM steps")
    guidance: tuple[str, ...] = Field(
        ("1", "1.5", "2", "3", "4", "tag:1,4,5"), description="scales, tag:min,max,beta or interval:s,lo,hi"
    )
    seeds: tuple[int, ...] = Field((0,), description="sampling seeds; from three on, intervals are their spread")
    pairs: int = Field(2000, ge=10, description="held-out (x_t, t, y) for guidance fidelity")
    clip: ClipMode = Field("recompute", description="what DDIM does after clipping x0 (D23)")
    batch_size: int = Field(500, gt=0, description="images sampled at once; no result depends on it")
    default_guidance: str | None = Field(None, description="stored in the pipeline; null: the scale of the best FD")

    @field_validator("guidance", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if isinstance(value, (str, int, float)):
            value = [value]
        if not isinstance(value, (list, tuple)):
            return value
        return tuple(str(parse_guidance(item)) for item in value)

    @field_validator("guidance", "seeds", mode="after")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("must not be empty")
        return value


class TeacherSpec(Section):
    """Where the teacher comes from: a model folder or hub id, or a recipe that trains it first."""

    model: str | None = None
    recipe: str | None = None
    overrides: dict[str, Any] = Field({}, description="dotted overrides of the teacher's recipe")

    @model_validator(mode="after")
    def _one(self) -> TeacherSpec:
        if (self.model is None) == (self.recipe is None):
            raise ValueError("give either model (a folder or hub id) or recipe (trained first)")
        return self


class ArmSpec(Section):
    """One arm of an arena: a method, and what differs from the recipe's student."""

    method: MethodSpec
    student: dict[str, Any] = Field({}, description="overrides of the recipe's student")
    label: str | None = None


class ArenaSpec(Section):
    """The arms of ``diffstill arena``; names are free, the reference is what differences are paired with."""

    arms: dict[str, ArmSpec] = {}
    reference: str = "dash"
    equal_seconds: bool = Field(False, description="train cheaper arms a second time, for the reference's seconds")


class Base(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    data: DataSpec
    method: MethodSpec
    training: TrainSettings
    evaluation: EvaluationSpec = EvaluationSpec()

    @property
    def subject(self) -> NetworkSpec:
        """The network that is trained."""
        raise AttributeError


class TrainRecipe(Base):
    """A class-conditional model from data."""

    kind: Literal["train"]
    network: NetworkSpec
    schedule: ScheduleSpec = ScheduleSpec()
    prediction_type: PredictionType = "epsilon"

    @property
    def subject(self) -> NetworkSpec:
        return self.network

    @model_validator(mode="after")
    def _sensible(self) -> TrainRecipe:
        if METHODS[self.method.name].teacher_needs:
            raise ValueError(f"method {self.method.name!r} needs a teacher: use kind: distill")
        if self.network.init not in (None, "fresh"):
            raise ValueError(f"network.init {self.network.init!r} needs a teacher: use kind: distill")
        return self


class DistillRecipe(Base):
    """A student from a teacher. Schedule, prediction type, classes and image size are the teacher's."""

    kind: Literal["distill"]
    teacher: TeacherSpec
    student: NetworkSpec
    arena: ArenaSpec = ArenaSpec()

    @property
    def subject(self) -> NetworkSpec:
        return self.student


Recipe = Annotated[TrainRecipe | DistillRecipe, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[TrainRecipe | DistillRecipe] = TypeAdapter(Recipe)


S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (1e-3), and a refusal of keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} is no text {key_node.start_mark}")
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} stands twice {key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def builtin_recipes() -> dict[str, str]:
    """Name -> YAML text of the recipes that travel with the package."""
    room = resources.files("diffstill") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(room.iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".yaml")
    }


def load_recipe(name: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> TrainRecipe | DistillRecipe:
    """A recipe by built-in name or YAML path, with ``extends`` resolved and dotted overrides applied.

    Args:
        overrides: ``["training.lr=1e-3", ...]`` (values are YAML) or a mapping of dotted keys.

    Raises:
        InputError: whatever is wrong, in one line that names the field, the value and the mend.
    """
    tree = _tree(name, ())
    pairs = overrides.items() if isinstance(overrides, Mapping) else [_split(item) for item in overrides]
    for key, value in pairs:
        _put(tree, key, value)
    return parse_recipe(tree)


def parse_recipe(tree: Mapping[str, Any]) -> TrainRecipe | DistillRecipe:
    """A recipe from a plain mapping (``extends`` already resolved)."""
    if tree.get("kind") not in ("train", "distill"):
        raise InputError("kind", tree.get("kind"), "use train or distill")
    try:
        return _ADAPTER.validate_python(dict(tree))
    except ValidationError as error:
        raise _one_line(error) from None


def override_section(section: S, overrides: Sequence[str], field: str) -> S:
    """A section with ``key=value`` overrides applied.

    Raises:
        InputError: unknown keys or values that do not fit, named as ``field.key``.
    """
    tree = section.model_dump()
    for item in overrides:
        _put(tree, *_split(item))
    try:
        return type(section).model_validate(tree)
    except ValidationError as error:
        raise _one_line(error, (field,)) from None


def resolved(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as plain JSON-able data, defaults included."""
    return recipe.model_dump(mode="json")


def to_yaml(recipe: BaseModel) -> str:
    return yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, as ``key: old -> new``."""
    found: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def _tree(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        raise InputError("extends", " -> ".join((*seen, name)), "remove the circle", problem="goes in a circle")
    builtin = builtin_recipes()
    path = Path(name)
    if name in builtin:
        text, where = builtin[name], name
    elif path.suffix in (".yaml", ".yml") or path.exists():
        try:
            text, where = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("recipe", name, f"give a readable YAML file ({error})", problem="cannot be read") from None
    else:
        mend = f"give a YAML path or one of: {', '.join(builtin)}"
        raise InputError("recipe", name, mend, problem=f"is not known{_nearest(name, builtin)}")
    try:
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError("recipe", where, " ".join(str(error).split()), problem="is no valid YAML") from None
    if not isinstance(tree, dict):
        raise InputError("recipe", where, "write key: value lines", problem="holds no mapping")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise InputError("extends", parent, "give one recipe name or path")
    if parent not in builtin and not Path(parent).is_absolute():
        beside = path.parent / parent
        parent = str(beside) if beside.exists() else parent
    return _merge(_tree(parent, (*seen, name)), tree)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``; mappings merge, but a changed method or network family starts its section anew."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            anew = any(k in value and value[k] != old.get(k) for k in ("name", "family") if key in _SWITCHED)
            merged[key] = dict(value) if anew else _merge(old, value)
        else:
            merged[key] = value
    return merged


_SWITCHED = ("method", "student", "network")


def _split(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise InputError("override", item, "write key=value, e.g. training.lr=1e-3")
    try:
        return key, yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(key, text, "write the value as YAML: 3, true, [1, 2]", problem="is no valid YAML") from None


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        elif not isinstance(child, dict):
            raise InputError(key, value, f"{part} is no section", problem="cannot be set")
        else:
            child = node[part] = dict(child)
        node = child
    if last == "name" and parents and parents[-1] in ("method",) and node.get("name") != value:
        node.clear()  # another method has other options
    node[last] = value


def _nearest(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _one_line(error: ValidationError, within: tuple[str, ...] = ()) -> InputError:
    """The first problem of a pydantic error as field, value, mend."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = [*within, *(str(part) for part in first["loc"] if part not in ("train", "distill"))]
    field = ".".join(place) or "recipe"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = _siblings([str(p) for p in first["loc"]])
        mend = f"remove it{_nearest(place[-1], known)}" + (f"; known here: {', '.join(known)}" if known else "")
        return InputError(field, first["input"], mend + more, problem="is no known key")
    if first["type"] == "missing":
        return InputError(field, None, f"add it to the recipe{more}", problem="is missing")
    return InputError(field, first["input"], message + more)


def _siblings(loc: list[str]) -> list[str]:
    """The known keys of the section that holds an unknown one."""
    kinds: dict[str, type[BaseModel]] = {"train": TrainRecipe, "distill": DistillRecipe}
    model: Any = kinds.get(loc[0])
    for part in loc[1:-1]:
        found = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = found.annotation if found else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
