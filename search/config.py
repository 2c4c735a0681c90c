"""The configuration of a run: typed, frozen, read from YAML, with every default in one place.

Knows names, ranges and where files lie; not models, optimisers or what any setting does.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from search.errors import InputError
from search.skeleton import parse_skeleton
from search.yaml_input import read_mapping

ObjectiveName = Literal[
    "entropy_excess",
    "entropy_gap",
    "relative_entropy_gap",
    "forward_kl",
    "reverse_kl",
    "top1_disagreement",
    "entropy_minimisation",
    "nll",
]
CombinationName = Literal["mean", "mean_sqrt", "worst"]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class ConfigSection(BaseModel):
    """A group of settings: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"found {str(value).lower()}, which is neither a number nor text (quote it)")
        return value


class SourcedSection(ConfigSection):
    """Weights on disk or on the hub; a plain string is short for its `source`."""

    source: Annotated[str, Field(min_length=1)]
    """A folder, or a hub id such as "mistralai/Mistral-7B-v0.1"."""
    revision: str | None = None
    """Commit of the hub repository."""
    name: str = ""
    """Filled in from `source` when not given."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_name(cls, value: Any) -> Any:
        settings = {"source": value} if isinstance(value, str) else value
        if (
            isinstance(settings, dict)
            and isinstance(settings.get("source"), str)
            and not settings.get("name")
        ):
            return {**settings, "name": cls._default_name(settings["source"])}
        return settings

    @staticmethod
    def _default_name(source: str) -> str:
        return source.rstrip("/") or source

    @field_validator("source")
    @classmethod
    def _locate(cls, source: str, info: ValidationInfo) -> str:
        return locate_source(source, _roots_of(info))


class BaseConfig(SourcedSection):
    """The base model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is bfloat16 on CUDA and float32 on CPU. `name` defaults to the source as written."""


class AdapterConfig(SourcedSection):
    """One expert. `name` defaults to the last part of the source."""

    about: str = ""
    """One line on what the adapter is for."""
    skeletons: tuple[str, ...] = ()
    """Prompts with {named} slots that the base fills in and the expert then answers."""
    allow_pickle: bool = False
    """Read adapter_model.bin where there is no safetensors file."""

    @staticmethod
    def _default_name(source: str) -> str:
        return Path(os.path.abspath(source)).name

    @field_validator("skeletons")
    @classmethod
    def _check_skeletons(cls, skeletons: tuple[str, ...]) -> tuple[str, ...]:
        for skeleton in skeletons:
            parse_skeleton(skeleton)
        return skeletons


class SearchSettings(ConfigSection):
    """How long, how wide and how the search looks for coefficients."""

    time_box_s: Positive = 1200.0
    """Wall-clock ceiling of the whole run, from process start to the merge."""
    max_evaluations: Count = 2000
    """Candidates scored at most; reached before the clock, a run is reproducible."""
    n_candidates: Annotated[int, Field(ge=2)] = 16
    """Candidates per generation."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    optimizer: str = "CMA"
    """"CMA", or any name in nevergrad's registry."""
    space: Literal["layer", "model"] = "layer"
    """A coefficient per adapter and decoder layer, or one per adapter."""
    start: float = 0.3
    """Every coefficient's first value."""
    sigma: Positive = 0.15
    """Spread of the first generation, in coefficients."""
    n_finalists: Count = 8
    """Best candidates scored again on prompts that the search has not seen."""
    tokens_per_forward: Count | None = None
    """Tokens in one forward pass; chosen by device when not given."""

    @model_validator(mode="after")
    def _check_one_generation_fits(self) -> "SearchSettings":
        if self.max_evaluations < self.n_candidates:
            raise ValueError(
                f"max_evaluations is {self.max_evaluations}, less than one generation of n_candidates = "
                f"{self.n_candidates}; raise the first or lower the second"
            )
        return self


class PromptSettings(ConfigSection):
    """How many prompts the experts write, and how."""

    per_adapter: Count = 8
    """Prompts an adapter that the search scores candidates on."""
    unseen_per_adapter: Count = 8
    """Further prompts an adapter, kept for the finalists."""
    temperature: Positive = 1.0
    max_new_tokens: Count = 64
    """Length limit of an answer, or of an expert's own text."""
    max_slot_tokens: Count = 64
    """Length limit of what the base writes into one slot."""


class ObjectiveSettings(ConfigSection):
    """What the search minimises; docs/METHOD.md has the formulas."""

    name: ObjectiveName = "entropy_excess"
    combine: CombinationName = "mean_sqrt"
    """How the experts' values become one loss."""
    positions: Literal["auto", "all", "answer"] = "auto"
    """Tokens that count; "auto" is the answer's where there is a skeleton, else all."""
    weak_signal_nats: Annotated[float, Field(ge=0)] = 0.5
    """An adapter that nowhere differs more from the base, on its prompts, stays near the uniform merge."""


class SearchConfig(ConfigSection):
    """Everything a run depends on; only `base` and `adapters` have no default."""

    base: BaseConfig
    adapters: tuple[AdapterConfig, ...]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    search: SearchSettings = SearchSettings()
    prompts: PromptSettings = PromptSettings()
    objective: ObjectiveSettings = ObjectiveSettings()

    @field_validator("adapters", mode="before")
    @classmethod
    def _expand_folder(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            return _adapter_folders(value, _roots_of(info))
        if not isinstance(value, list | tuple) or not value:
            raise ValueError("expected a folder of adapter folders, or a list of at least one adapter")
        return value

    @field_validator("adapters")
    @classmethod
    def _check_names(cls, adapters: tuple[AdapterConfig, ...]) -> tuple[AdapterConfig, ...]:
        sources: dict[str, str] = {}
        for adapter in adapters:
            if adapter.name in sources:
                raise ValueError(
                    f"two adapters are named {adapter.name!r}: {sources[adapter.name]} and {adapter.source}; "
                    "give one another `name:`"
                )
            sources[adapter.name] = adapter.source
        return adapters


def load_config(path: Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Read a YAML config, apply "section.key=value" overrides, check everything, and locate the weights.

    Raises:
        InputError: for the first mistake, in one line.
    """
    settings = read_mapping(path, overrides)
    folder = path.absolute().parent
    try:
        return SearchConfig.model_validate(settings, context={"roots": (Path(), folder, folder.parent)})
    except ValidationError as error:
        raise InputError(_describe_mistake(error, str(path), overrides).replace("\n", "\\n")) from None


def config_hash(config: SearchConfig) -> str:
    """Return the hex SHA-256 of all settings, defaults included, whatever their order in the file."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def locate_source(source: str, roots: Sequence[Path] = (Path(),)) -> str:
    """Return the first existing folder `root / source`, or the source itself where it can only be a hub id.

    Raises:
        InputError: when it is neither; a name such as "data/zo" beside a folder "data" is a mistyped path.
    """
    written = Path(os.path.expanduser(source))
    for root in roots:
        if source.strip() and os.path.isdir(root / written):
            return str(root / written)
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", source)
    if is_hub_id and not any(os.path.isdir(root / written.parts[0]) for root in roots):
        return source
    looked_in = ", ".join(dict.fromkeys(str(root.absolute()) for root in roots))
    raise InputError(
        f"no folder {source!r} in {looked_in}; expected an existing folder or a hub id (org/name)"
    )


def _roots_of(info: ValidationInfo) -> Sequence[Path]:
    """Folders that relative paths start from; the working directory alone outside `load_config`."""
    return info.context["roots"] if info.context else (Path(),)


def _adapter_folders(source: str, roots: Sequence[Path]) -> list[str]:
    """Expand the short form `adapters: FOLDER` into its visible subfolders that hold an adapter, by name."""
    folder = Path(locate_source(source, roots))
    found = sorted(str(file.parent) for file in folder.glob("[!.]*/adapter_config.json"))
    if not found:
        raise InputError(
            f"no subfolder of {folder} holds adapter_config.json; "
            "for one adapter, or adapters of the hub, write a list: `adapters: [SOURCE, ...]`"
        )
    return found


def _describe_mistake(error: ValidationError, path: str, overrides: Sequence[str]) -> str:
    """Put one of pydantic's errors into one line: a typo before the key that it leaves missing."""
    mistake = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    dotted = ".".join(str(part) for part in mistake["loc"])
    given = next((text for text in overrides if text.partition("=")[0].strip() == dotted), None)
    where = f"override {given!r}" if given else f"{path}: {dotted}"
    if mistake["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_suggest_key(mistake['loc'])}"
    if mistake["type"] == "missing":
        return f"{where}: missing; write `{mistake['loc'][-1]}: FOLDER` (or a hub id)"
    if mistake["type"] == "value_error":
        return f"{where}: {mistake['ctx']['error']}"
    expected = re.sub("^(Input|String) should", "it should", mistake["msg"])
    if mistake["type"] == "model_type":
        expected = "expected keys below it"
    return f"{where}: found {repr(mistake['input'])[:80]}; {expected}"


def _suggest_key(loc: tuple[int | str, ...]) -> str:
    """Say which key may be meant, here or in another section, and which keys there are."""
    sections: dict[str, type[BaseModel]] = {
        "base": BaseConfig,
        "adapters": AdapterConfig,
        "search": SearchSettings,
        "prompts": PromptSettings,
        "objective": ObjectiveSettings,
    }
    key = str(loc[-1])
    here = SearchConfig if len(loc) == 1 else sections[str(loc[0])]
    close = get_close_matches(key, here.model_fields, n=1)
    elsewhere = [f"{name}.{key}" for name, section in sections.items() if key in section.model_fields]
    guess = f"did you mean {(close + elsewhere)[0]!r}? " if close or elsewhere else ""
    return f"{guess}known keys: {', '.join(here.model_fields)}"
