"""A run held against what it recorded: a good one, and each way in which one may not be what it says."""

import csv
import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from search import __main__ as program
from tests.test_run import at_scoring, ctrl_c
from tests.verifying import RUN, copy_work, edit_json, edit_line, make_work, run_job


@pytest.fixture
def run(finished_work, tmp_path):
    """A copy of a finished run; its folder."""
    return copy_work(finished_work, tmp_path / "there")


def verify(capsys, *arguments):
    """Run the command: the exit code, the lines by their names, and the last line's document."""
    code = program.main(["verify", *map(str, arguments)])
    out, err = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in err.splitlines())
    return code, lines, json.loads(out) if out else None


def test_a_good_run_comes_out_again_to_the_last_bit(run, capsys):
    code, lines, document = verify(capsys, run, "--refine")
    assert code == 0
    assert document["ok"]
    assert (document["run"], document["differs"]) == (str(run), [])
    assert document["checks"] == len(lines)
    assert set(document["note"]) <= {"commit"}  # a test may run while the checkout changes
    assert all(text.startswith(("ok", "note")) for text in lines.values())
    assert lines["config"] == "ok: seed 0"
    assert lines["prompts"] == "ok: 12 written again, the same"
    assert lines["references"] == "ok: base, uniform, balanced: bit for bit, cpu float32"
    assert lines["search"] == "ok: 18 candidates in 3 generations asked for again"
    assert lines["winner again"].startswith("ok")
    assert lines["loss"].endswith("bit for bit, cpu float32")
    assert lines["end"] == "ok: by evaluations, not by the clock"
    assert lines[f"answers {run.parent / 'queries.csv'}"] == "ok: 3 rows, none empty"
    assert {"adapter expert-0", "adapter/adapter_model.safetensors", "safetensor.pt"} < lines.keys()


def flip_byte(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def nudge(table):
    """Change the first number by its last bit but a few."""
    row = table
    while isinstance(row[0], list):
        row = row[0]
    row[0] += 1e-12


def change_temperature(run):
    edit_line(run, "header", lambda line: line["config"]["prompts"].update(temperature=0.5))


def change_seed_alone(run):
    edit_line(run, "header", lambda line: line.update(seed=1))


def change_seed_everywhere(run):
    """Another seed, told consistently: only the prompts that it writes give it away."""

    def change(line):
        line["seed"] = line["config"]["search"]["seed"] = 1
        text = json.dumps(line["config"], sort_keys=True)
        line["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()

    edit_line(run, "header", change)
    for path in (run / "coefficients.json", run / "adapter/coefficients.json"):
        edit_json(path, lambda document: document["provenance"].update(seed=1))


def drop_prompt(run):
    """One prompt fewer, and the hash of those that are left."""

    def change(line):
        line["unseen"].pop()
        rows = [*line["searched"], *line["unseen"]]
        rows.sort(key=lambda row: row["expert"])  # stable, as adapters are ordered by name here
        experts = [int(row["expert"][-1]) for row in rows]
        content = [[row["ids"] for row in rows], experts, [row["scored"] for row in rows], 3]
        line["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    edit_line(run, "prompts", change)


def change_version_everywhere(run):
    edit_line(run, "header", lambda line: line["versions"].update(torch="2.2.2"))
    for path in (run / "coefficients.json", run / "adapter/coefficients.json"):
        edit_json(path, lambda document: document["provenance"]["versions"].update(torch="2.2.2"))


def change_coefficients_everywhere(run):
    """Other coefficients, told consistently, and merged: only the scores give them away."""
    edit_line(run, "finalists", lambda line: nudge_more(line["winner_coefficients"]))
    for path in (run / "coefficients.json", run / "adapter/coefficients.json"):
        edit_json(path, lambda document: nudge_more(document["coefficients"]))
    for path in (run / "adapter/adapter_model.safetensors", run / "safetensor.pt"):
        path.unlink()


def nudge_more(table):
    table[0][0] += 0.01


def rescale_adapter(run, name="expert-1"):
    edit_json(
        run.parents[1] / f"adapters/{name}/adapter_config.json",
        lambda config: config.update(lora_alpha=config["lora_alpha"] * 2),
    )


def change_merged_adapter(run):
    path = run / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = torch.nextafter(tensors[name][0, 0], torch.tensor(9.0))
    save_file(tensors, path)


def change_answers(change):
    def apply(run):
        path = run.parent / "queries.csv"
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(change(rows))

    return apply


MUTATIONS = {
    "a config field": (
        change_temperature,
        {
            "config": r"differs: config_sha256 recorded \w{12}, found \w{12}",
            "loss": "note: nothing is scored",
        },
    ),
    "the seed in one place": (change_seed_alone, {"config": "differs: seed recorded 1, found 0"}),
    "the seed in all places": (
        change_seed_everywhere,
        {"config": "ok: seed 1", "prompts": "differs: searched 0 recorded"},
    ),
    "a version": (
        change_version_everywhere,
        {
            "versions": r"differs: torch recorded 2\.2\.2, found ",
            "loss": "ok: .*: within 0.0001, other versions",
        },
    ),
    "a coefficient in coefficients.json": (
        lambda run: edit_json(run / "coefficients.json", lambda d: nudge(d["coefficients"])),
        {"coefficients": r"differs: coefficients\.json, model of expert-0 recorded \S+, found \S+"},
    ),
    "a coefficient in the trace": (
        lambda run: edit_line(run, "finalists", lambda d: nudge(d["winner_coefficients"])),
        {
            "coefficients": "differs: .*adapter/coefficients.json, model of expert-0",
            "winner again": "differs",
        },
    ),
    "a coefficient in all places": (
        change_coefficients_everywhere,
        {"coefficients": "ok", "loss": r"differs: loss recorded 0\.\d+, found 0\.\d+; per_expert"},
    ),
    "an adapter in coefficients.json": (
        lambda run: edit_json(
            run / "coefficients.json", lambda d: [d["adapters"].pop(), d["coefficients"][0].pop()]
        ),
        {
            "coefficients": r"differs: coefficients.json \(groups, adapters\) recorded \[1, 3\], found",
            "coefficients.json": "differs: adapters.expert-2.sha256 recorded",
        },
    ),
    "the order of adapters in coefficients.json": (
        lambda run: edit_json(run / "coefficients.json", lambda d: d["adapters"].reverse()),
        {"coefficients.json": "differs: order.0 recorded expert-0, found expert-2"},
    ),
    "the loss in coefficients.json": (
        lambda run: edit_json(run / "coefficients.json", lambda d: d["objective"].update(loss=0.5)),
        {"coefficients.json": "differs: objective.loss recorded 0.*, found 0.5"},
    ),
    "the losses of a generation": (
        lambda run: edit_line(run, "generation", lambda line: nudge_loss(line), 1),
        {"search": "differs: generation 2 of the trace cannot be repeated"},
    ),
    "a loss of the last generation": (
        lambda run: edit_line(run, "generation", lambda line: line["losses"].reverse(), 2),
        {"search": "differs: .*spread recorded", "winner again": "ok"},
    ),
    "the winner": (
        lambda run: edit_line(run, "finalists", lambda d: d.update(winner="uniform")),
        {"winner": "differs: verdict recorded outside bounds, found winner; lowest loss is of"},
    ),
    "who was merged": (
        lambda run: edit_line(run, "merged", lambda d: d.update(winner="mean")),
        {"winner": "differs: merged recorded mean, found archive 1"},
    ),
    "a reference's loss": (
        lambda run: edit_line(run, "references", lambda d: nudge(d["losses"])),
        {"references": "differs: losses recorded"},
    ),
    "an expert's distance": (
        lambda run: edit_line(run, "signals", lambda d: nudge(d["peak_kl_nats"])),
        {"references": "differs: peak_kl_nats recorded"},
    ),
    "the start": (
        lambda run: edit_line(run, "search", lambda d: nudge(d["start"])),
        {"search": "differs: generation 0 of the trace cannot be repeated"},
    ),
    "the best loss": (
        lambda run: edit_line(run, "search_ended", lambda d: d.update(best_loss=0.1)),
        {"search": "differs: best_loss recorded 0.1, found 0"},
    ),
    "the number of evaluations": (
        lambda run: edit_line(run, "search_ended", lambda d: d.update(evaluations=19)),
        {"search": "differs: evaluations recorded 19, found 18", "coefficients.json": "differs: evaluations"},
    ),
    "the text of a prompt": (
        lambda run: edit_line(run, "prompts", lambda d: d["unseen"][1].update(text="mine")),
        {"prompts": "differs: unseen 1 recorded mine, found"},
    ),
    "a prompt that is gone": (drop_prompt, {"prompts": "differs: unseen prompts recorded 5, found 6"}),
    "a token of a prompt": (
        lambda run: edit_line(run, "prompts", lambda d: d["unseen"][1]["ids"].reverse()),
        {"prompts": "differs: the trace's prompts have hash"},
    ),
    "a byte of an adapter": (
        lambda run: flip_byte(run.parents[1] / "adapters/expert-1/adapter_model.safetensors"),
        {
            "adapter expert-0": "ok: sha256",
            "adapter expert-1": r"differs: sha256 recorded \w{12}, found \w{12}$",
            "loss": "note: nothing is scored: the inputs",
        },
    ),
    "the first byte of an adapter": (
        lambda run: flip_byte(run.parents[1] / "adapters/expert-1/adapter_model.safetensors", 0),
        {"adapter expert-1": r"differs: sha256 recorded \w{12}, found \w{12}$"},
    ),
    "an adapter without weights": (
        lambda run: (run.parents[1] / "adapters/expert-1/adapter_model.safetensors").unlink(),
        {"adapter expert-1": r"differs: recorded \w{12}, found no adapter_model.safetensors in"},
    ),
    "the scaling of an adapter": (
        rescale_adapter,
        {
            "adapter expert-0": "ok",
            "scalings": "differs: expert-1.scalings_sha256 recorded",
            "loss": "note: nothing is scored: the inputs make another search",
        },
    ),
    "an adapter that now is too strong": (
        lambda run: rescale_adapter(run, "expert-0"),
        {"left out": r'differs: left out recorded \[\], found \["expert-0"\]'},
    ),
    "a byte of the base": (
        lambda run: flip_byte(run.parents[1] / "base/model.safetensors"),
        {"base .*": r"differs: sha256 recorded \w{12}, found \w{12}$"},
    ),
    "the base's tokenizer": (
        lambda run: flip_byte(run.parents[1] / "base/tokenizer.json"),
        {"base .*": r"differs: text_sha256 recorded \w{12}, found \w{12}$"},
    ),
    "a rank in coefficients.json": (
        lambda run: edit_json(run / "coefficients.json", lambda d: d["adapters"][0].update(rank=[9])),
        {"scalings": r"differs: expert-0 rank recorded \[9\], found \[\d+\]"},
    ),
    "a module's group": (
        lambda run: edit_json(run / "coefficients.json", lambda d: d["groups"]["model"].pop()),
        {"groups": "differs: model recorded"},
    ),
    "a bit of the merged adapter": (
        change_merged_adapter,
        {r"adapter/adapter_model\.safetensors": r"differs: 1 of \d+ matrices", r"safetensor\.pt": "ok"},
    ),
    "a deleted answer": (
        change_answers(lambda rows: rows[:2] + rows[3:]),
        {"answers .*": "differs: rows recorded 3, found 2; ids differ: no id 2; sha256 recorded"},
    ),
    "a column of the answers": (
        change_answers(lambda rows: [["id", "prediction", "score"], *rows[1:]]),
        {"answers .*": "differs: columns recorded"},
    ),
    "an empty answer": (
        change_answers(lambda rows: [*rows[:-1], [rows[-1][0], " ", "0"]]),
        {"answers .*": "differs: 1 without a prediction, id third for one; sha256 recorded"},
    ),
    "another answer": (
        change_answers(lambda rows: [*rows[:-1], [rows[-1][0], "better", "0"]]),
        {"answers .*": "differs: sha256 recorded"},
    ),
    "answers in another order": (
        change_answers(lambda rows: [rows[0], *reversed(rows[1:])]),
        {"answers .*": "differs: ids differ: another order, or one twice; sha256"},
    ),
    "no answers": (
        lambda run: (run.parent / "queries.csv").unlink(),
        {"answers .*": "differs: recorded 3 rows, found no such file"},
    ),
    "the queries": (
        lambda run: (run.parents[1] / "queries.csv").write_text("id,input\nfirst,a\n"),
        {"answers .*": r"differs: .*queries\.csv sha256 recorded"},
    ),
}


def nudge_loss(line):
    line["losses"][0] += 1


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_was_changed_is_named(run, capsys, name):
    mutate, expected = MUTATIONS[name]
    mutate(run)
    code, lines, document = verify(capsys, run)
    for pattern, text in expected.items():
        (key,) = [key for key in lines if re.fullmatch(pattern, key)]
        assert re.match(text, lines[key]), (key, lines[key])
    assert code == 1
    assert not document["ok"]
    assert document["differs"] == [key for key, text in lines.items() if text.startswith("differs")]


def refusal(capsys, run):
    code, lines, document = verify(capsys, run)
    assert (code, document) == (2, None)
    return lines["error"]


def cut_after(run, name):
    """Leave a trace as a killed run does, up to an event."""
    path = run / "trace.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    last = next(place for place, line in enumerate(lines) if json.loads(line).get("event") == name)
    path.write_text("".join(lines[: last + 1]))


def test_what_is_no_finished_run_is_refused_in_a_line(run, capsys, tmp_path):
    assert f"{tmp_path / 'none'}: is no folder" in refusal(capsys, tmp_path / "none")
    assert f"holds no trace.jsonl; {run} does" in refusal(capsys, run.parent)
    (run / "coefficients.json").rename(run / "kept")
    assert "holds no coefficients.json" in refusal(capsys, run)
    (run / "coefficients.json").write_text("{")
    assert "no JSON" in refusal(capsys, run)
    (run / "kept").rename(run / "coefficients.json")
    cut_after(run, "finalists")
    assert (
        f"half a run: found no `merged` event that stands. Go on with it first: python -m search resume {run}"
        in (refusal(capsys, run))
    )
    edit_line(run, "header", lambda line: line.update(method="lorahub"))
    assert "a run of lorahub; only a search's is verified" in refusal(capsys, run)
    edit_line(run, "header", lambda line: [line.pop("method"), line.pop("versions")])
    assert "its header has no 'versions'" in refusal(capsys, run)
    (run / "trace.jsonl").write_text("precious\n")
    assert "trace.jsonl: no trace: its first line is no header" in refusal(capsys, run)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("finalists", lambda line: line.update(winner="nobody")),
        ("finalists", lambda line: line.pop("verdicts")),
        ("merged", lambda line: line.pop("ended_by")),
        ("answered", lambda line: line["files"][0].pop("rows")),
    ],
)
def test_a_trace_that_lacks_something_is_refused_in_a_line(run, capsys, name, change):
    edit_line(run, name, change)
    code, lines, document = verify(capsys, run)
    assert (code, document) == (2, None)
    assert "trace.jsonl: a line lacks what a run writes there (" in lines["error"]


def test_a_folder_that_is_gone_is_refused_and_one_that_moved_is_found_from_the_working_directory(
    run, capsys, monkeypatch
):
    def forget(line):
        line["folder"] = "/gone"
        line["config"]["base"]["source"] = "base"
        for adapter in line["config"]["adapters"]:
            adapter["source"] = f"adapters/{adapter['name']}"
        text = json.dumps(line["config"], sort_keys=True)
        line["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()

    edit_line(run, "header", forget)
    monkeypatch.chdir(run.parents[1])
    assert verify(capsys, run)[0] == 0
    (run.parents[1] / "adapters/expert-1").rename(run.parents[1] / "adapters/moved")
    assert "adapters.1.source: no folder 'adapters/expert-1' in " in refusal(capsys, run)


def test_queries_that_are_not_here_leave_the_answers_to_their_hash(run, capsys):
    (run.parents[1] / "queries.csv").unlink()
    code, lines, _ = verify(capsys, run)
    assert code == 0
    (told,) = [text for name, text in lines.items() if name.startswith("answers")]
    assert told == "ok: 3 rows, none empty; queries.csv is not here: ids not held against it"


def test_a_run_without_answers_is_verified_too(run, capsys):
    cut_after(run, "merged")
    code, lines, document = verify(capsys, run)
    assert code == 0
    assert lines["answers"] == "note: the run answered no queries"
    assert "answers" in document["note"]


def test_a_run_on_other_threads_is_repeated_on_as_many(run, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("search.verify.torch.set_num_threads", asked.append)
    edit_line(run, "header", lambda line: line["cpu"].update(threads=3))
    code, lines, _ = verify(capsys, run)
    assert asked == [3, torch.get_num_threads()]
    assert code == 0
    assert lines["loss"].endswith("within 0.0001, other cpu")  # since the threads were not really set
    assert "not written again (within 0.0001, other cpu)" in lines["prompts"]


def test_a_start_that_the_adapters_do_not_give_is_named_though_the_search_follows_from_it(
    run, capsys, monkeypatch
):
    def lift(line):
        line["start"][0][0] += 1

    with monkeypatch.context() as patched:  # any start asks for the recorded genomes
        patched.setattr("search.loop.np.array_equal", lambda *_: True)
        edit_line(run, "search", lift)
        lines = verify(capsys, run)[1]
    assert lines["search"].startswith("differs: start recorded [[")


def test_the_commit_is_a_note_and_no_difference(run, capsys, monkeypatch):
    monkeypatch.setattr("search.verify_record.checkout_commit", lambda: "f" * 40 + "-dirty")
    edit_line(run, "header", lambda line: line.update(commit="0" * 40))
    code, lines, _ = verify(capsys, run)
    assert code == 0
    assert lines["commit"] == "note: recorded 000000000000, found ffffffffffff-dirty"


def test_what_the_clock_or_memory_decided_is_told(run, capsys):
    edit_line(run, "merged", lambda line: line.update(ended_by="clock"))
    edit_line(run, "refined", lambda line: line["losses"].pop())
    edit_line(run, "answered", lambda line: line.update(cut=2, placeholders=1))
    lines = verify(capsys, run)[1]
    assert lines["end"] == (
        "note: ended by clock, 1 of 2 refinement steps, 2 answers cut and 1 not read: "
        "another run may end otherwise"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [
        {"stages": [{"share": 1, "groups": "model"}, {"share": 2, "groups": "layer"}], "race_keep": None},
        {"gradient": {"refine_steps": 0, "inject_every": 2}, "space": "layer"},
    ],
    ids=["stages", "injected"],
)
def test_other_searches_come_out_again_too(tmp_path, capsys, search):
    folder = make_work(tmp_path / "here", **search)
    assert run_job(folder) == 0
    capsys.readouterr()
    code, lines, document = verify(capsys, folder / RUN)
    assert (code, document["differs"]) == (0, [])
    assert lines["search"].startswith("ok: 18 candidates")
    assert lines["winner again"].startswith("ok")


def test_a_run_that_had_no_time_to_search_comes_out_again(tmp_path, capsys):
    folder = make_work(tmp_path / "here", time_box_s=1.0)
    assert run_job(folder) == 0
    capsys.readouterr()
    code, lines, _ = verify(capsys, folder / RUN)
    assert code == 0
    assert lines["winner"] == "ok: balanced; nothing was searched, for want of time"
    assert lines["winner again"] == "ok: balanced"
    assert lines["end"].startswith("note: no time to search")
    edit_json(folder / RUN / "coefficients.json", lambda d: nudge_more(d["coefficients"]))
    assert verify(capsys, folder / RUN)[1]["winner again"] == "differs: other coefficients"


def test_a_run_that_was_killed_and_gone_on_with_comes_out_again(run, capsys):
    cut_after(run, "references")
    assert program.main(["resume", str(run)]) == 0
    capsys.readouterr()
    code, lines, document = verify(capsys, run, "--refine")
    assert (code, document["differs"]) == (0, [])
    assert lines["loss"].endswith("bit for bit, cpu float32")


@pytest.mark.slow
def test_a_run_that_was_interrupted_comes_out_again(tmp_path, capsys, monkeypatch):
    folder = make_work(tmp_path / "here")
    with monkeypatch.context() as patched:
        patched.setattr("search.interruption.GRACE_S", 0.0)
        at_scoring(patched, 5, ctrl_c)
        assert run_job(folder) == 130
    capsys.readouterr()
    code, lines, document = verify(capsys, folder / RUN)
    assert (code, document["differs"]) == (0, [])
    assert lines["end"] == "note: ended by interrupt: another run may end otherwise"
    assert lines["search"].startswith("ok: ")
    assert lines["loss"].endswith("within 1e-06, summed in another order")
