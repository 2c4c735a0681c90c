"""The command: what it writes, what it prints, and how it refuses bad input before it merges."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from llm_merging import main as program
from llm_merging.merging import METHODS, UniformAverage
from tests.test_merges import save_toy_zoo

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "data/zoo"
KIT_QUERIES = next(ROOT.parent.glob("*/starter_kit/test.csv"), None)
QUERIES = """id,input,eval_type,answer_choices
1,"two
lines",generation,
b,which?,multiple_choice,"['a', ""it's b""]"
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a query file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queries.csv").write_text(QUERIES)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """A method under its own name whose merge costs nothing and whose answers are short."""

    class Quick(UniformAverage):
        merges = 0
        interrupted = False

        def __init__(self, name, config=None):
            super().__init__(name, config)
            self.max_gen_len = 2

        def merge(self):
            Quick.merges += 1
            self._load_base_model()
            self.merged_model = {"w": torch.zeros(1)}
            if Quick.interrupted:
                self.ended_by = "interrupt"

    monkeypatch.setitem(METHODS, "quick", Quick)
    return Quick


def run(zoo, *arguments, method="quick"):
    defaults = ["-m", method, "--config", str(zoo), "--dataset_filepaths", "queries.csv"]
    return program.main([*defaults, *map(str, arguments)])


def read_rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_the_average_is_merged_answered_and_written(zoo, here, capsys):
    assert run(zoo, method="uniform_average") == 0
    header, *rows = read_rows("output/queries.csv")
    assert header == ["id", "prediction", "dummy_field"]
    assert [row[0] for row in rows] == ["1", "b"]
    assert rows[1][1] in ("0", "1")
    assert all(row[1] and row[2] == "0" for row in rows)
    written = load_file("output/uniform_average/safetensor.pt")
    assert written.keys() == load_file("output/uniform_average/adapter/adapter_model.safetensors").keys()
    document = json.loads(Path("output/uniform_average/coefficients.json").read_text())
    assert document["coefficients"] == [[1 / 3] * 3]
    assert not list(here.rglob("*.partial"))
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line == f"config: {zoo} (--config; choose another with --config FILE.yaml)"


def test_several_datasets_are_answered_each_into_its_own_file(zoo, here, quick):
    (here / "more.csv").write_text(QUERIES)
    assert run(zoo, "--dataset_filepaths", "queries.csv", "more.csv", "--output_folder", "deep/out") == 0
    assert read_rows("deep/out/queries.csv") == read_rows("deep/out/more.csv")
    assert quick.merges == 1


def long_row(n_characters):
    return QUERIES + f"long,{'a' * n_characters},generation,\n"


BAD = {
    "unknown method": (["-m", "none"], {}, "argument -m/--method: invalid choice: 'none'"),
    "unknown option": (["--none"], {}, "unrecognized arguments: --none"),
    "seed not a number": (["--seed", "x"], {}, "argument --seed: invalid int value: 'x'"),
    "time box not a number": (["--time-box", "soon"], {}, "argument --time-box: invalid float value"),
    "time box negative": (["--time-box", "-5"], {}, "time_box_s"),
    "no config": (["--config", "none.yaml"], {}, "none.yaml"),
    "no dataset": (["--dataset_filepaths", "none.csv"], {}, "none.csv: cannot be read"),
    "column missing": ([], {"queries.csv": "id,input\n1,a\n"}, "the column 'eval_type' is missing"),
    "duplicate id": ([], {"queries.csv": QUERIES + "b,x,generation,\n"}, "the id 'b' is used twice"),
    "eval_type": ([], {"queries.csv": QUERIES + "c,x,essay,\n"}, "eval_type 'essay'"),
    "empty": ([], {"queries.csv": ""}, "the file is empty"),
    "hostile choices": (
        [],
        {"queries.csv": QUERIES + f"c,x,multiple_choice,{'[' * 9999}\n"},
        "row 'c': answer_choices",
    ),
    "too long for the context": (
        [],
        {"queries.csv": long_row(4094)},
        "queries.csv: row 'long': the input is 4095 tokens",
    ),
    "same name twice": (
        ["--dataset_filepaths", "queries.csv", "sub/queries.csv"],
        {"sub/queries.csv": QUERIES},
        "would both be answered into queries.csv",
    ),
    "answers over queries": (
        ["--output_folder", "."],
        {},
        "the answers would replace the queries in queries.csv",
    ),
    "output is a file": (["--output_folder", "file"], {"file": ""}, "cannot write to file: "),
    "output below a file": (
        ["--output_folder", "file/out"],
        {"file": ""},
        "cannot write to file/out: Not a directory",
    ),
    "a folder in the way": (
        [],
        {"output/queries.csv/x": ""},
        "cannot write output/queries.csv: a folder has that name",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_bad_input_is_one_line_and_code_2_before_the_merge(zoo, here, quick, capsys, case):
    arguments, files, expected = BAD[case]
    for name, content in files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(content)
    assert run(zoo, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error
    assert quick.merges == 0
    assert not Path("output/queries.csv").is_file()


def test_answers_and_merge_are_not_written_among_what_is_read(zoo, here, quick, capsys):
    base = zoo.parent / "base"
    assert run(zoo, "--output_folder", base) == 2
    assert f"{base}: the base or an adapter is read from there" in capsys.readouterr().err
    assert quick.merges == 0
    assert not (base / "quick").exists()


def test_bytes_that_are_not_utf8_are_refused(zoo, here, quick, capsys):
    (here / "queries.csv").write_bytes(b"id,input,eval_type,answer_choices\n1,\xff,generation,\n")
    assert run(zoo) == 2
    assert "not UTF-8 (byte 36)" in capsys.readouterr().err


def test_a_broken_adapter_or_base_is_one_line_too(here, capsys):
    zoo = save_toy_zoo(here / "zoo")
    weights = here / "zoo/adapters/expert-1/adapter_model.safetensors"
    save_file({k: v * float("nan") for k, v in load_file(weights).items()}, weights)
    assert run(zoo, method="uniform_average") == 2
    assert "expert-1" in capsys.readouterr().err
    (here / "zoo/base/model.safetensors").unlink()
    assert run(zoo, method="uniform_average") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: base ")
    assert error.count("\n") == 1
    assert not Path("output/queries.csv").exists()


def test_an_interrupted_search_still_writes_merge_and_answers(zoo, here, quick, capsys):
    quick.interrupted = True
    assert run(zoo) == 130
    assert Path("output/quick/safetensor.pt").exists()
    assert len(read_rows("output/queries.csv")) == 3
    assert "Ctrl-C again" in capsys.readouterr().err


def test_ctrl_c_while_answering_keeps_the_merge_and_writes_no_half_file(zoo, here, quick, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(quick, "generate", interrupt)
    assert run(zoo) == 130
    assert Path("output/quick/safetensor.pt").exists()
    assert not Path("output/queries.csv").exists()


def test_options_reach_the_method(zoo, here, monkeypatch):
    seen = []

    class Spy(UniformAverage):
        def merge(self):
            super().merge()
            seen.append((self.config.search, self.skip_first_choice_token, self.measure_reserve_s()))

    monkeypatch.setitem(METHODS, "spy", Spy)
    assert run(zoo, "--time-box", 90, "--seed", 5, "--choice-scoring", "kit", method="spy") == 0
    assert run(zoo, method="spy") == 0
    (asked, kit, reserve_s), (default, full, _) = seen
    assert (asked.time_box_s, asked.seed, kit) == (90, 5, True)
    assert (default.seed, full) == (0, False)
    assert reserve_s > 0


def test_the_first_line_names_the_default_configuration_and_why(monkeypatch, here, quick, capsys, zoo):
    monkeypatch.setattr(
        program, "choose_config", lambda: (zoo, "there is no CUDA device with at least 24 GB")
    )
    assert program.main(["-m", "quick", "--dataset_filepaths", "queries.csv"]) == 0
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith(
        f"config: {zoo} (there is no CUDA device with at least 24 GB; choose another"
    )


def use_words_as_tokens(base):
    """Replace the toy base's tokenizer, one token a character, by one a word, almost all of them unknown."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(base)


def answer_kit_queries(config, method):
    assert run(config, "--dataset_filepaths", KIT_QUERIES, method=method) == 0
    rows = read_rows("output/test.csv")[1:]
    asked = list(csv.DictReader(KIT_QUERIES.read_text(encoding="utf-8").splitlines(keepends=True)))
    assert len(rows) == 807
    assert [row[0] for row in rows] == [row["id"] for row in asked]
    for (_, prediction, dummy), query in zip(rows, asked, strict=True):
        assert prediction
        assert dummy == "0"
        assert query["eval_type"] == "generation" or prediction in "01234567"


@pytest.mark.skipif(KIT_QUERIES is None, reason="the competition's query file is not here")
def test_the_competitions_queries_are_answered(here, quick):
    config = save_toy_zoo(here / "zoo")
    use_words_as_tokens(here / "zoo/base")
    answer_kit_queries(config, "quick")


@pytest.mark.slow
@pytest.mark.skipif(KIT_QUERIES is None, reason="the competition's query file is not here")
def test_the_competitions_queries_are_answered_by_the_zoo(here):
    config = here / "zoo.yaml"
    config.write_text(f"base: {ZOO / 'base'}\nadapters: {ZOO / 'adapters'}\n")
    answer_kit_queries(config, "uniform_average")


def test_a_time_box_too_short_for_a_search_says_so_and_still_answers(zoo, here, capsys):
    assert run(zoo, "--time-box", 0.5, method="my_merge") == 0
    printed = capsys.readouterr().out
    assert "the time box of 0.5 s is too short for a search" in printed
    assert "search ended by clock" in printed
    rows = read_rows("output/queries.csv")[1:]
    assert rows[1][1] in ("0", "1")  # late, but read
    document = json.loads(Path("output/my_merge/coefficients.json").read_text())
    assert document["provenance"]["winner"] == "balanced"


def test_what_is_not_read_in_time_is_counted(zoo, here, quick, capsys, monkeypatch):
    gone_s = iter([0.0, 0.0, 96.0, *[99.0] * 99])  # the answers' time is over before the first batch
    monkeypatch.setattr(program, "seconds_gone", lambda: next(gone_s))
    assert run(zoo, "--time-box", 100) == 0
    printed = capsys.readouterr().out
    assert "2 queries were not read and got a placeholder" in printed
    assert [row[1] for row in read_rows("output/queries.csv")[1:]] == ["unknown", "0"]


def test_ctrl_c_while_libraries_are_imported_ends_without_a_traceback(tmp_path):
    (tmp_path / "transformers.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, ROOT / "llm_merging/main.py"]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
