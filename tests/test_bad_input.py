"""Bad input through the command: exit code 2, one line that says what and where, nothing half-written."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llm_merging import main as program
from tests.test_merges import save_toy_zoo

HEADER = "id,input,eval_type,answer_choices\n"
QUERIES = HEADER + "1,two,generation,\nb,which?,multiple_choice,\"['a', 'b']\"\n"
EXPERT = "zoo/adapters/expert-1"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
CONTEXT = 4096
"""Tokens that the toy base reads; its tokenizer makes one of each character, and one to start with."""

Change = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """One mistake: how to make it in a good working directory, and the words that its line must have."""

    words: Sequence[str]
    """File or field, what was found, what was expected, the way out."""
    change: Change = lambda: None
    arguments: Sequence[str] = field(default=())
    makes: Sequence[str] = field(default=())
    """What may be under output/ afterwards: whole files of steps that came before."""


def queries(text: str | bytes) -> Change:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda: Path("queries.csv").write_bytes(content)


def choices(text: str) -> Change:
    quoted = text.replace('"', '""')
    return queries(f'{QUERIES}c,which?,multiple_choice,"{quoted}"\n')


def adapter_config(**changes: Any) -> Change:
    def change() -> None:
        path = Path(EXPERT, "adapter_config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Replace one tensor of the expert, or add it where there is none."""

    def change() -> None:
        path = Path(EXPERT, "adapter_model.safetensors")
        content = {name: tensor.clone() for name, tensor in load_file(path).items()}
        content[key] = make(content.get(key, torch.zeros(()))).contiguous()
        save_file(content, path)

    return change


def rename_modules(old: str, new: str) -> Change:
    def change() -> None:
        path = Path(EXPERT, "adapter_model.safetensors")
        save_file({key.replace(old, new): tensor for key, tensor in load_file(path).items()}, path)

    return change


def tensors_without(key: str) -> Change:
    """Take one tensor out of the base."""

    def change() -> None:
        path = Path("zoo/base/model.safetensors")
        content = {name: tensor.clone() for name, tensor in load_file(path).items()}
        del content[key]
        save_file(content, path, metadata={"format": "pt"})

    return change


def pickle_only() -> None:
    weights = Path(EXPERT, "adapter_model.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


def settings(text: str) -> Change:
    """Append to the configuration."""
    return lambda: Path("config.yaml").write_text(Path("config.yaml").read_text() + text)


def listed(*sources: str) -> Change:
    """Name the adapters one by one."""
    return lambda: Path("config.yaml").write_text(f"base: zoo/base\nadapters: {list(sources)}\n")


def spoil_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return spoil


BAD: dict[str, Bad] = {
    # ---- queries
    "query file missing": Bad(
        arguments=["--dataset_filepaths", "none.csv"],
        words=["none.csv", "No such file", "Check the path"],
    ),
    "query file is a folder": Bad(
        arguments=["--dataset_filepaths", "zoo"], words=["zoo", "Is a directory", "Check the path"]
    ),
    "a needed column missing": Bad(
        change=queries("id,input,eval_type\n1,a,generation\n"),
        words=["queries.csv", "'answer_choices' is missing", "found id, input, eval_type", "Expected id,"],
    ),
    "a duplicate id": Bad(
        change=queries(QUERIES + "b,x,generation,\n"),
        words=["queries.csv", "'b' is used twice", "Give every row its own id"],
    ),
    "an unknown eval_type": Bad(
        change=queries(QUERIES + "c,x,essay,\n"),
        words=["queries.csv", "row 'c'", "eval_type 'essay'", "Expected multiple_choice or generation"],
    ),
    "an empty file": Bad(
        change=queries(""), words=["queries.csv", "the file is empty", "Expected the columns id,"]
    ),
    "a header alone": Bad(
        change=queries(HEADER), words=["queries.csv", "a header but no row", "at least one query"]
    ),
    "choices not a list": Bad(
        change=choices("yes or no"),
        words=[
            "queries.csv",
            "row 'c'",
            "answer_choices is 'yes or no'",
            "Expected a Python list of strings",
        ],
    ),
    "choices cut off": Bad(
        change=choices("['a', 'b"),
        words=["row 'c'", "answer_choices is \"['a', 'b\"", "Expected a Python list"],
    ),
    "choices nested deep": Bad(
        change=choices("[" * 50_000 + "]" * 50_000),
        words=["row 'c'", "answer_choices", "Expected a Python list"],
    ),
    "choices too long": Bad(
        change=choices(f"['{'a' * 200_000}']"), words=["row 'c'", "200004 characters long, more than 100000"]
    ),
    "choices that call": Bad(
        change=choices("[__import__('os').getcwd()]"),
        words=["row 'c'", "__import__", "Expected a Python list"],
    ),
    "choices a number": Bad(
        change=choices("9" * 30), words=["row 'c'", "answer_choices is '999", "Expected a Python list"]
    ),
    "choices of numbers": Bad(
        change=choices("[1, 2]"), words=["row 'c'", "answer_choices is '[1, 2]'", "Expected a Python list"]
    ),
    "choices empty": Bad(change=choices("[]"), words=["row 'c'", "answer_choices is '[]'", "Expected"]),
    "not UTF-8": Bad(
        change=queries(HEADER.encode() + b"1,caf\xe9,generation,\n"),
        words=["queries.csv", "not UTF-8 (byte 39)", "Save the file as UTF-8"],
    ),
    "UTF-16": Bad(
        change=queries(QUERIES.encode("utf-16")), words=["queries.csv", "not UTF-8 (byte 0)", "Save"]
    ),
    "a quote left open": Bad(
        change=queries(HEADER + '1,"open,generation,\n'),
        words=["queries.csv", "broken CSV near line 2", "Check the quotes"],
    ),
    "a cell too many": Bad(
        change=queries(HEADER + "1,a, b,generation,\n"),
        words=["queries.csv", "row '1'", "more or fewer cells", "Quote cells"],
    ),
    "an input longer than the context": Bad(
        change=queries(QUERIES + f"long,{'a' * CONTEXT},generation,\n"),
        words=[
            "queries.csv",
            "row 'long'",
            f"{CONTEXT + 1} tokens",
            f"context is {CONTEXT}",
            "Shorten the input",
        ],
    ),
    # ---- adapters
    "adapter folder missing": Bad(
        change=listed("zoo/adapters/expert-1", "zoo/adapters/none"),
        words=["config.yaml", "adapters.1", "no folder 'zoo/adapters/none'", "expected an existing folder"],
    ),
    "adapters' folder empty": Bad(
        change=lambda: shutil.rmtree("zoo/adapters") or Path("zoo/adapters").mkdir(),
        words=["config.yaml", "no subfolder of", "holds adapter_config.json", "write a list"],
    ),
    "adapter without config": Bad(
        change=lambda: Path(EXPERT, "adapter_config.json").unlink() or listed(EXPERT)(),
        words=["adapter 'expert-1'", "no adapter_config.json", "expected a folder saved by PEFT"],
    ),
    "adapter's config not JSON": Bad(
        change=lambda: Path(EXPERT, "adapter_config.json").write_text("{"),
        words=["adapter 'expert-1'", "adapter_config.json is unreadable or not valid JSON", "Re-download"],
    ),
    "adapter's config not UTF-8": Bad(
        change=lambda: Path(EXPERT, "adapter_config.json").write_bytes(b'{"r": "\xff"}'),
        words=["adapter 'expert-1'", "adapter_config.json is unreadable", "Re-download"],
    ),
    "adapter's config nested deep": Bad(
        change=lambda: Path(EXPERT, "adapter_config.json").write_text("[" * 100_000),
        words=["adapter 'expert-1'", "adapter_config.json", "recursion", "Re-download"],
    ),
    "adapter pickled only": Bad(
        change=pickle_only,
        words=[
            "adapter 'expert-1'",
            "no adapter_model.safetensors",
            "adapter_model.bin",
            "`allow_pickle: true`",
        ],
    ),
    "adapter's weights cut off": Bad(
        change=lambda: os.truncate(Path(EXPERT, "adapter_model.safetensors"), 200),
        words=["adapter 'expert-1'", "adapter_model.safetensors is truncated", "Re-download"],
    ),
    "made for another base, by name": Bad(
        change=adapter_config(base_model_name_or_path="org/other-7b"),
        words=["adapter 'expert-1'", "made for base 'org/other-7b'", "but the base is", "`base.name`"],
    ),
    "made for another base, by shapes": Bad(
        change=tensors(f"{QUERY}.lora_A.weight", lambda A: torch.ones(A.shape[0], 32)),
        words=["adapter 'expert-1'", "q_proj is (d_out, d_in) = (16, 32)", "base's is (16, 16)", "Drop it"],
    ),
    "a target that the base lacks": Bad(
        change=rename_modules("layers.1.", "layers.7."),
        words=["adapter 'expert-1'", "the base has no module 'model.layers.7.", "Drop it"],
    ),
    "DoRA": Bad(
        change=adapter_config(use_dora=True),
        words=["adapter 'expert-1'", "DoRA (use_dora)", "only plain LoRA can", "Drop it"],
    ),
    "DoRA's tensors": Bad(
        change=tensors(f"{QUERY}.lora_magnitude_vector", lambda _: torch.ones(16)),
        words=["adapter 'expert-1'", "DoRA", "lora_magnitude_vector", "Drop it"],
    ),
    "bias": Bad(
        change=adapter_config(bias="lora_only"),
        words=["adapter 'expert-1'", "trained biases (bias: 'lora_only')", "Drop it"],
    ),
    "modules_to_save": Bad(
        change=adapter_config(modules_to_save=["lm_head"]),
        words=["adapter 'expert-1'", "whole trained modules (modules_to_save)", "only plain LoRA can"],
    ),
    "resized embeddings": Bad(
        change=tensors("base_model.model.model.embed_tokens.weight", lambda _: torch.ones(60, 16)),
        words=["adapter 'expert-1'", "embeddings of its own (a resized vocabulary)", "Drop it"],
    ),
    "NaN": Bad(
        change=tensors(f"{QUERY}.lora_B.weight", spoil_value(float("nan"))),
        words=[
            "adapter 'expert-1'",
            "q_proj.lora_B.weight holds NaN or infinite",
            "Drop it or train it again",
        ],
    ),
    "infinity": Bad(
        change=tensors(f"{QUERY}.lora_A.weight", spoil_value(float("inf"))),
        words=[
            "adapter 'expert-1'",
            "q_proj.lora_A.weight holds NaN or infinite",
            "Drop it or train it again",
        ],
    ),
    "unequal ranks in a pair": Bad(
        change=tensors(f"{QUERY}.lora_A.weight", lambda A: torch.ones(3, 16)),
        words=[
            "adapter 'expert-1'",
            "lora_A has rank 3 but lora_B has rank 4",
            "(A (3, 16), B (16, 4))",
            "Re-d",
        ],
    ),
    # ---- base
    "base missing": Bad(
        change=lambda: shutil.rmtree("zoo/base"),
        words=["config.yaml", "base", "no folder 'zoo/base'", "expected"],
    ),
    "base without tokenizer": Bad(
        change=lambda: Path("zoo/base/tokenizer.json").unlink(),
        words=["base ", "no tokenizer in", "tokenizer.save_pretrained"],
    ),
    "base without weights": Bad(
        change=lambda: Path("zoo/base/model.safetensors").unlink(),
        words=["base ", "no *.safetensors in", "save_pretrained"],
    ),
    "base's weights cut off": Bad(
        change=lambda: os.truncate("zoo/base/model.safetensors", 300),
        words=["base ", "cannot be loaded", "Download it again"],
    ),
    "base without config": Bad(
        change=lambda: Path("zoo/base/config.json").unlink(),
        words=["base 'zoo/base'", "no config.json in zoo/base", "save_pretrained"],
    ),
    "base's config not JSON": Bad(
        change=lambda: Path("zoo/base/config.json").write_text("{"),
        words=["base 'zoo/base'", "config.json cannot be read", "Download it again"],
    ),
    "base no language model": Bad(
        change=lambda: Path("zoo/base/config.json").write_text('{"model_type": "vit"}'),
        words=["base 'zoo/base'", "describes no causal language model", "Choose another base"],
    ),
    "base's tokenizer broken": Bad(
        change=lambda: Path("zoo/base/tokenizer.json").write_text("{"),
        words=["base 'zoo/base'", "its tokenizer cannot be read", "tokenizer.save_pretrained"],
    ),
    "base lacks a weight": Bad(
        change=tensors_without("model.norm.weight"),
        words=["base 'zoo/base'", "lack 1 of the model's weights, model.norm.weight", "Download it again"],
    ),
    # ---- configuration
    "config missing": Bad(arguments=["--config", "none.yaml"], words=["none.yaml", "cannot read the config"]),
    "config not YAML": Bad(change=settings("search: [\n"), words=["config.yaml:4", "not valid YAML"]),
    "an unknown key": Bad(
        change=settings("serch: {seed: 1}\n"),
        words=["config.yaml: serch: unknown key", "did you mean 'search'", "known keys: base, adapters"],
    ),
    "an unknown key in a section": Bad(
        change=settings("search: {time_box: 9}\n"),
        words=["config.yaml: search.time_box: unknown key", "did you mean 'time_box_s'", "known keys:"],
    ),
    "an unknown key two sections deep": Bad(
        change=settings("search: {space: {grups: layer}}\n"),
        words=["config.yaml: search.space.grups: unknown key", "did you mean 'groups'", "known keys: groups"],
    ),
    "a prior that is not there": Bad(
        change=settings("search: {prior: none.json}\n"),
        words=["config.yaml: search.prior: no file 'none.json'", "python -m search priors"],
    ),
    "a value out of range": Bad(
        change=settings("search: {n_candidates: 1}\n"),
        words=["config.yaml: search.n_candidates", "found 1", "greater than or equal to 2"],
    ),
    "a value of another type": Bad(
        change=settings("search: {seed: soon}\n"),
        words=["config.yaml: search.seed", "found 'soon'", "integer"],
    ),
    "an unknown objective": Bad(
        change=settings("objective: {name: accuracy}\n"),
        words=[
            "config.yaml: objective.name",
            "found 'accuracy'",
            "package.module:function",
            "entropy_excess",
        ],
    ),
    "an option out of range": Bad(
        arguments=["--time-box", "-5"], words=["search.time_box_s=-5", "greater than 0"]
    ),
    "an unknown method": Bad(
        arguments=["-m", "none"], words=["--method", "invalid choice: 'none'", "uniform_average", "--help"]
    ),
    # ---- output
    "output folder below a file": Bad(
        arguments=["--output_folder", "queries.csv/out"],
        words=["cannot write to queries.csv/out", "Not a directory", "--output_folder"],
    ),
    "output folder is a file": Bad(
        arguments=["--output_folder", "config.yaml"], words=["cannot write to config.yaml", "--output_folder"]
    ),
    "method's folder is a file": Bad(
        change=lambda: Path("output").mkdir() or Path("output/uniform_average").write_text("mine"),
        words=["cannot write to output/uniform_average", "--output_folder"],
        makes=["uniform_average"],
    ),
    "a stranger in the adapter's folder": Bad(
        change=lambda: (
            Path("output/uniform_average/adapter").mkdir(parents=True)
            or Path("output/uniform_average/adapter/notes.txt").write_text("mine")
        ),
        words=["output/uniform_average/adapter", "holds 'notes.txt'", "would delete", "Choose a new folder"],
        makes=["uniform_average/adapter/notes.txt"],
    ),
    "answers over the queries": Bad(
        arguments=["--output_folder", "."], words=["replace the queries in queries.csv", "--output_folder"]
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A zoo, a configuration and queries that are in order, to be copied and spoiled."""
    folder = tmp_path_factory.mktemp("good")
    save_toy_zoo(folder / "zoo")
    (folder / "config.yaml").write_text("base: {source: zoo/base, name: base}\nadapters: zoo/adapters\n")
    (folder / "queries.csv").write_text(QUERIES)
    return folder


@pytest.fixture
def here(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    fixed = ["-m", "uniform_average", "--config", "config.yaml", "--dataset_filepaths", "queries.csv"]
    return program.main([*fixed, *arguments])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error.strip()


def written(folder: str = "output") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_the_good_directory_is_good(here):
    assert run() == 0
    assert "queries.csv" in written()


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_bad_input_is_one_line_and_code_2_and_leaves_nothing(here, capsys, case):
    bad = BAD[case]
    bad.change()
    before = written(".")
    assert run(*bad.arguments) == 2
    line = refusal(capsys)
    for word in bad.words:
        assert word in line
    assert written() == list(bad.makes)
    assert written(".") == before


ADAPTER = [
    "uniform_average/adapter/README.md",
    "uniform_average/adapter/adapter_config.json",
    "uniform_average/adapter/adapter_model.safetensors",
    "uniform_average/adapter/coefficients.json",
]
MERGED = [
    *ADAPTER,
    "uniform_average/coefficients.json",
    "uniform_average/safetensor.pt",
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("target", "whole"),
    [
        ("uniform_average/coefficients.json", ADAPTER),
        ("uniform_average/safetensor.pt", MERGED[:5]),
        ("queries.csv", MERGED),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_only_whole_files(here, capsys, target, whole):
    path = Path("output", target)
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.{os.getpid()}.partial").symlink_to("/dev/full")
    assert run() == 2
    line = capsys.readouterr().err.splitlines()[-1]  # the answers' progress may stand before it
    assert line.startswith(f"error: cannot write {path}: No space left on device. Free space or")
    assert written() == whole


def test_a_disk_that_fills_up_while_the_adapter_is_written(here, capsys, monkeypatch):
    def fill_up(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("search.merge.save_file", fill_up)
    assert run() == 2
    line = refusal(capsys)
    assert line.startswith("error: cannot write ")
    assert "output/uniform_average/adapter: I/O error: No space left" in line
    assert written() == []


def test_a_failed_rename_keeps_the_answers_of_the_run_before(here, capsys, monkeypatch):
    assert run() == 0
    before = {name: Path("output", name).read_bytes() for name in written()}
    capsys.readouterr()

    def fill_up(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("output/uniform_average/safetensor.pt").write_bytes(b"old")
    before["uniform_average/safetensor.pt"] = b"old"
    rename = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: (fill_up if new.name == "safetensor.pt" else rename)(old, new)
    )
    assert run() == 2
    assert "cannot write output/uniform_average/safetensor.pt: No space left" in refusal(capsys)
    assert {name: Path("output", name).read_bytes() for name in written()} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: (
            text.replace("choices\n", "choices,target,extra\n")
            .replace("n,\n", "n,,yes,1\n")
            .replace(']"\n', ']",0,2\n')
        ),
        lambda text: text.rstrip("\n"),
    ],
    ids=["crlf", "bom", "bom and crlf", "target and more columns", "no last line end"],
)
def test_harmless_variations_of_a_query_file_change_nothing(here, change):
    assert run() == 0
    expected = Path("output/queries.csv").read_bytes()
    text = change(QUERIES)
    assert text != QUERIES
    Path("queries.csv").write_bytes(text.encode())
    Path("output/queries.csv").unlink()
    assert run() == 0
    assert Path("output/queries.csv").read_bytes() == expected
