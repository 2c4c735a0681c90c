"""Write the model card of a merge: README.md with a YAML head, as the Hugging Face hub and people read it.

Knows the content of coefficients.json, Markdown, YAML and the ranks that vLLM takes; not tensors or models.
"""

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

CARD_FILE = "README.md"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be: docs.vllm.ai, vllm.config.lora, MaxLoRARanks (v0.14)."""
VLLM_DEFAULT_RANK = 16
MAX_GROUP_COLUMNS = 12

_CARD_MARK = "<!-- Model card written by Concord -->"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def vllm_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` that holds an adapter of this rank; None where vLLM has none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def is_our_card(path: Path) -> bool:
    """Tell a card that `write_card` wrote from anybody else's README.md, or none."""
    try:
        return _CARD_MARK in path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False


def write_card(
    document: dict[str, Any],
    *,
    base_name: str,
    rank: int | None,
    relative_error: float | None = None,
    worst: tuple[str, float] | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        document: the content of coefficients.json.
        base_name: what users call the base; in the YAML head only where it can be a hub id.
        rank: the adapter's largest rank; None for a dense model.
        relative_error: Frobenius norm of what a smaller rank left out over that of the exact update.
        worst: the module where that is largest, and how large.
    """
    kind = "model" if rank is None else "LoRA adapter"
    parts = (
        f"---\n{_head(base_name, dense=rank is None)}---\n{_CARD_MARK}",
        f"# {len(document['adapters'])} LoRA experts of {escape_text(base_name)}, merged into one {kind}",
        _summary(document, rank, relative_error, worst),
        _usage(document["base"], base_name, rank),
        "## Coefficients",
        _coefficients(document),
        "## Where it is from",
        _experts(document["adapters"]),
        _provenance(document),
        "No licence is claimed here: those of the base model and of the adapters apply.",
    )
    return "\n\n".join(parts) + "\n"


def _head(base_name: str, *, dense: bool) -> str:
    head: dict[str, Any] = {}
    if _HUB_NAME.fullmatch(base_name) and not Path(base_name).is_dir():  # the hub refuses other names
        head["base_model"] = base_name
        head["base_model_relation"] = "merge" if dense else "adapter"
    head["library_name"] = "transformers" if dense else "peft"
    head["pipeline_tag"] = "text-generation"
    head["tags"] = ["merge", "lora", "concord", "data-free"]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def _summary(
    document: dict[str, Any],
    rank: int | None,
    relative_error: float | None,
    worst: tuple[str, float] | None,
) -> str:
    lines = [
        "The update of each weight is the sum over the adapters below of coefficient x scaling x B A, exact: "
        f"no cross terms. Method: {escape_text(document['method'])}; no data was used."
    ]
    if rank is None:
        lines.append("The sum is added to the base's own weights, so nothing else is needed to run it.")
    else:
        lines.append(f"Largest rank: {rank}. `lora_alpha` equals `r`, so the scaling is 1 for every reader.")
    if relative_error is not None:
        lines.append(
            "Cut to this rank, module by module, by a singular value decomposition of the exact sum: no "
            "adapter of this rank is nearer. "
            f"It leaves out {relative_error:.3g} of the sum (relative Frobenius norm)."
        )
    if worst is not None:
        lines.append(f"The module that loses most is {escape_text(worst[0])}: {worst[1]:.3g} of its update.")
    return "\n".join(lines)


def _usage(base: dict[str, Any], base_name: str, rank: int | None) -> str:
    if rank is None:
        return _python(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        )
    source = str(base.get("id") or base_name)
    revision = f", revision={base['revision']!r}" if base.get("revision") else ""
    peft = _python(
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({source!r}{revision})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    )
    return f"{peft}\n\n{_vllm_usage(source, base.get('revision'), rank)}"


def _vllm_usage(source: str, revision: str | None, rank: int) -> str:
    allowed = vllm_rank(rank)
    if allowed is None:
        return (
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, this one is {rank}: cut it with "
            f"`python -m search merge coefficients.json -o DIR --rank {VLLM_RANKS[-1]}`."
        )
    pinned = f" --revision {shlex.quote(revision)}" if revision else ""
    serve = f"vllm serve {shlex.quote(source)}{pinned} --enable-lora --max-lora-rank {allowed}"
    return f"```bash\n{serve} \\\n    --lora-modules merged=path/to/this/folder\n```"


def _python(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))


def _coefficients(document: dict[str, Any]) -> str:
    """One row an adapter; a column a group, or a summary of many groups."""
    columns = list(zip(*document["coefficients"], strict=True))  # an adapter's numbers over the groups
    groups = list(document["groups"])
    n_groups = len(groups)
    if n_groups > MAX_GROUP_COLUMNS:
        note = f"Over {n_groups} groups of modules; `coefficients.json` holds each one.\n\n"
        header = ["mean", "min", "max"]
        columns = [(math.fsum(column) / n_groups, min(column), max(column)) for column in columns]
    else:
        note, header = "", groups
    rows = [[a["name"], *map(_number, c)] for a, c in zip(document["adapters"], columns, strict=True)]
    left = document["objective"].get("per_expert")
    if not isinstance(left, Sequence) or len(left) != len(rows):
        return note + markdown_table(["adapter", *header], rows)
    rows = [[*row, _number(value)] for row, value in zip(rows, left, strict=True)]
    legend = (
        "\n\nDisagreement of the exact sum with each expert on its own text, over that of the base: "
        "0 is the expert itself, 1 no closer than the base."
    )
    return note + markdown_table(["adapter", *header, "disagreement"], rows) + legend


def _experts(adapters: Iterable[dict[str, Any]]) -> str:
    rows = [
        [
            a["name"],
            a["id"],
            a["revision"] or "",
            a["sha256"][:12],
            ", ".join(map(str, a["rank"])),
            ", ".join(map(_number, a["scaling"])),
        ]
        for a in adapters
    ]
    return markdown_table(["adapter", "source", "revision", "sha256 of its weights", "rank", "scaling"], rows)


def _provenance(document: dict[str, Any]) -> str:
    base = document["base"]
    revision = f", revision {base['revision']}" if base.get("revision") else ""
    digest = f", sha256 {base['sha256'][:12]}" if base.get("sha256") else ""
    facts = {"base": f"{base.get('id')}{revision}{digest}", **document["provenance"]}
    objective = {key: value for key, value in document["objective"].items() if key != "per_expert"}
    facts |= {"objective": objective} if objective else {}
    return "\n".join(f"- {escape_text(key)}: {escape_text(_flat(value))}" for key, value in facts.items())


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items()) or "none"
    return _number(value) if isinstance(value, float) else "unknown" if value is None else str(value)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table whose cells are text."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(escape_text, row))} |" for row in cells)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite"


def escape_text(text: str) -> str:
    """Keep text from being read as Markdown or HTML, or from leaving its line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(str(text).split()))
