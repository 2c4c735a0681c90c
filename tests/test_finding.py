"""The finding in words: computed from the trace, and true of runs that lack something."""

from search.finding import state_finding
from search.trace import Trace
from tests.traces import make_event, odd_traces, tiny_end, tiny_trace


def test_a_finished_run_is_told_in_full():
    assert str(state_finding({"mine": tiny_trace()})) == (
        "mine: the search scored 9 candidates on 300 tokens within 30 s; its limit of evaluations ended it. "
        "The best on the searched prompts came in generation 2 (of 0 to 2). On the unseen prompts the "
        "winner is 'archive 1' with a loss of 0.6 (base 1, uniform 0.85, balanced 0.8, the best single "
        "expert b 0.7). "
        "It is closest to the expert b (0.2 of the base's disagreement) and farthest from a (0.6). "
        "The uniform merge is closer to 1 of 2: a."
    )


def test_an_unfinished_run_claims_nothing_of_unseen_prompts():
    text = str(state_finding({"run": odd_traces()["one generation, unfinished"]}))
    assert "it has not ended" in text
    assert "nothing is known on unseen prompts; the best loss on the searched prompts is 0.6" in text
    assert "(base 1, uniform 0.8, balanced 0.7)" in text


def test_a_run_without_generation_or_finite_loss_says_so():
    assert "no generation was finished" in str(state_finding({"run": odd_traces()["no generation"]}))
    assert "No candidate has a finite loss" in str(state_finding({"run": odd_traces()["no finite loss"]}))


def test_of_several_runs_the_best_on_unseen_prompts_is_named():
    worse = tiny_end()[1] | {"losses": [1.0, 0.85, 0.8, 0.75, 0.7, 0.65, None]}
    searched = tiny_end()[1] | {"prompts": "searched", "losses": [1.0, 0.8, 0.8, 0.75, 0.7, 0.1, None]}
    whole = tiny_trace()
    runs = {
        "first": whole,
        "second": Trace(whole.header, whole.generations, [*whole.events, worse]),
        "third": Trace(whole.header, whole.generations, [*whole.events, searched]),
    }
    last = state_finding(runs).paragraphs[-1]
    assert last.startswith("Of 2 runs with finalists on unseen prompts, first has the smallest loss, 0.6")
    assert "the largest is 0.65" in last


def test_names_are_escaped_where_they_are_shown():
    header = {**tiny_trace().header, "adapters": [{"name": "<script>"}, {"name": "b"}]}
    events = [*tiny_trace().events, make_event("merged", ended_by="interrupt", elapsed_s=1.0)]
    html = state_finding({"a & b": Trace(header, tiny_trace().generations, events)})._repr_html_()
    assert "&lt;script&gt;" in html
    assert "a &amp; b" in html
    assert "<script>" not in html
    assert "it was interrupted" in html
