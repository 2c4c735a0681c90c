"""Answering in batches: the order, the equality with one query at a time, memory, and the written file."""

import csv
from types import SimpleNamespace

import pytest
import torch

from llm_merging import evaluation
from llm_merging.data import GENERATION, MULTIPLE_CHOICE, Query
from llm_merging.deadline import UNKNOWN, Deadline
from llm_merging.evaluation import answer_queries, estimate_seconds, measure_rates, write_predictions
from llm_merging.model import decoder_functions
from llm_merging.sizing import check_sizes, size_queries
from search.errors import InputError
from tests.test_base import make_toy_model, make_toy_tokenizer

WORDS = ["add", "the numbers", "who?", "a (b), c: d", "zz", "0123456789", "choose one.\nanswer:"]


class Method:
    """The answering half of a merge method, around a float64 toy model."""

    max_gen_len = 9

    def __init__(self, *, most_rows: int = 10_000) -> None:
        self.base_model = make_toy_model().double()
        self.input_tokenizer = self.target_tokenizer = make_toy_tokenizer()
        self.most_rows = most_rows
        self.rows_tried: list[int] = []

    def predict_multiple_choice(self, batch):
        return self._answer(batch, decoder_functions.predict_multiple_choice)

    def generate(self, batch):
        return self._answer(batch, decoder_functions.generate, self.max_gen_len)

    def _answer(self, batch, function, *args):
        self.rows_tried.append(len(batch["input"]))
        if len(batch["input"]) > self.most_rows:
            raise torch.OutOfMemoryError("out of memory")
        return function(self.base_model, self.input_tokenizer, self.target_tokenizer, batch, *args)


def make_queries(n_queries: int = 40) -> list[Query]:
    """Both kinds in mixed order, of many lengths; every third choice list holds ties."""
    queries = []
    for i in range(n_queries):
        text = " ".join(WORDS[(i * 5 + k) % len(WORDS)] for k in range(1 + i % 6))
        if i % 2:
            choices = (WORDS[i % 7], *WORDS[: i % 4]) if i % 3 else ("same", "same", "same")
            queries.append(Query(f"q{i}", text, MULTIPLE_CHOICE, choices))
        else:
            queries.append(Query(f"q{i}", text, GENERATION))
    return queries


@pytest.fixture(scope="module")
def one_at_a_time():
    return answer_queries(Method(), make_queries(), tokens_per_batch=1, progress=False)


@pytest.mark.parametrize("tokens_per_batch", [200, 700, None])
def test_batched_answers_equal_one_query_at_a_time(one_at_a_time, tokens_per_batch):
    method = Method()
    assert answer_queries(method, make_queries(), tokens_per_batch=tokens_per_batch) == one_at_a_time
    assert max(method.rows_tried) > 1
    assert len(set(one_at_a_time)) > 10  # the toy model does not give one answer to all


def test_ties_go_to_the_lowest_index(one_at_a_time):
    tied = [
        p
        for p, q in zip(one_at_a_time, make_queries(), strict=True)
        if q.answer_choices[:2] == ("same", "same")
    ]
    assert tied == ["0"] * len(tied) != []


def test_rows_times_length_stay_within_the_budget():
    method, queries = Method(), make_queries()
    longest = {
        id(s.query): s.n_tokens
        for s in size_queries(queries, method.input_tokenizer, method.target_tokenizer, 9)
    }
    seen: list[tuple[int, int]] = []
    by_input = {q.input + repr(list(q.answer_choices)): q for q in queries}

    def record(batch):
        members = [
            by_input[text + repr(choices)]
            for text, choices in zip(batch["input"], batch["answer_choices"], strict=True)
        ]
        seen.append(
            (sum(max(1, len(q.answer_choices)) for q in members), max(longest[id(q)] for q in members))
        )
        return [[]] * len(members), ["x"] * len(members)

    method.generate = record
    method.predict_multiple_choice = lambda batch: (
        torch.zeros(len(record(batch)[0]), dtype=torch.long),
        None,
    )
    answer_queries(method, queries, tokens_per_batch=300, progress=False)
    assert sum(rows for rows, _ in seen) == sum(max(1, len(q.answer_choices)) for q in queries)
    assert all(rows * width <= 300 for rows, width in seen)


def test_batches_that_run_out_of_memory_are_halved_until_they_fit(one_at_a_time):
    method = Method(most_rows=3)
    assert answer_queries(method, make_queries(), progress=False) == one_at_a_time
    failed = [rows for rows in method.rows_tried if rows > 3]
    fitting = [rows for rows in method.rows_tried if rows <= 3]
    assert 2 <= len(failed) < len(fitting) / 2  # later batches of a kind know what did not fit
    assert len(fitting) < len(make_queries()) / 2


def test_one_kind_that_runs_out_of_memory_leaves_the_other_its_batches():
    """Choices come first."""
    tried = []
    for chooser in (Method(), Method(most_rows=2)):
        method = Method()
        method.predict_multiple_choice = chooser.predict_multiple_choice
        answer_queries(method, make_queries(), tokens_per_batch=700, progress=False)
        tried.append(method.rows_tried)
    assert tried[0] == tried[1] != []


def test_one_query_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        answer_queries(Method(most_rows=0), make_queries(3), progress=False)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_answer_becomes_unknown(text):
    method = Method()
    method.generate = lambda batch: ([[]] * len(batch["input"]), [text] * len(batch["input"]))
    assert answer_queries(method, [Query("a", "x", GENERATION)], progress=False) == ["unknown"]


def test_a_query_too_long_for_the_model_is_named():
    tokenizer = make_toy_tokenizer()
    queries = [
        Query("fits", "a" * 50, GENERATION),
        Query("long", "a" * 51, GENERATION),
        Query("wide", "a" * 50, MULTIPLE_CHOICE, ("b", "c" * 9)),
    ]
    sized = size_queries(queries, tokenizer, tokenizer, 9)
    assert [s.n_tokens for s in sized] == [60, 61, 61]  # BOS and EOS counted
    check_sizes(sized[:1], 60)
    for wrong in sized[1:]:
        with pytest.raises(InputError, match=f"row '{wrong.query.id}'"):
            check_sizes([sized[0], wrong], 60)


class SlowMethod(Method):
    """Answers nothing, by a clock of its own: seconds by the token read, and by the token written."""

    choice_s, read_s, write_s = 0.01, 0.02, 0.5
    slower = 1.0

    def __init__(self, monkeypatch):
        super().__init__()
        self.now_s, self.written = 0.0, []
        monkeypatch.setattr(evaluation, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH_ELSEWHERE", 300)

    def _sized(self, batch, kind):
        rows = zip(batch["input"], batch["answer_choices"], strict=True)
        queries = [
            Query(str(place), text, kind, tuple(choices)) for place, (text, choices) in enumerate(rows)
        ]
        return size_queries(queries, self.input_tokenizer, self.target_tokenizer, self.max_gen_len)

    def predict_multiple_choice(self, batch):
        sized = self._sized(batch, MULTIPLE_CHOICE)
        n_tokens = sum(s.n_input + s.n_rows * s.n_answer for s in sized)
        self.now_s += self.slower * self.choice_s * n_tokens
        return torch.ones(len(sized), dtype=torch.long), None

    def generate(self, batch):
        sized = self._sized(batch, GENERATION)
        n_read, n_written = sum(s.n_input for s in sized), self.max_gen_len * len(sized)
        self.now_s += self.slower * (self.read_s * n_read + self.write_s * n_written)
        self.written += [self.max_gen_len] * len(sized)
        return [[]] * len(sized), ["x"] * len(sized)


def test_the_time_to_answer_is_measured_on_few_batches(monkeypatch):
    method, queries = SlowMethod(monkeypatch), make_queries()
    rates = measure_rates(method, queries)
    measured_s = method.now_s
    answer_queries(method, queries, progress=False)
    taken_s = method.now_s - measured_s
    assert measured_s < taken_s / 2
    expected_s = evaluation.ESTIMATE_MARGIN * taken_s
    assert estimate_seconds(method, queries, rates) == pytest.approx(expected_s, rel=0.1)
    assert estimate_seconds(method, [], measure_rates(method, [])) == 0


def test_a_first_token_that_took_longer_than_all_is_no_rate(monkeypatch):
    method = SlowMethod(monkeypatch)
    usual = measure_rates(method, make_queries())
    generate = method.generate

    def stall_at_one(batch):
        method.slower = 100.0 if method.max_gen_len == 1 else 1.0
        return generate(batch)

    monkeypatch.setattr(method, "generate", stall_at_one)
    rates = measure_rates(method, make_queries())
    sized = size_queries(make_queries(), method.input_tokenizer, method.target_tokenizer, 9)
    assert rates.write_s == 0
    assert rates.seconds(sized, 9) == pytest.approx(usual.seconds(sized, 9), rel=0.2)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("slower", [1.0, 2.0])
def test_answers_that_would_be_late_are_shortened_then_guessed_and_choices_are_read(
    monkeypatch, share, slower
):
    method, queries = SlowMethod(monkeypatch), make_queries(200)
    rates = measure_rates(method, queries)
    sized = size_queries(queries, method.input_tokenizer, method.target_tokenizer, 9)
    choices_s, whole_s = (slower * rates.seconds(sized, n_new) for n_new in (0, 9))
    limit_s, method.now_s, method.slower = choices_s + share * (whole_s - choices_s), 0.0, slower
    method.written.clear()
    deadline = Deadline(lambda: limit_s - method.now_s, rates, 9)
    answers = answer_queries(method, queries, progress=False, deadline=deadline)
    assert method.now_s <= limit_s + 0.05 * whole_s  # what was foreseen of a batch may be a little off
    assert method.now_s > 0.7 * limit_s
    assert all(answers)
    assert all(answer == "1" for answer in answers[1::2])  # every second query is a choice: all were read
    assert len(method.written) + deadline.n_guessed == 100
    assert deadline.n_shortened + deadline.n_guessed > 0
    assert deadline.n_shortened == sum(n < 9 for n in method.written)
    assert (method.max_gen_len, answers.count("unknown")) == (9, deadline.n_guessed)
    assert deadline.describe().startswith("time was short: ")


@pytest.mark.parametrize("share", [1.1, 0.6])
def test_what_was_never_measured_is_learnt_from_the_first_batch_of_each_kind(monkeypatch, share):
    method, queries = SlowMethod(monkeypatch), make_queries(200)
    answer_queries(method, queries, progress=False)
    whole_s, method.now_s = method.now_s, 0.0
    deadline = Deadline(lambda: share * whole_s - method.now_s, UNKNOWN, 9)
    assert all(answer_queries(method, queries, progress=False, deadline=deadline))
    assert method.now_s <= max(share, 1) * whole_s + 1e-6
    assert (deadline.describe() == "") == (share > 1)


def test_where_no_time_is_left_every_query_gets_a_placeholder_at_once(monkeypatch):
    method, queries = SlowMethod(monkeypatch), make_queries(10)
    deadline = Deadline(lambda: 0.0, measure_rates(method, queries), 9)
    began_s = method.now_s
    assert answer_queries(method, queries, progress=False, deadline=deadline) == ["unknown", "0"] * 5
    assert (method.now_s, deadline.n_guessed) == (began_s, 10)


def test_with_time_to_spare_a_deadline_changes_nothing(one_at_a_time):
    method = Method()
    deadline = Deadline(lambda: 1e6, measure_rates(method, make_queries()), 9)
    assert answer_queries(method, make_queries(), deadline=deadline) == one_at_a_time
    assert (deadline.n_shortened, deadline.n_guessed, deadline.describe()) == (0, 0, "")


def test_predictions_are_written_as_the_kit_expects(tmp_path):
    queries = [Query("1", "x", GENERATION), Query("b", "y", GENERATION)]
    write_predictions(tmp_path / "out.csv", queries, ['two\nlines, "é"', "unknown"])
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["id", "prediction", "dummy_field"],
            ["1", 'two\nlines, "é"', "0"],
            ["b", "unknown", "0"],
        ]


def test_a_full_disk_leaves_the_old_file_and_one_clear_line(tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    path.write_text("old")
    failing = SimpleNamespace(
        writerow=lambda row: None,
        writerows=lambda rows: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    monkeypatch.setattr(csv, "writer", lambda *args, **kwargs: failing)
    with pytest.raises(InputError, match="No space left on device"):
        write_predictions(path, [Query("1", "x", GENERATION)], ["y"])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lone_carriage_return_does_not_split_a_row(tmp_path):
    queries = [Query("1", "a", "generation", ()), Query("2", "b", "generation", ())]
    write_predictions(tmp_path / "out.csv", queries, ["x\ry", "p\r\nq"])
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == ["x\ny", "p\r\nq"]
