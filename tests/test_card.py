"""The model card: what the hub reads from it, and what people do."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from hypothesis import example, given
from hypothesis import strategies as st

from search.card import CARD_FILE, VLLM_RANKS, is_our_card, vllm_rank, write_card


def make_document(n_groups: int = 2, names: tuple[str, ...] = ("maths", "code"), **changes: object) -> dict:
    """As coefficients.json has it; the coefficient of group g and adapter i is g + i / 10."""
    adapters = [
        {
            "name": name,
            "id": f"experts/{name}",
            "revision": None,
            "sha256": "0123456789abcdef" * 4,
            "rank": [4, 8],
            "scaling": [2.0],
        }
        for name in names
    ]
    return {
        "schema": 1,
        "method": "concord",
        "base": {"id": "org/base", "revision": "c0ffee", "sha256": "ab" * 32},
        "adapters": adapters,
        "groups": {f"layer.{g}": [f"m.{g}"] for g in range(n_groups)},
        "coefficients": [[g + i / 10 for i in range(len(names))] for g in range(n_groups)],
        "objective": {"name": "entropy_excess", "loss": 0.25, "per_expert": [0.125, None][: len(names)]},
        "provenance": {"commit": "deadbeef", "versions": {"concord": "0.1.0"}, "seed": 3, "trace": "t.jsonl"},
        **changes,
    }


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def rows_of(card: str, first: str) -> list[list[str]]:
    """The cells of the table whose header begins with `first`, without the line below the header."""
    lines = card[card.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in rows if set(row) != {"---"}]


# ---- head


def test_the_head_says_what_the_hub_asks_for():
    adapter = head_of(write_card(make_document(), base_name="org/base", rank=8))
    assert adapter == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "lora", "concord", "data-free"],
    }
    model = head_of(write_card(make_document(), base_name="org/base", rank=None))
    assert (model["base_model_relation"], model["library_name"]) == ("merge", "transformers")


@pytest.mark.parametrize("name", ["/home/me/base", "data/zoo/base", "C:\\models\\base", "base", "tests/../x"])
def test_a_base_that_is_no_hub_id_is_left_out_of_the_head_which_the_hub_would_refuse(name):
    card = write_card(make_document(), base_name=name, rank=8)
    assert not head_of(card).keys() & {"base_model", "base_model_relation"}
    assert "merged into one LoRA adapter" in card


def test_a_folder_that_looks_like_a_hub_id_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/base").mkdir(parents=True)
    assert "base_model" not in head_of(write_card(make_document(), base_name="org/base", rank=8))


names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20) | st.sampled_from(
    ["a: b", "'", '"', "- x", "---", "é/ü", "no", "1.0", "a|b", "#x", "{}", "%", "\x85", "a\nb"]
)


@given(base_name=names, adapter=names, dense=st.booleans())
@example(base_name="x: 'y' \"z\"", adapter="a|b\n---", dense=False)
def test_any_name_leaves_the_head_readable_and_the_tables_whole(tmp_path_factory, base_name, adapter, dense):
    document = make_document(names=(adapter, "code"), base={"id": base_name, "revision": adapter})
    card = write_card(document, base_name=base_name, rank=None if dense else 8)
    assert head_of(card)["library_name"] == ("transformers" if dense else "peft")
    assert ModelCard(card).data.library_name == head_of(card)["library_name"]
    path = tmp_path_factory.getbasetemp() / CARD_FILE
    path.write_text(card, encoding="utf-8")
    assert metadata_load(path) == head_of(card)
    assert is_our_card(path)
    assert [len(row) for row in rows_of(card, "adapter")] == [4, 4, 4]


# ---- how to load it


def test_it_says_how_to_load_an_adapter_in_peft_and_vllm():
    card = write_card(make_document(), base_name="org/base", rank=20)
    assert "AutoModelForCausalLM.from_pretrained('org/base', revision='c0ffee')" in card
    assert 'PeftModel.from_pretrained(base, "path/to/this/folder")' in card
    assert "vllm serve org/base --revision c0ffee --enable-lora --max-lora-rank 32 \\\n" in card


def test_code_survives_a_base_with_quotes_and_blanks():
    document = make_document(base={"id": "/my models/it's", "revision": None})
    card = write_card(document, base_name="/my models/it's", rank=8)
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", card, re.DOTALL))
    compile(blocks["python"], "card", "exec")
    assert "vllm serve '/my models/it'\"'\"'s' --enable-lora" in blocks["bash"]


def test_a_rank_that_vllm_does_not_take_comes_with_the_way_out():
    card = write_card(make_document(), base_name="org/base", rank=513)
    assert "vLLM takes ranks up to 512, this one is 513" in card
    assert "python -m search merge coefficients.json -o DIR --rank 512" in card
    assert "--enable-lora" not in card


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512)])
def test_vllm_needs_the_smallest_of_its_ranks_that_holds_the_adapter(rank, allowed):
    assert vllm_rank(rank) == allowed
    assert allowed in VLLM_RANKS


def test_vllm_has_no_rank_above_its_last():
    assert vllm_rank(513) is None


def test_a_dense_model_needs_neither_base_nor_vllm_flags():
    card = write_card(make_document(), base_name="org/base", rank=None)
    assert 'AutoTokenizer.from_pretrained("path/to/this/folder")' in card
    assert "peft" not in card
    assert "vllm" not in card


# ---- numbers and provenance


def test_few_groups_are_shown_one_by_one_with_the_disagreement():
    card = write_card(make_document(), base_name="org/base", rank=8)
    assert rows_of(card, "adapter") == [
        ["adapter", "layer.0", "layer.1", "disagreement"],
        ["maths", "0", "1", "0.125"],
        ["code", "0.1", "1.1", "not finite"],
    ]


def test_many_groups_are_summed_up_and_found_in_the_file():
    card = write_card(make_document(n_groups=13, objective={}), base_name="org/base", rank=8)
    assert rows_of(card, "adapter") == [
        ["adapter", "mean", "min", "max"],
        ["maths", "6", "0", "12"],
        ["code", "6.1", "0.1", "12.1"],
    ]
    assert "Over 13 groups of modules; `coefficients.json` holds each one." in card


def test_the_error_of_a_cut_is_told_and_only_then():
    assert "leaves out 0.0123 of the sum" in write_card(
        make_document(), base_name="org/base", rank=8, relative_error=0.01234
    )
    worst = write_card(make_document(), base_name="org/base", rank=8, relative_error=0.1, worst=("a_b", 0.25))
    assert "\nThe module that loses most is a\\_b: 0.25 of its update.\n" in worst
    card = write_card(make_document(), base_name="org/base", rank=8)
    assert "leaves out" not in card
    assert "loses most" not in card


def test_it_says_where_everything_is_from_and_claims_no_licence():
    card = write_card(make_document(), base_name="org/base", rank=8)
    table = card[card.index("| adapter | source") :]
    assert rows_of(table, "adapter")[1] == ["maths", "experts/maths", "", "0123456789ab", "4, 8", "2"]
    for line in (
        "- base: org/base, revision c0ffee, sha256 abababababab",
        "- commit: deadbeef",
        "- versions: concord 0.1.0",
        "- seed: 3",
        "- trace: t.jsonl",
        "- objective: name entropy\\_excess, loss 0.25",
    ):
        assert f"\n{line}\n" in card
    assert "license" not in head_of(card)
    assert "No licence is claimed here" in card


def test_somebody_elses_readme_is_not_ours(tmp_path):
    assert not is_our_card(tmp_path / CARD_FILE)
    (tmp_path / CARD_FILE).write_bytes(b"# Model card written by Concord \xff")
    assert not is_our_card(tmp_path / CARD_FILE)
