"""The settings of search, prompts and objective: typed, frozen, with every default in one place.

Knows names and ranges; not where files lie, nor what any setting does.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from search.locate import locate_file, search_roots

OBJECTIVE_NAMES = (
    "entropy_excess",
    "entropy_gap",
    "relative_entropy_gap",
    "forward_kl",
    "reverse_kl",
    "top1_disagreement",
    "excess_and_top1",
    "entropy_minimisation",
    "nll",
)
GroupName = Literal["model", "block", "layer", "part", "module"]
GenomeName = Literal["adapter", "profile", "full"]
CombinationName = Literal["mean", "mean_sqrt", "worst"]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
SomeCount = Annotated[int, Field(ge=1, le=100_000)]
"""A count that memory or single steps grow with, which no clock could stop: far above any real use."""
MOST_PROMPT_TOKENS = 10_000_000
"""Of an adapter: a random number is drawn for each beforehand."""


class ConfigSection(BaseModel):
    """A group of settings: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"found {str(value).lower()}, which is neither a number nor text (quote it)")
        return value


class SpaceSettings(ConfigSection):
    """What the search may vary; a plain string is short for its `groups`."""

    groups: GroupName = "model"
    """Modules that share a coefficient: all, blocks of layers, a layer, its attention or MLP, none."""
    layers_per_block: Count = 4
    genome: GenomeName = "full"
    """A coefficient per adapter and group; or one per adapter, times a smooth profile over depth."""
    n_knots: Annotated[int, Field(ge=2, le=1000)] = 4
    """Points of the profile."""
    shared_profile: bool = False
    """One profile for all adapters."""
    sign: Literal["signed", "non_negative"] = "signed"
    scale: Literal["plain", "log"] = "plain"
    """Steps are of equal size, or (far from 0) equal ratio."""
    top_k: Count | None = None
    """In each group only so many adapters, those of largest coefficient, count."""

    @model_validator(mode="before")
    @classmethod
    def _expand_groups(cls, value: Any) -> Any:
        return {"groups": value} if isinstance(value, str) else value


class StageSettings(ConfigSection):
    """One stage of a coarse-to-fine search: the space with some settings replaced, and its share."""

    share: Positive
    """Of evaluations and time, relative to the other stages' shares."""
    groups: GroupName | None = None
    genome: GenomeName | None = None
    shared_profile: bool | None = None


class GradientSettings(ConfigSection):
    """Steps down the objective's gradient (Adam in coefficient space) beside the evolutionary search."""

    refine_steps: Annotated[int, Field(ge=0, le=100_000)] = 0
    """From the archive's best, which gives one more finalist."""
    inject_every: Annotated[int, Field(ge=0)] = 0
    """Generations from one injected candidate to the next; 0 for none."""
    inject_steps: SomeCount = 1
    """From the search's mean to the injected candidate."""
    learning_rate: Positive = 0.02
    """In coefficients."""


class SearchSettings(ConfigSection):
    """How long, how wide and how the search looks for coefficients."""

    time_box_s: Positive = 1200.0
    """Wall-clock ceiling of the whole run, from process start to the merge; to main.py's last answer."""
    max_evaluations: Count = 2000
    """Candidates scored at most; reached before the clock, a run is reproducible."""
    n_candidates: Annotated[int, Field(ge=2, le=100_000)] = 16
    """Candidates per generation."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    optimizer: str = "CMA"
    """"CMA", or any name in nevergrad's registry."""
    space: SpaceSettings = SpaceSettings()
    stages: tuple[StageSettings, ...] = ()
    """Coarse to fine: each goes on from mean, spread and best of those before. None for `space` alone."""
    race_keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of candidates that goes on to 1 / race_keep times the prompts; null scores all on all prompts."""
    gradient: GradientSettings = GradientSettings()
    prior: str | None = None
    """File of `python -m search priors`, to start from."""
    allow_changed_adapters: bool = False
    """Take a prior's coefficients for other weights under the same name, and from another base, too."""
    start: Literal["balanced"] | float = "balanced"
    """Every coefficient's first value; "balanced" gives every adapter's update the same norm."""
    sigma: Positive | None = None
    """Spread of the first generation, in coefficients; half of the start when not given."""
    max_relative_norm: Positive | None = 2.0
    """An adapter whose update is larger, relative to the weights, is broken and left out; null keeps all."""
    n_finalists: SomeCount = 8
    """Best candidates scored again on prompts that the search has not seen."""
    tokens_per_forward: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Tokens in one forward pass; when not given, a CUDA device's free memory says (search/memory.py)."""
    compile: bool | None = None
    """Compile decoder layers; when not given, where it pays: a large model on a GPU, and passes enough."""

    @property
    def prior_path(self) -> Path:
        """The prior's file, where there is one."""
        return Path(self.prior or "")

    @field_validator("start", mode="wrap")
    @classmethod
    def _check_start(cls, start: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(start)
        except ValidationError:  # one of a union's would name types
            raise ValueError(f"found {start!r}; it should be 'balanced' or a finite number") from None

    @field_validator("prior")
    @classmethod
    def _locate_prior(cls, prior: str | None, info: ValidationInfo) -> str | None:
        return None if prior is None else locate_file(prior, search_roots(info))

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

    per_adapter: SomeCount = 8
    """Prompts an adapter that the search scores candidates on."""
    unseen_per_adapter: SomeCount = 8
    """Further prompts an adapter, kept for the finalists."""
    temperature: Positive = 1.0
    max_new_tokens: SomeCount = 64
    """Length limit of an answer, or of an expert's own text."""
    max_slot_tokens: SomeCount = 64
    """Length limit of what the base writes into one slot."""

    @model_validator(mode="after")
    def _check_size(self) -> "PromptSettings":
        n_prompts = self.per_adapter + self.unseen_per_adapter
        n_tokens = max(self.max_new_tokens, self.max_slot_tokens)
        if n_prompts * n_tokens > MOST_PROMPT_TOKENS:
            raise ValueError(
                f"found {n_prompts} prompts an adapter of up to {n_tokens} tokens each, expected at most "
                f"{MOST_PROMPT_TOKENS} tokens together; lower either"
            )
        return self


class ObjectiveSettings(ConfigSection):
    """What the search minimises; docs/METHOD.md has the formulas."""

    name: str = "entropy_excess"
    """One of OBJECTIVE_NAMES, or a function of your own as "package.module:function"."""
    combine: CombinationName = "mean_sqrt"
    """How the experts' values become one loss."""
    positions: Literal["auto", "all", "answer"] = "auto"
    """Tokens that count; "auto" is the answer's where there is a skeleton, else all."""
    weak_signal_nats: Annotated[float, Field(ge=0)] = 0.5
    """An adapter that nowhere differs more from the base, on its prompts, stays near the balanced merge, as
    does one whose prompts leave other doubts (search/trust.py); 0 trusts all."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in OBJECTIVE_NAMES and not re.fullmatch(r"[\w.]+:\w+", name):
            raise ValueError(
                f"found {name!r}, expected package.module:function or one of {', '.join(OBJECTIVE_NAMES)}"
            )
        return name
