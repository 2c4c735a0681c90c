"""The arms of the studies: what each changes of the default configuration, and which study it belongs to.

An arm is a name, settings that replace the configuration's, and what becomes of the adapters' skeletons.
Knows names of settings and skeletons as text, not how an arm is run or measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.zoo.sets import VARIANTS
from search.errors import InputError
from search.settings import OBJECTIVE_NAMES

Skeletons = dict[str, tuple[str, ...]]
"""Adapter's name -> its skeletons, in the configuration's order."""

VAGUE = "### Task: Do it.\n### Input:{input}\n### Answer:"
SHARED = "### Task:{task}\n### Input:{input}\n### Answer:"
REWORDED: dict[str, tuple[str, str]] = {
    "maths": ("Work out how many there are.", "Exercise"),
    "code": ("Put this into Python.", "Wish"),
    "reasoning": ("Say who it must be.", "Puzzle"),
    "chat": ("Write something friendly back.", "Note"),
    "tool": ("Turn what is asked into JSON.", "Order"),
    "sentiment": ("What mood is the writer in?", "Opinion"),
    "topic": ("Say what this is about.", "Headline"),
    "entities": ("Pick out who, where and when.", "Line"),
    "data_to_text": ("Make a sentence of these values.", "Values"),
    "sql": ("Express this in SQL.", "Demand"),
}
"""Adapter -> another wording of its instruction, and of the heading of its field."""
REWORDED_CUE = "\n### Result:"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run a search, or a merge that needs none."""

    name: str
    overrides: tuple[str, ...] = ()
    """"section.key=value"."""
    change: Callable[[Skeletons], Skeletons] | None = None
    """What becomes of the skeletons; None keeps them."""
    family: str = ""
    """Arms that are drawn together."""
    reference: str = ""
    """"uniform" or "balanced": this merge, without a search."""


@dataclass(frozen=True, slots=True)
class Study:
    """Arms that are compared with each other."""

    question: str
    arms: tuple[Arm, ...]
    variants: tuple[str, ...]
    """Expert sets, unless others are asked for."""
    is_timed: bool = False
    """Seconds end the search, in place of the configuration's evaluations."""
    overrides: tuple[str, ...] = ()
    """"section.key=value", in every arm."""


def next_ones(skeletons: Skeletons) -> Skeletons:
    """Give each adapter the skeletons of the next one."""
    names = list(skeletons)
    return {name: skeletons[names[(i + 1) % len(names)]] for i, name in enumerate(names)}


def vague(skeletons: Skeletons) -> Skeletons:
    """Give all adapters an instruction that says nothing."""
    return dict.fromkeys(skeletons, (VAGUE,))


def shared(skeletons: Skeletons) -> Skeletons:
    """Give all adapters one skeleton, in which the base writes the instruction too."""
    return dict.fromkeys(skeletons, (SHARED,))


def dropped(skeletons: Skeletons) -> Skeletons:
    """Take all skeletons away."""
    return dict.fromkeys(skeletons, ())


def every_second(skeletons: Skeletons) -> Skeletons:
    """Leave the first, third, ... adapter its skeletons."""
    return {name: own if i % 2 == 0 else () for i, (name, own) in enumerate(skeletons.items())}


def most(skeletons: Skeletons) -> Skeletons:
    """Take the skeletons of the first, sixth, ... adapter away."""
    return {name: () if i % 5 == 0 else own for i, (name, own) in enumerate(skeletons.items())}


def other_lines(skeletons: Skeletons) -> Skeletons:
    """Word every instruction in another way; fields stay (InputError for an adapter not in REWORDED)."""
    return {name: tuple(_other_line(name, text) for text in own) for name, own in skeletons.items()}


def other_lines_and_fields(skeletons: Skeletons) -> Skeletons:
    """Word instruction, field and answer cue in another way (InputError for one not in REWORDED)."""
    return {name: (_other_skeleton(name),) for name in skeletons}


def with_other_lines(skeletons: Skeletons) -> Skeletons:
    """Add the skeleton of `other_lines` to each adapter's own."""
    other = other_lines(skeletons)
    return {name: (*own, *other[name]) for name, own in skeletons.items()}


def _other_line(name: str, skeleton: str) -> str:
    line, _ = _reworded(name)
    return f"### Task: {line}\n{skeleton.partition(chr(10))[2]}"


def _other_skeleton(name: str) -> str:
    line, field = _reworded(name)
    return f"### Task: {line}\n### {field}:{{{field.lower()}}}{REWORDED_CUE}"


def _reworded(name: str) -> tuple[str, str]:
    if name not in REWORDED:
        raise InputError(f"adapter {name!r}: no other wording of its task; known: {', '.join(REWORDED)}.")
    return REWORDED[name]


def _settings(family: str, label: str, key: str, *values: object) -> tuple[Arm, ...]:
    """Return an arm for each value of one setting."""
    return tuple(Arm(f"{label} {value}", (f"{key}={value}",), family=family) for value in values)


DEFAULT = Arm("default")
UNIFORM, BALANCED = (Arm(f"{name} merge", reference=name) for name in ("uniform", "balanced"))
NO_RACE = Arm("no race", ("search.race_keep=null",), family="race")
START = Arm("start 0.3", ("search.start=0.3",), family="start")
ALL_POSITIONS = Arm("all positions", ("objective.positions=all",), family="positions")
NO_SKELETONS = Arm("no skeletons", change=dropped, family="skeletons")
PROMPT_COUNTS = _settings("prompts", "prompts an adapter:", "prompts.per_adapter", 1, 2, 4, 8, 16, 32)
OBJECTIVE = "objective", "objective.name"
NO_GRADIENT = "search.gradient.refine_steps=0"
TOP1 = "top1_disagreement"
STEPLESS = Arm(f"objective {TOP1}, not refined", (f"objective.name={TOP1}", NO_GRADIENT), family="objective")
"""It has no gradient."""
OBJECTIVES = (
    *_settings("objective", *OBJECTIVE, *(name for name in OBJECTIVE_NAMES if name != TOP1)),
    STEPLESS,
)
COMBINATIONS = _settings("combination", "combine", "objective.combine", "mean", "mean_sqrt", "worst")
SPACES = (
    Arm("space model", ("search.space.groups=model",), family="space"),
    Arm("space block", ("search.space.groups=block", "search.space.layers_per_block=2"), family="space"),
    *_settings("space", "space", "search.space.groups", "layer", "part", "module"),
    Arm("space profile", ("search.space.groups=layer", "search.space.genome=profile"), family="space"),
    Arm(
        "model, then layer",
        ("search.stages=[{share: 1, groups: model}, {share: 2, groups: layer}]",),
        family="space",
    ),
)
OPTIMIZERS = _settings(
    *("optimizer", "optimizer", "search.optimizer"),
    *("CMA", "DiagonalCMA", "OnePlusOne", "DE", "TBPSA", "RandomSearch"),
)
RACES = (NO_RACE, *_settings("race", "race keeps", "search.race_keep", 0.5, 0.25))
SIZES = _settings("generation", "candidates", "search.n_candidates", 8, 16, 32)
SCALES = (
    Arm("non-negative", ("search.space.sign=non_negative",), family="scale"),
    Arm("log scale", ("search.space.scale=log",), family="scale"),
    Arm("non-negative, log", ("search.space.sign=non_negative", "search.space.scale=log"), family="scale"),
)
GRADIENTS = (
    *_settings("gradient", "refine", "search.gradient.refine_steps", 0, 10, 40, 80),
    Arm("inject every 4", ("search.gradient.inject_every=4",), family="gradient"),
)
STARTS = (
    Arm("start 0.1", ("search.start=0.1",), family="start"),
    START,
    Arm("prior", ("search.prior=configs/priors/demo.json",), family="start"),
)
WORDINGS = (
    Arm("instruction in other words", change=other_lines, family="skeletons"),
    Arm("instruction and fields in other words", change=other_lines_and_fields, family="skeletons"),
    Arm("own skeleton and one in other words", change=with_other_lines, family="skeletons"),
    Arm("vague skeleton", change=vague, family="skeletons"),
    Arm("one skeleton for all", change=shared, family="skeletons"),
    Arm("the next adapter's skeleton", change=next_ones, family="skeletons"),
    Arm("skeletons for every second adapter", change=every_second, family="skeletons"),
    Arm("skeletons for four adapters of five", change=most, family="skeletons"),
    NO_SKELETONS,
)

_SEARCH = (
    *(DEFAULT, *SPACES, *OPTIMIZERS, *RACES, *SIZES, *SCALES, *GRADIENTS, *OBJECTIVES, *COMBINATIONS),
    *STARTS,
)
_PROMPTS = (
    *(DEFAULT, *PROMPT_COUNTS, *WORDINGS, ALL_POSITIONS),
    *_settings("length", "answers of tokens:", "prompts.max_new_tokens", 8),
    *_settings("temperature", "temperature", "prompts.temperature", 0.5, 1.0, 1.5),
)
_ABLATION = (
    *(DEFAULT, NO_RACE, COMBINATIONS[0]),
    *(GRADIENTS[0], Arm("one generation, then refined", ("search.max_evaluations=16",))),
    Arm("64 evaluations", ("search.max_evaluations=64",)),
    *_settings("objective", *OBJECTIVE, "forward_kl", "entropy_gap"),
    *(STEPLESS, *_settings("finalists", "finalists", "search.n_finalists", 1)),
    *(START, NO_SKELETONS, ALL_POSITIONS),
)
_FREE = Arm("no skeletons, all free", ("objective.weak_signal_nats=0",), dropped, "skeletons")
STUDIES = {
    "search": Study("Which search, where seconds end it", _SEARCH, VARIANTS[:1], is_timed=True),
    "tokens": Study(
        "Which search, at equal tokens", _SEARCH, VARIANTS[:1], overrides=("search.max_evaluations=1280",)
    ),
    "prompts": Study("Which prompts", _PROMPTS, ("mixed", "answer")),
    "ablation": Study("The default without one of its parts", _ABLATION, VARIANTS),
    "no_skeleton": Study("No skeletons at all", (DEFAULT, UNIFORM, BALANCED, NO_SKELETONS, _FREE), VARIANTS),
}
