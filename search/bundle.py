"""Write a run as one Python file for the competition's kit: `python -m search bundle -o MyMerge.py CONFIG`.

Knows the bundled file's parts, their order and its literals; how modules are cut and joined is sources.py's.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from search.config import SearchConfig
from search.errors import InputError
from search.import_block import join_imports
from search.objective import OBJECTIVES, SMOOTH_PARTS
from search.optimizer import BatchOptimizer
from search.priors import load_prior
from search.provenance import checkout_commit, library_versions
from search.settings import SpaceSettings
from search.shorten import BUNDLE_WIDTH, shorten_row
from search.skeleton import parse_skeleton
from search.sources import Cuts, cut_sources
from search.syntax import Key

QUERIES_AHEAD = 1200
"""Queries that the kit answers after the merge, one at a time."""

ENTRIES = ("run_in_kit",)
ANYTHING = ("", "")
"""Of a configuration's classes, which a literal replaces, only annotations are left."""
STAND_INS: dict[Key, Key] = {
    ("search.drafts", "DraftSettings"): ANYTHING,
    ("search.prompts", "draft_settings"): ("search.stand_ins", "as_it_is"),
    ("search.evaluate", "PopulationEvaluator"): ("search.plain_parts", "PlainEvaluator"),
    ("search.prompts", "PromptRequest"): ANYTHING,
    ("search.population", "MixedLinear"): ("search.plain_parts", "PlainLinear"),
    ("search.passes", "Passes"): ("search.plain_parts", "PlainPasses"),
    ("search.skeleton", "parse_skeleton"): ("search.stand_ins", "split_skeleton"),
    ("search.adapters", "_check_settings"): ("search.stand_ins", "check_plain_lora"),
    ("search.adapters", "_pair_factors"): ("search.stand_ins", "pair_plain_factors"),
    ("search.adapters", "check_adapter"): ("search.stand_ins", "check_fit"),
    ("search.memory", "tokens_that_fit"): ("search.stand_ins", "tokens_free"),
    ("search.prompts", "_Desk"): ("search.plain_parts", "TerseDesk"),
    ("search.memory", "reset_peak"): ("search.stand_ins", "forget_peak"),
    ("search.sampling", "tokens_together"): ("search.stand_ins", "most_cached_tokens"),
    ("search.objective", "disagreement"): ("search.stand_ins", "disagree"),
}
"""What is bundled in place of what: (module, name) -> (module, name)."""
LEFT_OUT: dict[Key, set[str]] = {
    ("search.prompts", "PromptSet"): {"n_tokens", "sha256"},
    ("search.evaluate", "PopulationEvaluator"): {"oom_events"},
    ("search.finalists", "Judgement"): {"rivals"},
}
"""Methods that nothing in a bundle calls, though others of their name are called."""

UNUSED = ("stages", "prior", "allow_changed_adapters", "compile")
"""Keys of the search's settings that a bundle has no use for."""

CLASS = '''
class MyMerge(Merges):
    """Coefficients per adapter, searched without data inside the time box."""

    def merge(self):
        """Search, fold the winner into `base_model`, and keep it in `merged_model` as an adapter."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger(__name__).setLevel(logging.INFO)
        if self.architecture != "decoder":
            raise InputError(f"architecture {self.architecture!r} is not supported, only 'decoder' is")
        if not self.loaded_models or not self.loaded_configs:
            self.loaded_models, self.loaded_configs = {}, {}  # some kits leave None
            self._load_huggingface_models_and_configs()
        if self.base_model is None:
            self._load_base_model()
        if self.tokenizer is None:
            self._load_tokenizer()
        self.coefficients, self.merged_model = run_in_kit(CONFIG, SKELETONS, self, ABOUT)
        return self.base_model
'''


def write_bundle(config: SearchConfig, prior: Path | None = None, queries_ahead: int = QUERIES_AHEAD) -> str:
    """Return the text of a bundled run.

    Args:
        config: whose search, prompts, objective and skeletons are bundled; adapters and base are the kit's.
        prior: file of `python -m search priors`, known by adapters' names in the bundle.
        queries_ahead: that the kit answers after the merge, one at a time; 0 leaves no time for them.

    Raises:
        InputError: for a configuration that cannot be bundled.
    """
    _refuse_unbundled(config, queries_ahead)
    cuts = _choose_cuts(config, has_prior=prior is not None)
    sources = cut_sources(("search.submission", ENTRIES), cuts)
    literal = _literal_of(config, prior, queries_ahead)
    about = {"version": library_versions()["concord"], "commit": checkout_commit()}
    kit_import = "from llm_merging.merging.Merges import Merges"
    blocks = [
        _bundle_head(about),
        join_imports(
            [line for s in sources for line in s.imports], [t for s in sources for t in s.guarded], kit_import
        ),
        f"{' = '.join(name for (_, name), by in cuts.stand_ins.items() if by == ANYTHING)} = Any",
        f"ABOUT = {format_literal(about, taken=8)}\n\nCONFIG = {format_literal(literal)}",
        f"SKELETONS = {format_literal({a.name: list(a.skeletons) for a in config.adapters if a.skeletons})}",
        *(f"{_heading(s.name, s.headline)}\n{s.text}" for s in sources),
        f"{_heading('MyMerge', 'The method.')}\n{CLASS.strip()}",
    ]
    return "\n\n\n".join(blocks).replace("\n\n\n", "\n\n", 4) + "\n"


def _refuse_unbundled(config: SearchConfig, queries_ahead: int) -> None:
    """Refuse (InputError) now what the bundle would not search by, or would refuse in the kit."""
    search, objective = config.search, config.objective.name
    if search.stages or search.gradient.inject_every:
        raise InputError("search.stages, search.gradient.inject_every: not bundled, leave both out")
    if objective not in OBJECTIVES:
        raise InputError(f"objective.name: {objective!r} is your own code, which is not bundled")
    if queries_ahead < 0:
        raise InputError(f"--queries-ahead: found {queries_ahead}, expected 0 or more")
    for skeleton in [text for adapter in config.adapters for text in adapter.skeletons]:
        parse_skeleton(skeleton)
    BatchOptimizer([0.0, 0.0], 1.0, search.n_candidates, search.max_evaluations, 0, search.optimizer)
    logp = torch.log_softmax(torch.zeros(1, 2, requires_grad=True), -1)
    smooth = OBJECTIVES[SMOOTH_PARTS.get(objective, objective)]
    if search.gradient.refine_steps and not smooth(logp, logp.detach(), torch.tensor([0])).requires_grad:
        raise InputError(
            f"objective.name: {objective!r} has no gradient: set search.gradient.refine_steps: 0"
        )


def _choose_cuts(config: SearchConfig, *, has_prior: bool) -> Cuts:
    """Return what a bundle of this configuration does without."""
    search, stand_ins = config.search, dict(STAND_INS)
    if _is_plain(search.space):
        stand_ins["search.submission", "make_kit_space"] = "search.stand_ins", "make_plain_space"
        stand_ins["search.space", "Space"] = ANYTHING
    if search.space.groups == "model":
        stand_ins["search.groups", "group_modules"] = "search.stand_ins", "group_as_one"
    if not has_prior:
        stand_ins["search.submission", "choose_start"] = "search.submission", "start_neutral"
    if search.optimizer == "CMA":
        stand_ins["search.optimizer", "BatchOptimizer"] = "search.kit_optimizer", "KitOptimizer"
    objective = config.objective.name
    if objective not in SMOOTH_PARTS:
        stand_ins["search.objective", "smooth_part"] = "search.stand_ins", "as_it_is"
    kept = {objective, SMOOTH_PARTS.get(objective, objective), "forward_kl", "top1_disagreement"}
    return Cuts(
        stand_ins=stand_ins,
        left_out=LEFT_OUT,
        kept_items={
            ("search.objective", "OBJECTIVES"): kept,
            ("search.objective", "COMBINATIONS"): {config.objective.combine},
        },
    )


def _is_plain(space: SpaceSettings) -> bool:
    """Whether genomes are coefficients as they are."""
    return (space.genome, space.sign, space.scale, space.top_k) == ("full", "signed", "plain", None)


def _heading(name: str, headline: str) -> str:
    head = f"# ======== {name}: "
    return head + shorten_row(headline, BUNDLE_WIDTH - len(head))


def _bundle_head(about: Mapping[str, Any]) -> str:
    lines = [f"Concord {about['version']}, commit {about['commit']}: a data-free merge of LoRA adapters."]
    lines += ["", "Licence: Apache-2.0, the Concord authors."]
    lines += [
        "Made by `python -m search bundle` from that commit's search/, cut to what a submission needs: a",
        "heading names the module that follows, where docstrings are whole. Put this file in place of",
        "llm_merging/merging/MyMerge.py; to change it, change search/ and bundle again.",
    ]
    body = "\n".join(lines)
    return f'"""{body}\n"""\n# ruff: noqa: N812, PLR0913\n\nfrom __future__ import annotations'


def _literal_of(config: SearchConfig, prior: Path | None, queries_ahead: int) -> dict[str, Any]:
    dumped = config.model_dump(mode="json")
    search = {key: value for key, value in dumped["search"].items() if key not in UNUSED}
    if _is_plain(config.search.space):
        search["space"] = {key: search["space"][key] for key in ("groups", "layers_per_block")}
    search["gradient"] = {key: dumped["search"]["gradient"][key] for key in ("refine_steps", "learning_rate")}
    return {
        "search": search,
        "prompts": dumped["prompts"],
        "objective": dumped["objective"],
        "queries_ahead": queries_ahead,
        "bundled_prior": None if prior is None else _prior_literal(prior, config.search.space.sign),
    }


def _prior_literal(path: Path, sign: str) -> dict[str, Any]:
    prior = load_prior(path)
    start = prior.start.clip(min=0.0) if sign == "non_negative" else prior.start
    return {
        "names": list(prior.names),
        "groups": list(prior.groups),
        "start": start.tolist(),
        "spread": prior.spread.tolist(),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def format_literal(value: Any, depth: int = 0, taken: int = 0) -> str:
    """Write a literal of dicts, lists, texts, numbers and None as a formatter would: in a row, if that fits.

    Args:
        depth: of its own indentation.
        taken: characters of its row that are not its own, indentation aside.
    """
    inner, outer, room = " " * 4 * (depth + 1), " " * 4 * depth, BUNDLE_WIDTH - 4 * depth - taken
    if isinstance(value, dict) and value:
        row = "{" + ", ".join(f"{_quote(key)}: {format_literal(item)}" for key, item in value.items()) + "}"
        if "\n" not in row and len(row) <= room:
            return row
        heads = [f"{_quote(key)}: " for key in value]
        items = [
            head + format_literal(item, depth + 1, len(head) + 1)
            for head, item in zip(heads, value.values(), strict=True)
        ]
        return "{\n" + "".join(f"{inner}{item},\n" for item in items) + outer + "}"
    if isinstance(value, list) and value:
        row = "[" + ", ".join(map(format_literal, value)) + "]"
        if "\n" not in row and len(row) <= room:
            return row
        rows = [format_literal(item, depth + 1, 1) for item in value]
        return "[\n" + "".join(f"{inner}{row},\n" for row in rows) + outer + "]"
    return _format_text(value, depth, room) if isinstance(value, str) else repr(value)


def _format_text(text: str, depth: int, room: int) -> str:
    """Write a text, broken at its lines where that takes no more rows than breaking it between words."""
    if len(_quote(text)) <= room or not text:
        return _quote(text)
    first, rest = re.match(r"(?s)(\n*[^\n]*)(.*)", text).groups()  # type: ignore[union-attr]
    pieces = [*_break_text(first, room), *_break_text(rest, room)]
    if len(pieces) > len(_break_text(text, room)):
        pieces = _break_text(text, room)
    return f"\n{' ' * 4 * depth}".join(map(_quote, pieces))


def _break_text(text: str, room: int) -> list[str]:
    pieces = [""] if text else []
    for word in re.findall(r"\s*\S+\s*?|\s+", text):
        for part in [word] if len(_quote(word)) <= room else word:  # a word that fits no row goes by letters
            if len(_quote(pieces[-1] + part)) > room:
                pieces.append("")
            pieces[-1] += part
    return [piece for piece in pieces if piece]


def _quote(text: str) -> str:
    """Quote as a formatter does: double quotes, unless that needs more escapes."""
    quoted = json.dumps(text, ensure_ascii=False)
    return repr(text) if '"' in text and "'" not in text else quoted
