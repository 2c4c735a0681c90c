"""Skeletons as text: literals, slots, what fills them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import InputError
from search.skeleton import cut_slot, normal_form, parse_skeleton


def test_a_skeleton_is_split_into_literals_and_slots():
    skeleton = parse_skeleton("### Task: Sum.\n### Input:{input}\n### Answer:")
    assert skeleton.literals == ("### Task: Sum.\n### Input:", "\n### Answer:")
    assert skeleton.slots == ("input",)


def test_a_skeleton_may_begin_with_a_slot_and_have_several():
    skeleton = parse_skeleton("{premise}\nand {claim_2} so")
    assert skeleton.literals == ("", "\nand ", " so")
    assert skeleton.slots == ("premise", "claim_2")


@pytest.mark.parametrize("literal", ['{"name": "x"}', "{}", "{ input }", "{1}", "{a-b}", "}{"])
def test_braces_that_hold_no_plain_name_are_text(literal):
    skeleton = parse_skeleton(f"{literal} {{x}} {literal}")
    assert skeleton.slots == ("x",)
    assert skeleton.literals == (f"{literal} ", f" {literal}")


@given(st.lists(st.text("ab \n{}:", min_size=1).map(lambda text: f"{text}:"), min_size=2, max_size=5))
def test_filling_the_parts_back_in_gives_the_text(parts):
    text = "".join(f"{part}{{slot_{i}}}" for i, part in enumerate(parts[:-1])) + parts[-1]
    try:
        skeleton = parse_skeleton(text)
    except InputError:  # a generated "{a}" that comes twice
        return
    names = [f"{{{name}}}" for name in skeleton.slots] + [""]
    assert "".join(literal + name for literal, name in zip(skeleton.literals, names, strict=True)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("### Input: {}\n### Answer:", "no slot"),
        ("{a} then {a}:", "slot {a} comes twice"),
        ("### Input:{input}", "no text after slot {input}"),
        ("### Input:{input} \n", "no text after slot {input}"),
        ("{a}{b}:", "no text after slot {a}"),
    ],
)
def test_a_bad_skeleton_is_named_with_what_is_wrong(text, said):
    with pytest.raises(InputError) as error:
        parse_skeleton(text)
    assert said in str(error.value)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("sampled", "ended", "slot"),
    [
        (" 3 + 4\na: 7\nq: 1\na: 2", False, " 3 + 4"),  # up to the first next literal, nothing stripped
        ("3\na:", True, "3"),
        ("3 + 4", True, "3 + 4"),  # the model ended it
        ("one\ntwo\nthr", False, "one\ntwo"),
        (" one two thr", False, " one two"),
        ("\nabc def", False, "\nabc"),  # nothing before the line end
        ("abcdef", False, ""),
        (" abcdef", False, ""),
        (" \n\na: 7", False, ""),
        ("\na: 7", False, ""),
        ("", True, ""),
    ],
)
def test_what_fills_a_slot(sampled, ended, slot):
    assert cut_slot(sampled, "\na:", ended=ended) == slot


def test_texts_that_differ_in_whitespace_alone_have_one_normal_form():
    assert normal_form(" a\n\nb\t c ") == normal_form("a b c") == "a b c"
