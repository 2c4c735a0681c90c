"""What a submission says of itself: each of the competition's rules, and how the run kept it, in Markdown.

Knows a finished run's record; not weights, nor where the text is written.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from search.card import escape_text, markdown_table
from search.finalists import BALANCED, BASE, UNIFORM
from search.verify_record import RunRecord, check_ending

TITLE = "# Submission: LoRA experts merged without data"
HOUR_S = 3600
"""What the competition allows for merging and evaluation together, on one A6000."""


def write_statement(record: RunRecord, files: Mapping[str, str], n_lines: int) -> str:
    """Return README.md.

    Args:
        files: name of each file that is handed in -> what it is.
        n_lines: of the bundled method.
    """
    parts = [
        TITLE,
        _opening(record),
        markdown_table(["file", "what it is"], [[name, what] for name, what in files.items()]),
        "## The rules, one by one",
        "\n".join(f"- **{rule}** {said}" for rule, said in _rules(record, n_lines)),
        "## Base and adapters",
        _weights(record),
        "## How close the merge is to each expert",
        _closeness(record),
        "## Check it",
        "In a clone at the commit above, with these versions, and this folder in it as `submission`:\n\n"
        "```\npython -m search verify submission\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _opening(record: RunRecord) -> str:
    header, merged = record.header, record.merged
    n_adapters = len(header["adapters"])
    winner = escape_text(merged["winner"])
    is_found = merged["winner"].startswith(("archive ", "mean", "refined"))  # else a reference
    whence = "that a search found" if is_found else "that need no search,"
    return (
        f"{n_adapters} adapters of {escape_text(header['config']['base']['name'])}, merged by coefficients "
        f"{whence} without data. The merge that won is `{winner}`; coefficients.json has it."
    )


def _rules(record: RunRecord, n_lines: int) -> Iterator[tuple[str, str]]:
    header, trace = record.header, record.trace
    yield (
        "One file.",
        (
            f"MyMerge.py ({n_lines} lines, plain source) goes in place of `llm_merging/merging/MyMerge.py` "
            "of the starter kit; no other file changes. It searches anew there, with this run's settings."
        ),
    )
    yield "No data.", _data(record)
    left_out = ", ".join(f"{name} ({why})" for name, why in header.get("left_out", {}).items())
    yield (
        "Listed adapters only.",
        (
            f"{len(header['adapters'])} of {len(header['config']['adapters'])} that are configured, all of "
            f"them below, with revisions and hashes; left out: {escape_text(left_out) or 'none'}."
        ),
    )
    yield "Time.", _time(record)
    yield "Memory.", _memory(record)
    yield "Reproducible.", _reproducible(record)
    yield "Answers.", _answers(trace.last("answered") or {})


def _data(record: RunRecord) -> str:
    prompts = record.trace.last("prompts")
    if prompts is None:
        return "None was used: there was no search."
    n_prompts = len(prompts["searched"]) + len(prompts["unseen"])
    from_skeleton = sum(
        prompt["from_skeleton"] for part in ("searched", "unseen") for prompt in prompts[part]
    )
    return (
        f"None was used: no label, no score on a task, no row of a data set. The search ran on {n_prompts} "
        f"prompts that base and experts wrote, {from_skeleton} of them from skeletons: trace.jsonl has all "
        f"(sha256 {prompts['sha256'][:12]}), and its first line the skeletons. The queries were opened to be "
        f"answered, and to measure how long that takes.{_prior(record.header)}"
    )


def _prior(header: Mapping[str, Any]) -> str:
    if not header.get("prior"):
        return ""
    sha256 = header["prior"]["sha256"]
    return f" It started from a prior, learnt from earlier searches (file of sha256 {sha256[:12]})."


def _time(record: RunRecord) -> str:
    answered = record.trace.last("answered") or {}
    job_s, box_s = answered["job_s"], record.header["config"]["search"]["time_box_s"]
    limit = "within" if job_s <= HOUR_S else "BEYOND"
    return (
        f"{job_s:.0f} s from the start of the process to the last answer, of a time box of {box_s:g} s; "
        f"{limit} the hour, on {escape_text(_machine(record))}. Another machine takes another time."
    )


def _memory(record: RunRecord) -> str:
    answered = record.trace.last("answered") or {}
    host = f"{answered['host_peak_bytes'] / 2**30:.1f} GiB of the host's memory"
    if answered.get("peak_bytes") is None:
        return f"At most {host}; no GPU was used."
    return f"At most {answered['peak_bytes'] / 2**30:.1f} GiB of the GPU's memory in tensors, and {host}."


def _reproducible(record: RunRecord) -> str:
    header = record.header
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    end = check_ending(record)
    return (
        f"Seed {header['seed']}; {versions}; commit {header.get('commit') or 'unknown'}; {header['dtype']} "
        f"on {escape_text(_machine(record))}. How it ended: {end.text}. Where evaluations end it, the same "
        "seed, versions and kind of device find the same again, on a CPU to the last bit."
    )


def _machine(record: RunRecord) -> str:
    """Return what computed: the GPU's name, else the CPU's and its threads."""
    header = record.header
    cpu = header.get("cpu") or {}
    return str(header.get("device_name") or f"{cpu.get('name', 'a CPU')}, threads: {cpu.get('threads', '?')}")


def _answers(answered: Mapping[str, Any]) -> str:
    rows = sum(file["rows"] for file in answered["files"])
    full = (
        "all tokens of a choice count, where the kit leaves out its first: its own run may choose otherwise"
    )
    scoring = full if answered["choice_scoring"] == "full" else "choices are scored as the kit does"
    return (
        f"{rows} rows, ids as in the queries, none empty; {answered['cut']} generations were cut for want of "
        f"time and {answered['placeholders']} queries not read; {scoring}."
    )


def _weights(record: RunRecord) -> str:
    base = record.header["base"]
    table = record.winner
    rows = [["base", base["id"], _pin(base), _digest(base), ""]]
    for place, adapter in enumerate(record.header["adapters"]):
        column = table[:, place]
        share = f"{column[0]:.4g}" if len(column) == 1 else f"{column.min():.4g} to {column.max():.4g}"
        rows.append([adapter["name"], adapter["id"], _pin(adapter), _digest(adapter), share])
    return markdown_table(["name", "source", "revision", "sha256 of its weights", "coefficient"], rows)


def _pin(weights: Mapping[str, Any]) -> str:
    return weights["revision"] or "a folder, no revision"


def _digest(weights: Mapping[str, Any]) -> str:
    return weights["sha256"] or "random weights"


def _closeness(record: RunRecord) -> str:
    if (finalists := record.finalists) is None:
        return "Nothing was searched, for want of time, so nothing was compared."
    place = finalists["names"].index(finalists["winner"])
    losses = dict(zip(finalists["names"], finalists["losses"], strict=True))
    others = [name for name in (BASE, UNIFORM, BALANCED) if losses.get(name) is not None]
    rivals = ", ".join(f"{name} {losses[name]:.4f}" for name in others)
    names = [adapter["name"] for adapter in record.header["adapters"]]
    shares = zip(names, finalists["per_expert"][place], strict=True)
    rows = [[name, f"{value:.3f}"] for name, value in shares]
    weak = (record.trace.last("signals") or {}).get("weak") or ["none"]
    doubtful = f"Adapters whose prompts leave doubt: {escape_text(', '.join(weak))}."
    return (
        f"Loss {finalists['losses'][place]:.4f} on {finalists['prompts']} prompts ({rivals}). Below is what "
        "is left of the base's disagreement with each expert: 0 is the expert itself, 1 the base. "
        f"{doubtful}\n\n{markdown_table(['expert', 'left'], rows)}"
    )
