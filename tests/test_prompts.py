"""Prompts written by models whose every output is forced: a table of which character follows which."""

import copy
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from search.adapters import Factors
from search.errors import InputError
from search.groups import group_modules
from search.prompts import PromptRequest, PromptSet, describe_prompts, read_prompts, write_prompts
from search.sampling import is_loop
from search.stack import StackedFactors, stack_module

SPECIAL = ["<pad>", "<s>", "</s>"]
BOS, EOS = 1, 2
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.:?',()"
N_VOCAB = len(SPECIAL) + len(CHARACTERS) + 3  # three nameless rows, as padded embeddings have
SURE = 60.0
SKELETON = "sum:{input}\nis:"
MODULE = "layers.0.table"


def id_of(character: str) -> int:
    return SPECIAL.index(character) if character in SPECIAL else len(SPECIAL) + CHARACTERS.index(character)


def make_tokenizer(*, bos: bool = True, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """One token a character; `metaspace` trims the space that a decoded text begins with, as Llama's does."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    if metaspace:
        vocab["▁"] = vocab.pop(" ")
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Metaspace() if metaspace else decoders.Fuse()
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )


class TableModel(nn.Module):
    """The next token depends on the last one alone: logits = table[:, last]."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.config = LlamaConfig(vocab_size=N_VOCAB, max_position_embeddings=256)
        self.generation_config = GenerationConfig(eos_token_id=EOS)
        self.device = torch.device("cpu")
        self.layers = nn.ModuleList([nn.ModuleDict({"table": nn.Linear(N_VOCAB, N_VOCAB, bias=False)})])
        self.layers[0]["table"].weight.data = table

    def forward(self, input_ids, **_):
        return SimpleNamespace(
            logits=self.layers[0]["table"](nn.functional.one_hot(input_ids, N_VOCAB).float())
        )


def make_table(follows: dict[str, str]) -> torch.Tensor:
    """(N_VOCAB, N_VOCAB) weights: each key is followed by one of the value's characters, or by "</s>"."""
    table = torch.zeros(N_VOCAB, N_VOCAB)
    for character, next_characters in follows.items():
        for next_character in [next_characters] if next_characters in SPECIAL else next_characters:
            table[id_of(next_character), id_of(character)] = SURE
    return table


DIGITS = "0123456789"
BASE = {":": DIGITS, **dict.fromkeys(DIGITS, "01234\n"), "\n": "i", "i": "s", "s": ":"}


def expert(follows: dict[str, str], base: dict[str, str] = BASE) -> Factors:
    """An adapter that replaces some of the base's columns: A picks the last token, B changes its logits."""
    ids = [id_of(character) for character in follows]
    change = make_table(follows)[:, ids] - make_table(base)[:, ids]
    return Factors(A=torch.eye(N_VOCAB)[ids], B=change, scaling=1.0)


def answers(letter: str, base: dict[str, str] = BASE) -> Factors:
    """After a colon the letter, then the end."""
    return expert({":": letter, letter: "</s>"}, base)


def request(**changes):
    settings = {"per_adapter": 4, "max_new_tokens": 24, "max_slot_tokens": 24}
    return PromptRequest(**(settings | changes))


def write(experts, skeletons, asked=None, *, base=BASE, tokenizer=None) -> PromptSet:
    stacked = StackedFactors(
        {MODULE: stack_module(experts)}, tuple(f"expert-{i}" for i in range(len(experts)))
    )
    model, groups = TableModel(make_table(base)), group_modules([MODULE], "layer")
    return write_prompts(model, tokenizer or make_tokenizer(), stacked, groups, skeletons, asked or request())


def test_the_base_fills_the_slot_and_the_expert_answers():
    prompts = write([answers("x"), answers("y")], [[SKELETON], [SKELETON]])
    assert prompts.expert.tolist() == [0] * 4 + [1] * 4
    assert prompts.n_prompts == 8
    assert all(prompts.from_skeleton)
    tokenizer = make_tokenizer()
    for ids, text, adapter in zip(prompts.ids, prompts.texts, prompts.expert, strict=True):
        slot = text.removeprefix("sum:").removesuffix("\nis:" + "xy"[adapter])
        assert slot
        assert set(slot) <= set(DIGITS)
        assert ids == (*tokenizer(text)["input_ids"], EOS)
    assert len(set(prompts.texts)) == 8


def test_the_answers_positions_are_those_that_predict_it_and_its_end():
    prompts = write([answers("x")], [[SKELETON]])
    for ids, scored in zip(prompts.ids, prompts.scored, strict=True):
        assert [ids[t + 1] for t in scored] == [id_of("x"), EOS]


def test_several_slots_are_filled_in_order():
    base = {
        ":": "123",
        "1": "12,",
        "2": "12,",
        "3": "12,",
        ",": "k",
        "k": "890",
        "8": ".",
        "9": "8.",
        "0": ".",
    }
    prompts = write([expert({".": "x", "x": "</s>"}, base)], [["q:{first},k{second}."]], base=base)
    for text in prompts.texts:
        first, second = text.removeprefix("q:").removesuffix(".x").split(",k")
        assert set(first) <= set("123")
        assert second in ("8", "98", "9", "0")


def test_skeletons_take_turns():
    base = BASE | {"m": ":", "u": "m"}
    prompts = write([answers("x", base)], [[SKELETON, "term:{t}\nis:"]], request(per_adapter=6), base=base)
    assert [text[0] for text in prompts.texts] == ["s", "t"] * 3


def test_without_skeleton_the_expert_writes_from_the_start_token():
    writer = expert({"<s>": "abc", "a": "xyz", "b": "xyz", "c": "xyz", "x": "</s>", "y": "ab", "z": "ab"})
    prompts = write([writer], [[]])
    for ids, text, scored in zip(prompts.ids, prompts.texts, prompts.scored, strict=True):
        assert text[0] in "abc"
        assert ids[0] == BOS
        assert ids[-1] == EOS or len(ids) == 25
        assert scored == tuple(range(len(ids) - 1))
    assert not any(prompts.from_skeleton)
    assert len(set(prompts.texts)) == 4


def test_adapters_with_and_without_skeleton_go_together():
    writer = expert({"<s>": "abc", **dict.fromkeys("abc", "xyz"), **dict.fromkeys("xyz", "abc")})
    prompts = write([writer, answers("x")], [[], [SKELETON]])
    assert prompts.from_skeleton == (False,) * 4 + (True,) * 4


def test_a_model_without_a_start_token_starts_from_the_end_token():
    writer = expert({"</s>": "abc", **dict.fromkeys("abc", "xyz"), **dict.fromkeys("xyz", "abc")})
    prompts = write([writer], [[]], tokenizer=make_tokenizer(bos=False))
    assert all(ids[0] == EOS for ids in prompts.ids)


@pytest.mark.parametrize(("positions", "first"), [("all", 0), ("answer", -3), ("auto", -3)])
def test_positions_with_a_skeleton(positions, first):
    prompts = write([answers("x")], [[SKELETON]], request(positions=positions))
    for ids, scored in zip(prompts.ids, prompts.scored, strict=True):
        assert scored == tuple(range(len(ids) - 1))[first + 1 if first else 0 :]


@pytest.mark.parametrize("positions", ["all", "answer", "auto"])
def test_free_text_is_scored_whole(positions):
    writer = expert({"<s>": "abc", **dict.fromkeys("abc", "xyz"), **dict.fromkeys("xyz", "abc")})
    prompts = write([writer], [[]], request(positions=positions))
    assert all(
        scored == tuple(range(len(ids) - 1)) for ids, scored in zip(prompts.ids, prompts.scored, strict=True)
    )


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others():
    experts, skeletons = [answers("x"), answers("y")], [[SKELETON], [SKELETON]]
    first, again, other = (write(experts, skeletons, request(seed=seed)) for seed in (3, 3, 4))
    assert first.sha256 == again.sha256
    assert first.ids == again.ids
    assert first.sha256 != other.sha256
    assert first.texts != other.texts


def test_a_slot_that_is_never_ended_is_cut_at_the_last_line_or_word():
    base = BASE | {**dict.fromkeys(DIGITS, "123456 "), " ": DIGITS}
    prompts = write([answers("x", base)], [[SKELETON]], base=base)
    for text in prompts.texts:
        slot = text.removeprefix("sum:").removesuffix("\nis:x")
        assert not slot.endswith(" ")
        assert 0 < len(slot) < 24


def test_a_slot_that_the_base_ends_itself_is_taken_whole():
    base = BASE | dict.fromkeys(DIGITS, "</s>")
    prompts = write([answers("x", base)], [[SKELETON]], base=base)
    assert all(text.removeprefix("sum:").removesuffix("\nis:x") in DIGITS for text in prompts.texts)


@pytest.mark.parametrize("metaspace", [False, True])
def test_the_spaces_of_a_slot_are_kept(metaspace):
    base = BASE | {":": " ", " ": DIGITS, **dict.fromkeys(DIGITS, "\n")}
    tokenizer = make_tokenizer(metaspace=metaspace)
    prompts = write([answers("x", base)], [[SKELETON]], base=base, tokenizer=tokenizer)
    assert all(text[4] == " " and text[5] in DIGITS and text[6:] == "\nis:x" for text in prompts.texts)


def test_an_answer_is_greedy():
    undecided = expert({":": "xy", "x": "</s>", "y": "</s>"})
    prompts = write([undecided], [[SKELETON]], request(per_adapter=8))
    assert len({text[-1] for text in prompts.texts}) == 1


def test_duplicates_are_replaced():
    base = BASE | {":": "123456", **dict.fromkeys(DIGITS, "\n")}  # six prompts there are
    prompts = write([answers("x", base)], [[SKELETON]], request(per_adapter=5), base=base)
    assert len(set(prompts.texts)) == prompts.n_prompts == 5


def test_blank_and_looping_slots_are_replaced():
    base = BASE | {":": "0a \n1", "a": "a", " ": "\n"}  # "aaa..." loops, " " and "" are blank
    prompts = write([answers("x", base)], [[SKELETON]], request(per_adapter=6), base=base)
    for text in prompts.texts:
        assert text.removeprefix("sum:").removesuffix("\nis:x").isdigit()


def test_looping_and_blank_free_text_is_replaced():
    writer = expert(
        {"<s>": "abl ", "l": "l", " ": "</s>", **dict.fromkeys("ab", "vwxyz"), **dict.fromkeys("vwxyz", "ab")}
    )
    prompts = write([writer], [[]], request(per_adapter=6))
    assert all(
        text[0] in "ab" and not is_loop(ids) for text, ids in zip(prompts.texts, prompts.ids, strict=True)
    )


def test_a_shortage_is_logged_and_what_there_is_is_kept(caplog):
    base = BASE | {":": "123", **dict.fromkeys(DIGITS, "\n")}  # three prompts there are
    with caplog.at_level(logging.WARNING, logger="search.prompts"):
        prompts = write([answers("x", base)], [[SKELETON]], request(per_adapter=5), base=base)
    assert prompts.n_prompts == 3
    assert "adapter 'expert-0': 3 usable" in caplog.text
    assert "duplicate" in caplog.text


def test_an_expert_that_only_ends_is_named():
    with pytest.raises(InputError) as error:
        write([answers("x"), expert({":": "</s>"})], [[SKELETON], [SKELETON]])
    assert "adapter 'expert-1': 0 usable" in str(error.value)
    assert "blank" in str(error.value)
    assert "skeletons:" in str(error.value)
    assert "\n" not in str(error.value)


def test_one_prompt_is_not_enough_to_search_on_and_keep_one_unseen():
    base = BASE | {":": "1", "1": "\n"}  # one prompt there is
    with pytest.raises(InputError, match="1 usable"):
        write([answers("x", base)], [[SKELETON]], base=base)
    assert write([answers("x", base)], [[SKELETON]], request(per_adapter=1), base=base).n_prompts == 1


def test_special_and_nameless_tokens_are_never_sampled():
    random_base = {}  # every token as likely as any other
    prompts = write([expert({":": "x"}, random_base)], [[]], base=random_base)
    sampled = {token for ids in prompts.ids for token in ids[1:]} - {EOS}
    assert len(sampled) > 20
    assert all(len(SPECIAL) <= token < N_VOCAB - 3 for token in sampled)


def test_a_bad_skeleton_is_refused_before_anything_is_written():
    with pytest.raises(InputError, match="no slot"):
        write([answers("x")], [["no slot at all"]])


def test_skeletons_of_another_number_of_adapters_are_refused():
    with pytest.raises(ValueError, match="skeletons for 2 adapters, expected 1"):
        write([answers("x")], [[SKELETON], [SKELETON]])


def make_set(n_of_each: list[int]) -> PromptSet:
    expert_of = [expert for expert, n in enumerate(n_of_each) for _ in range(n)]
    n = len(expert_of)
    return PromptSet(
        ids=tuple((BOS, i + 3, EOS) for i in range(n)),
        expert=np.array(expert_of),
        scored=((0, 1),) * n,
        texts=tuple(str(i) for i in range(n)),
        from_skeleton=(True,) * n,
        n_experts=len(n_of_each),
    )


def test_a_split_is_disjoint_and_gives_every_expert_to_both():
    whole = make_set([6, 3, 2])
    seen, unseen = whole.split(4)
    assert np.bincount(seen.expert).tolist() == [4, 2, 1]
    assert np.bincount(unseen.expert).tolist() == [2, 1, 1]
    assert set(seen.ids).isdisjoint(unseen.ids)
    assert set(seen.ids) | set(unseen.ids) == set(whole.ids)
    assert seen.n_experts == unseen.n_experts == 3
    assert seen.n_tokens + unseen.n_tokens == whole.n_tokens == 33


def test_the_hash_follows_the_tokens_the_experts_and_the_scored_positions():
    whole = make_set([2, 2])
    hashes = {
        whole.sha256,
        whole.select([0, 1]).sha256,
        whole.select([1, 0, 2, 3]).sha256,
        make_set([1, 3]).sha256,
        PromptSet(whole.ids, whole.expert, ((0,),) * 4, whole.texts, whole.from_skeleton, 2).sha256,
    }
    assert len(hashes) == 5


def recorded(whole: PromptSet, n_searched: int = 2) -> dict:
    """The trace's event `prompts`, as it is read back."""
    names = [f"expert-{index}" for index in range(whole.n_experts)]
    searched, unseen = (describe_prompts(part, names) for part in whole.split(n_searched))
    return json.loads(json.dumps({"sha256": whole.sha256, "searched": searched, "unseen": unseen}))


@pytest.mark.parametrize("n_of_each", [[6, 3, 2], [2, 2], [5], [1, 4]])
@pytest.mark.parametrize("n_searched", [1, 2, 4])
def test_recorded_prompts_come_back_as_they_were_split(n_of_each, n_searched):
    whole = make_set(n_of_each)
    event = recorded(whole, n_searched)
    names = [f"expert-{index}" for index in range(len(n_of_each))]
    for read, part in zip(read_prompts(event, names), whole.split(n_searched), strict=True):
        assert read.sha256 == part.sha256
        assert (read.ids, read.scored, read.texts) == (part.ids, part.scored, part.texts)
        assert (read.from_skeleton, read.n_experts) == (part.from_skeleton, part.n_experts)
        assert read.expert.tolist() == part.expert.tolist()
        assert read.expert.dtype == np.int64


def test_written_prompts_are_recorded_with_the_name_of_their_expert():
    prompts = write([answers("x"), answers("y")], [[SKELETON], [SKELETON]])
    described = describe_prompts(prompts, ("sums", "chat"))
    assert [row["expert"] for row in described] == ["sums"] * 4 + ["chat"] * 4
    assert all(row["text"].endswith("x" if row["expert"] == "sums" else "y") for row in described)
    assert {tuple(row) for row in described} == {("expert", "text", "ids", "scored", "from_skeleton")}


@pytest.mark.parametrize("part", ["searched", "unseen"])
@pytest.mark.parametrize("field", ["ids", "scored", "expert"])
def test_recorded_prompts_that_were_changed_are_refused(part, field):
    event = recorded(make_set([3, 3]))
    changed = copy.deepcopy(event)
    row = changed[part][-1]
    row[field] = "expert-0" if field == "expert" else [*row[field][:-1], row[field][-1] + 1]
    with pytest.raises(InputError, match=r"the trace's prompts have hash .* its line was changed") as caught:
        read_prompts(changed, ("expert-0", "expert-1"))
    assert event["sha256"][:12] in str(caught.value)
    assert "choose another --out" in str(caught.value)


def test_recorded_prompts_of_which_one_is_missing_or_another_experts_are_refused():
    event = recorded(make_set([3, 3]))
    with pytest.raises(InputError, match="its line was changed"):
        read_prompts({**event, "searched": event["searched"][1:]}, ("expert-0", "expert-1"))
    with pytest.raises(InputError, match="its line was changed"):
        read_prompts(event, ("expert-1", "expert-0"))
