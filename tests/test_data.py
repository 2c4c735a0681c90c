"""Query files: what is read from good ones, and what is said about bad ones."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_merging import data
from llm_merging.data import GENERATION, MULTIPLE_CHOICE, Query, check_lengths, parse_choices, read_queries
from search.errors import InputError

HEADER = "id,input,eval_type,answer_choices\n"
KIT_QUERIES = next(Path(__file__).parents[2].glob("*/starter_kit/test.csv"), Path("none"))


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "queries.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(InputError) as caught:
        read_queries(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_newlines_quotes_non_ascii_and_a_target_column_are_read(tmp_path):
    path = write(
        tmp_path,
        "\ufeffid,target,input,eval_type,answer_choices\n"
        '7,x,"two\nlines, ""quoted"" é中",generation,\n'
        "b,,Q:,multiple_choice,\"['it''s', 'a,b']\"\n".replace("it''s", "it\\'s")
        + 'c,,Q:,multiple_choice,"[""prints \'b\'"", \'a\\nb\']"\n',
    )
    assert read_queries(path) == [
        Query("7", 'two\nlines, "quoted" é中', GENERATION),
        Query("b", "Q:", MULTIPLE_CHOICE, ("it's", "a,b")),
        Query("c", "Q:", MULTIPLE_CHOICE, ("prints 'b'", "a\nb")),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "id,input,eval_type\n1,a,generation\n",
            "the column 'answer_choices' is missing; found id, input, eval_type",
        ),
        ("id,id,input,eval_type,answer_choices\n1,2,a,generation,\n", "the column 'id' is there twice"),
        (HEADER + "1,a,generation,\n1,b,generation,\n", "the id '1' is used twice"),
        (
            HEADER + "1,a,essay,\n",
            "row '1' has the eval_type 'essay'. Expected multiple_choice or generation",
        ),
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        (HEADER, "there is a header but no row"),
        (HEADER.encode() + b"1,caf\xe9,generation,\n", "not UTF-8 (byte 39)"),
        (HEADER + "1,a,generation\n", "row '1' has more or fewer cells than the header"),
        (HEADER + "1,a,b,generation,\n", "row '1' has more or fewer cells than the header"),
        (HEADER + '1,"a,generation,\n2,b,generation,\n', "broken CSV near line"),
        (HEADER + ",hello,generation,\n", "a row has no id (its input starts 'hello')"),
    ],
)
def test_a_bad_file_gets_one_clear_line(tmp_path, text, expected):
    assert expected in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "choices",
    [
        "",
        "[",
        "['a'",
        "[]",
        "3",
        "['a', 3]",
        "('a', 'b')",
        "{'a'}",
        "'a'",
        "['a' 'b']",
        "[['a'], ['b']]",
        "[f'a', 'b']",
        "[b'a']",
        "['a', None]",
        "['''a''']",
        "__import__('os').system('true')",
        "['a'] + ['b']",
        "['\\x']",
        "['\\N{no such name}']",
        "[" * 100_000 + "]" * 100_000,
        "[" * 5_000 + "'a'" + "]" * 5_000,
        "-" * 50_000 + "1",
        "['" + "a" * 200_000 + "']",
    ],
)
def test_broken_or_hostile_choices_are_refused_and_named(tmp_path, choices):
    cell = choices.replace('"', '""')
    message = refusal(tmp_path, HEADER + f'q7,a,multiple_choice,"{cell}"\n')
    assert "row 'q7': answer_choices" in message
    assert "Expected a Python list of strings" in message
    assert len(message) < 300


@given(st.lists(st.text(), min_size=1))
def test_every_list_of_strings_survives_the_round_trip(choices):
    assert parse_choices(repr(choices)) == tuple(choices)


def test_choices_of_the_greatest_length_are_read_and_one_character_more_is_refused():
    choice = "a" * (data.MAX_CHOICES_CHARS - len("['']"))
    assert parse_choices(repr([choice])) == (choice,)
    with pytest.raises(ValueError, match=f"more than {data.MAX_CHOICES_CHARS}"):
        parse_choices(repr([choice + "a"]))


def test_a_refused_text_is_shown_whole_up_to_forty_characters():
    with pytest.raises(ValueError, match=f"is '{'a' * 40}'"):
        parse_choices("a" * 40)
    with pytest.raises(ValueError, match=rf"is '{'a' * 37}\.\.\.'"):
        parse_choices("a" * 41)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_queries(tmp_path / "none.csv")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_queries(tmp_path)


def test_an_input_longer_than_the_context_is_named():
    queries = [Query("a", "x", GENERATION), Query("b", "y", GENERATION)]
    check_lengths(queries, [10, 36], [64, 64], 100)
    with pytest.raises(
        InputError, match=r"row 'b': the input is 37 tokens and its answer up to 64.*100 tokens"
    ):
        check_lengths(queries, [10, 37], [64, 64], 100)


@pytest.mark.skipif(not KIT_QUERIES.exists(), reason="the competition's query file is not here")
def test_the_competition_file_is_read_whole():
    queries = read_queries(KIT_QUERIES)
    assert len(queries) == 807
    assert sum(q.eval_type == MULTIPLE_CHOICE for q in queries) == 457
    assert max(len(q.input) for q in queries) == 3359
    assert all(len(q.answer_choices) >= 2 for q in queries if q.eval_type == MULTIPLE_CHOICE)


def test_half_of_a_surrogate_pair_is_no_choice():
    with pytest.raises(ValueError, match="broken escape"):
        parse_choices("['\\ud800', 'b']")
