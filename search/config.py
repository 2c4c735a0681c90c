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
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from search.errors import InputError
from search.locate import locate_source, search_roots
from search.settings import (
    ConfigSection,
    GradientSettings,
    ObjectiveSettings,
    PromptSettings,
    SearchSettings,
    SpaceSettings,
    StageSettings,
)
from search.skeleton import parse_skeleton
from search.yaml_input import read_mapping

_EXPECTED = {
    "tuple_type": "it should be a list, in [ ] or a line each after -",
    "string_type": "it should be text (quote it)",
    "string_pattern_mismatch": "it should be auto, cpu, mps, cuda or cuda:N",  # of `device`
}
"""By pydantic's types of mistake: what was expected, where its own words would name Python's types."""


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
        return locate_source(source, search_roots(info))


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


class SearchConfig(ConfigSection):
    """Everything a run depends on; only `base` and `adapters` have no default."""

    base: BaseConfig
    adapters: tuple[AdapterConfig, ...]
    adapters_missing: Literal["error", "skip"] = "error"
    """What to do where the hub has no such adapter or revision: refuse, or merge without it and name it."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    search: SearchSettings = SearchSettings()
    prompts: PromptSettings = PromptSettings()
    objective: ObjectiveSettings = ObjectiveSettings()

    @property
    def sources(self) -> list[str]:
        """Folders and hub ids of the base and of all adapters."""
        return [self.base.source, *(adapter.source for adapter in self.adapters)]

    @field_validator("adapters", mode="before")
    @classmethod
    def _expand_folder(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            return _adapter_folders(value, search_roots(info))
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


def rebuild_config(recorded: Any, path: str, folder: str | None = None) -> SearchConfig:
    """Rebuild the configuration that a trace's header holds; weights are looked for where they were.

    A trace from before adapters were left out has no limit to their norms.

    Args:
        path: of the trace, for errors.
        folder: where relative paths began; the working directory when None. There they stay as written.

    Raises:
        InputError: if it is none, or a folder is gone.
    """
    if isinstance(recorded, dict) and isinstance(recorded.get("search"), dict):
        recorded = {**recorded, "search": {"max_relative_norm": None, **recorded["search"]}}
    root = Path() if folder in (None, str(Path.cwd())) else Path(folder or "")
    try:
        return SearchConfig.model_validate(recorded, context={"roots": (root,)})
    except ValidationError as error:
        raise InputError(_describe_mistake(error, f"{path}: config", ()).replace("\n", "\\n")) from None


def config_hash(config: SearchConfig) -> str:
    """Return the hex SHA-256 of all settings, defaults included, whatever their order in the file."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
        value = "NUMBER`" if mistake["loc"][-1] == "share" else "FOLDER` (or a hub id)"
        return f"{where}: missing; write `{mistake['loc'][-1]}: {value}"
    if mistake["type"] == "value_error":
        return f"{where}: {mistake['ctx']['error']}"
    expected = _EXPECTED.get(mistake["type"], re.sub("^(Input|String) should", "it should", mistake["msg"]))
    if mistake["type"] == "model_type":
        is_source = mistake["loc"][:1] in (("base",), ("adapters",))
        expected = f"expected {'a folder, a hub id or ' if is_source else ''}keys below it"
    return f"{where}: found {repr(mistake['input'])[:80]}; {expected}"


def _suggest_key(loc: tuple[int | str, ...]) -> str:
    """Say which key may be meant, here or in another section, and which keys there are."""
    sections: dict[str, type[BaseModel]] = {
        "base": BaseConfig,
        "adapters": AdapterConfig,
        "search": SearchSettings,
        "space": SpaceSettings,
        "stages": StageSettings,
        "gradient": GradientSettings,
        "prompts": PromptSettings,
        "objective": ObjectiveSettings,
    }
    key = str(loc[-1])
    above = [str(part) for part in loc[:-1] if str(part) in sections]
    here = sections[above[-1]] if above else SearchConfig
    close = get_close_matches(key, here.model_fields, n=1)
    elsewhere = [f"{name}.{key}" for name, section in sections.items() if key in section.model_fields]
    guess = f"did you mean {(close + elsewhere)[0]!r}? " if close or elsewhere else ""
    return f"{guess}known keys: {', '.join(here.model_fields)}"
