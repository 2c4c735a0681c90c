"""How fast are answers, and are they those of one query at a time? Writing, choices, and a whole query file.

`python -m benchmarks.bench_answers --config CONFIG --queries CSV` answers with a configuration's base,
unmerged, as large as a merge. Measured are new tokens/s at each of --batches, on prompts spread over the
file's lengths, over a growing cache and over one of fixed size (on CUDA with a graph a token), with end
tokens ignored; seconds to score choices with their prompt read once, and with it read for each; and seconds
for the whole file. Repeats are interleaved, clocks wait for the device, figures are median, least and most.
Then it counts where a batch answers unlike one query at a time: the zoo's base in float32, the
configuration's in bfloat16. Appends a line of JSON to benchmarks/results.jsonl. Knows answering, not
merging.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import RESULTS, ROOT, describe_machine
from llm_merging.data import GENERATION, MULTIPLE_CHOICE, Query, read_queries
from llm_merging.evaluation import answer_queries
from llm_merging.main import check_context, quiet_libraries
from llm_merging.merging.Merges import DEMO_CONFIG, Merges
from llm_merging.model.decoder_functions import encode_choice, encode_input, end_ids, score_choices
from llm_merging.model.rows import device_of, forward, pad_right
from llm_merging.model.writing import write_growing, write_static
from search.config import load_config
from search.errors import InputError

WAYS = {"growing": write_growing, "fixed": write_static}
CHOICE_QUERIES = 64
QUERIES_PER_BATCH = 16
"""Choices are scored so many queries at a time, whichever way."""
SAME_NATS = 1e-2
"""Further apart than this, two ways to score a choice are two functions, in float32."""


def load_method(config: Path, *overrides: str) -> Merges:
    """Return a merge method whose base answers as it is."""
    method = Merges("bench_answers", load_config(config, overrides))
    method._load_base_model()
    method._load_tokenizer()
    return method


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Run; return the seconds from an idle device to an idle device."""
    wait(device)
    started_s = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started_s


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Run each once to warm up, then all in turn, so many times; return seconds by name."""
    for name, run in runs.items():
        print(f"{name}: {seconds_of(run, device):.1f} s at first", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    return seconds


def spread(values: Sequence[float]) -> list[float]:
    """Return median, least and most."""
    return [round(float(f(values)), 4) for f in (median, min, max)]


def spread_over_lengths(prompts: Sequence[list[int]], n: int) -> list[list[int]]:
    """Choose n prompts, evenly from the longest to the shortest; short files give some more than once."""
    by_length = sorted(prompts, key=len, reverse=True)
    return [by_length[i * len(by_length) // n] for i in range(n)]


def measure_writing(
    method: Merges, queries: Sequence[Query], batches: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Return new tokens/s for each batch size and kind of cache."""
    prompts = [encode_input(method.input_tokenizer, q.input) for q in queries if q.eval_type == GENERATION]
    pad = method.target_tokenizer.eos_token_id
    runs: dict[str, Callable[[], object]] = {}
    rows = {}
    for n in batches:
        chosen = spread_over_lengths(prompts, n)
        for way, write in WAYS.items():
            runs[f"{way} {n}"] = lambda chosen=chosen, write=write: write(  # type: ignore[misc]
                method.base_model, chosen, method.max_gen_len, frozenset(), pad=pad
            )
            lengths = [max(map(len, chosen)), min(map(len, chosen))]
            rows[f"{way} {n}"] = {"cache": way, "batch": n, "longest_and_shortest": lengths}
    seconds = interleave(runs, repeats, device_of(method.base_model))
    return [
        row | {"new_tokens_per_s": spread([row["batch"] * method.max_gen_len / s for s in seconds[name]])}
        for name, row in rows.items()
    ]


@torch.inference_mode()
def score_whole_rows(
    model: nn.Module, prompts: Sequence[list[int]], choices: Sequence[list[list[int]]], pad: int
) -> Tensor:
    """Score each choice in a row of its own with all of its prompt: what `score_choices` saves.

    Returns:
        Summed log-probabilities (n_rows,), in the order of prompts and then of choices.
    """
    pairs = [(prompt, choice) for prompt, texts in zip(prompts, choices, strict=True) for choice in texts]
    ids, mask = pad_right([[*prompt, *choice] for prompt, choice in pairs], pad, device_of(model))
    logits = forward(model, ids, mask, last_only=False).logits
    places = [
        (row, len(prompt) - 1 + k) for row, (prompt, choice) in enumerate(pairs) for k in range(len(choice))
    ]
    row, column = torch.tensor(places, device=ids.device).T
    logp = logits[row, column].float().log_softmax(-1).gather(1, ids[row, column + 1, None])[:, 0]
    return torch.zeros(len(pairs), device=ids.device).index_add_(0, row, logp).cpu()


def measure_choices(method: Merges, queries: Sequence[Query], repeats: int) -> dict[str, Any]:
    """Return seconds to score choices with shared prompts and with whole rows, and how far scores differ."""
    asked = pick([q for q in queries if q.eval_type == MULTIPLE_CHOICE], CHOICE_QUERIES)
    asked.sort(key=lambda query: len(query.input))
    model, pad = method.base_model, method.target_tokenizer.eos_token_id
    batches = []
    for start in range(0, len(asked), QUERIES_PER_BATCH):
        some = asked[start : start + QUERIES_PER_BATCH]
        prompts = [encode_input(method.input_tokenizer, q.input) for q in some]
        choices = [[encode_choice(method.target_tokenizer, c) for c in q.answer_choices] for q in some]
        batches.append((prompts, choices))

    def shared() -> list[Tensor]:
        scores = [score_choices(model, *batch, pad=pad, skip_first=False) for batch in batches]
        return [batch[batch.isfinite()] for batch in scores]

    def whole() -> list[Tensor]:
        return [score_whole_rows(model, *batch, pad) for batch in batches]

    gap = (torch.cat(shared()) - torch.cat(whole())).abs().max().item()
    if method.base_model.dtype == torch.float32 and gap > SAME_NATS:
        raise ValueError(f"a choice's score differs by {gap:.3g} nats between shared prompts and whole rows")
    seconds = interleave({"shared": shared, "whole_rows": whole}, repeats, device_of(model))
    return {
        "n_queries": len(asked),
        "n_choices": sum(len(q.answer_choices) for q in asked),
        **{f"{name}_s": spread(values) for name, values in seconds.items()},
        "most_different_nats": float(f"{gap:.3g}"),
    }


def pick(queries: Sequence[Query], n: int) -> list[Query]:
    """Return n queries at even distances, or all."""
    return [queries[i * len(queries) // n] for i in range(n)] if len(queries) > n else list(queries)


def count_differences(method: Merges, queries: Sequence[Query], n: int) -> dict[str, Any]:
    """Answer n queries of each kind in a batch and one at a time, and over both caches; count differences."""
    found: dict[str, Any] = {"dtype": str(method.base_model.dtype).removeprefix("torch.")}
    for kind in (GENERATION, MULTIPLE_CHOICE):
        asked = pick([q for q in queries if q.eval_type == kind], n)
        together = answer_batch(method, asked)
        alone = [answer_batch(method, [query])[0] for query in asked]
        found |= {kind: {"n_queries": len(asked), "different": n_different(alone, together)}}
        if kind == GENERATION:
            prompts = [encode_input(method.input_tokenizer, query.input) for query in asked]
            found[kind]["different_by_cache"] = n_different(*write_both_ways(method, prompts))
    return found


def write_both_ways(method: Merges, prompts: Sequence[list[int]]) -> list[list[list[int]]]:
    """Write for prompts in one batch over each kind of cache."""
    stop_ids = end_ids(method.base_model, method.target_tokenizer)
    pad = method.target_tokenizer.eos_token_id
    return [
        write(method.base_model, prompts, method.max_gen_len, stop_ids, pad=pad) for write in WAYS.values()
    ]


def n_different(some: Sequence[object], others: Sequence[object]) -> int:
    """Count places where two lists differ."""
    return sum(a != b for a, b in zip(some, others, strict=True))


def answer_batch(method: Merges, queries: Sequence[Query]) -> list[Any]:
    """Answer queries of one kind in one batch: token ids, or the choice's index."""
    batch = {"input": [q.input for q in queries], "answer_choices": [list(q.answer_choices) for q in queries]}
    if queries[0].eval_type == GENERATION:
        return list(method.generate(batch)[0])
    return list(method.predict_multiple_choice(batch)[0].tolist())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all of it; return what one line of results says."""
    method = load_method(arguments.config, *arguments.overrides)
    method.max_gen_len = arguments.new_tokens
    queries = read_queries(arguments.queries)
    queries = pick(queries, arguments.limit or len(queries))
    missing = {GENERATION, MULTIPLE_CHOICE} - {query.eval_type for query in queries}
    if missing:
        raise InputError(
            f"{arguments.queries}: no query of {' or '.join(sorted(missing))} among {len(queries)}. "
            "Give both kinds, or a higher --limit."
        )
    check_context(method, {arguments.queries: queries})
    device = device_of(method.base_model)
    parts: dict[str, Any] = {
        "writing": measure_writing(method, queries, arguments.batches, arguments.repeats),
        "choices": measure_choices(method, queries, arguments.repeats),
    }
    seconds = [
        seconds_of(lambda: answer_queries(method, queries, progress=False), device)
        for _ in range(arguments.repeats)
    ]
    parts |= {"n_queries": len(queries), "file_s": spread(seconds), "first_file_s": round(seconds[0], 4)}
    if device.type == "cuda":
        parts |= {"device": torch.cuda.get_device_name(device)}
        parts |= {"peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)}
    if method.base_model.dtype != torch.bfloat16:
        method = load_method(arguments.config, *arguments.overrides, "base.dtype=bfloat16")
    zoo = load_method(DEMO_CONFIG, "base.dtype=float32", f"device={device}")
    zoo.max_gen_len = method.max_gen_len = arguments.new_tokens
    compared = [count_differences(m, queries, arguments.compare) for m in (zoo, method)]
    return parts | {"batch_1_against_a_batch": compared}


def tell(result: dict[str, Any]) -> None:
    """Print for people what the line says."""
    for row in result["writing"]:
        speed = "{} ({} to {})".format(*row["new_tokens_per_s"])
        print(f"batch {row['batch']:3}, cache {row['cache']:8} {speed} new tokens/s")
    print(f"choices: {result['choices']}")
    print("{} queries: {} s ({} to {})".format(result["n_queries"], *result["file_s"]))
    for row in result["batch_1_against_a_batch"]:
        print(f"one at a time against a batch: {row}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_answers", description=__doc__)
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG)
    parser.add_argument("--queries", type=Path, default=ROOT / "data/test.csv", metavar="CSV")
    parser.add_argument("--limit", type=int, help="answer so many queries, evenly from the file")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compare", type=int, default=32, metavar="N", help="queries of each kind")
    parser.add_argument("--memory-gib", type=float, help="as if the CUDA device had no more")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, record."""
    quiet_libraries()
    if arguments.memory_gib:
        if not torch.cuda.is_available():
            raise InputError("--memory-gib limits a CUDA device, and there is none. Leave it out.")
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.memory_gib * 2**30 / total))
    asked = {name: getattr(arguments, name) for name in ("overrides", "new_tokens", "repeats", "memory_gib")}
    names = {"config": arguments.config.name, "queries": arguments.queries.name}
    result = {"benchmark": "bench_answers", **names, **asked, **describe_machine(), **measure(arguments)}
    tell(result)
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; bad input is one line and exit code 2."""
    try:
        return run(parse_arguments(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
