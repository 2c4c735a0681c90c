"""The benchmark of answers: the same function both ways, in turn, and one line of JSON comes of it."""

import json

import pytest
import torch

from benchmarks.bench_answers import (
    interleave,
    main,
    n_different,
    parse_arguments,
    pick,
    run,
    score_whole_rows,
    spread_over_lengths,
)
from llm_merging.model.decoder_functions import encode_choice, encode_input, score_choices
from search.errors import InputError
from tests.test_base import make_toy_tokenizer
from tests.test_decoder_functions import CHOICES, TEXTS, make_toy


def test_whole_rows_score_what_shared_prompts_score():
    model, tokenizer = make_toy("llama"), make_toy_tokenizer()
    prompts = [encode_input(tokenizer, text) for text in TEXTS]
    choices = [[encode_choice(tokenizer, text) for text in texts] for texts in CHOICES]
    shared = score_choices(model, prompts, choices, pad=2, skip_first=False)
    whole = score_whole_rows(model, prompts, choices, 2)
    torch.testing.assert_close(whole, shared[shared.isfinite()].float(), rtol=0, atol=1e-5)


def test_runs_take_turns_after_one_warm_up_each():
    order = []
    seconds = interleave(
        {name: lambda name=name: order.append(name) for name in "ab"}, 2, torch.device("cpu")
    )
    assert order == list("ababab")
    assert [len(seconds[name]) for name in "ab"] == [2, 2]


def test_prompts_and_queries_are_spread_over_all_there_are():
    prompts = [[0] * n for n in (3, 9, 1, 5)]
    assert [len(prompt) for prompt in spread_over_lengths(prompts, 2)] == [9, 3]
    assert [len(prompt) for prompt in spread_over_lengths(prompts, 1)] == [9]
    assert [len(prompt) for prompt in spread_over_lengths(prompts, 8)] == [9, 9, 5, 5, 3, 3, 1, 1]
    assert pick("abcdef", 3) == ["a", "c", "e"]
    assert pick("ab", 3) == ["a", "b"]


def test_answers_that_differ_are_counted():
    assert n_different([[1], [2], [3]], [[1], [2, 0], [4]]) == 2


def test_one_line_of_results_says_all_of_it(tmp_path, capsys):
    size = "--limit 12 --batches 1 3 --repeats 1 --compare 2 --new-tokens 4 --set device=cpu".split()
    assert run(parse_arguments([*size, "--out", str(tmp_path / "results.jsonl")])) == 0
    line = json.loads((tmp_path / "results.jsonl").read_text())
    assert [(row["cache"], row["batch"]) for row in line["writing"]] == [
        ("growing", 1),
        ("fixed", 1),
        ("growing", 3),
        ("fixed", 3),
    ]
    assert all(
        low <= middle <= high for middle, low, high in (r["new_tokens_per_s"] for r in line["writing"])
    )
    assert line["choices"]["most_different_nats"] < 1e-3
    assert line["n_queries"] == 12
    float32, bfloat16 = line["batch_1_against_a_batch"]
    assert (float32["dtype"], bfloat16["dtype"]) == ("float32", "bfloat16")
    assert float32["generation"] == {"n_queries": 2, "different": 0, "different_by_cache": 0}
    assert "new tokens/s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_a_memory_limit_needs_a_card():
    with pytest.raises(InputError, match="--memory-gib"):
        run(parse_arguments(["--memory-gib", "1"]))


def test_both_kinds_of_query_are_needed(capsys):
    assert main(["--limit", "1", "--set", "device=cpu"]) == 2
    assert "no query of" in capsys.readouterr().err
