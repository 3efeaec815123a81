"""Parts of a recipe whose further keys are the options of what they name: a network's family, a method."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ..errors import InputError
from ..methods import METHODS, Options
from ..models.adapters import FAMILIES, guided_unet2d
from .problems import Within, nearest, one_line

AS_TEACHER = "teacher"
"""The family of a student that is built as its teacher is, and takes the guidance scale where its method needs that."""
NETWORKS: dict[str, dict[str, Any]] = {AS_TEACHER: {"ratio": None, **guided_unet2d.OPTIONS}} | {
    name: family.options for name, family in sorted(FAMILIES.items(), reverse=True)
}
"""Family -> its options and their defaults."""
LISTS = ("block_out_channels", "attention_levels")
"""Options that hold an entry a resolution level."""
NOT_SIZES = ("attention_levels", "dropout", "ratio")
"""Options whose whole numbers may be 0, or are checked elsewhere."""


class NetworkSpec(BaseModel):
    """A network by family; all other keys are the family's options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    family: str = Field(
        "unet2d", description="unet2d, guided_unet2d, unet2d_condition, dit, or teacher: built as the teacher is"
    )
    init: Literal["fresh", "inherit", "magnitude"] | None = Field(
        None, description="how a student starts; null: as its method says (fresh, for most)"
    )

    @model_validator(mode="after")
    def _known(self) -> NetworkSpec:
        if self.family not in NETWORKS:
            raise ValueError(f"unknown family {self.family!r}; one of {', '.join(NETWORKS)}")
        known = NETWORKS[self.family]
        for key in self.model_extra or {}:
            if key not in known:
                raise ValueError(f"unknown key {key!r}{nearest(key, known)}; {self.family} knows {', '.join(known)}")
        for key, value in (self.model_extra or {}).items():
            # Python takes true for 1, and a network of one group fails far from here.
            if any(isinstance(part, bool) for part in (value if isinstance(value, list) else [value])):
                raise Within(str(InputError(key, value, "give a number")))
            if key in LISTS and not isinstance(value, (list, tuple)):
                meant = value if isinstance(value, str) and "," in value else f"{value}, {value}"
                raise Within(str(InputError(key, value, f"give a list, e.g. [{meant}]")))
            sizes = value if key == "block_out_channels" else [] if key in NOT_SIZES else [value]
            if any(isinstance(size, int) and size < 1 for size in sizes):
                raise Within(str(InputError(key, value, "use 1 or more")))
        if self.ratio is not None and not isinstance(self.ratio, (int, float)):
            raise Within(str(InputError("ratio", self.ratio, "give a number: how many times fewer parameters")))
        return self

    @property
    def ratio(self) -> float | None:
        """Of a student of its teacher's family: how many times fewer parameters it has; None: it is as large."""
        found: float | None = (self.model_extra or {}).get("ratio")
        return found

    @property
    def options(self) -> dict[str, Any]:
        """The family's own, those that are given."""
        return {key: value for key, value in (self.model_extra or {}).items() if key != "ratio"}

    @model_serializer(mode="wrap")
    def _whole(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With the family's defaults, so that a resolved recipe tells every option; a copied network has none."""
        given: dict[str, Any] = dump(self)
        if self.family == AS_TEACHER:
            return given
        defaults = {key: list(v) if isinstance(v, tuple) else v for key, v in NETWORKS[self.family].items()}
        return {**given, **defaults, **self.options}


class MethodSpec(BaseModel):
    """A method by name; all other keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="after")
    def _known(self) -> MethodSpec:
        if self.name not in METHODS:
            near = nearest(self.name, METHODS)
            own = "" if near else "; one of your own is known where its file is run (docs/own-method.md)"
            raise ValueError(f"unknown method {self.name!r}{near}; one of {', '.join(METHODS)}{own}")
        self.build_options()
        return self

    def build_options(self) -> Options:
        options_class = METHODS[self.name].options_class
        for key in self.model_extra or {}:
            if key not in options_class.model_fields:
                known = ", ".join(options_class.model_fields)
                raise ValueError(f"unknown key {key!r}{nearest(key, known.split(', '))}; {self.name} knows {known}")
        try:
            return options_class(**(self.model_extra or {}))
        except ValidationError as error:
            raise Within(str(one_line(error))) from None

    @model_serializer(mode="plain")
    def _whole(self, info: SerializationInfo) -> dict[str, Any]:
        """With the options' defaults: a resolved recipe tells every number, and a changed default makes another run."""
        return {"name": self.name, **self.build_options().model_dump(mode=info.mode)}
