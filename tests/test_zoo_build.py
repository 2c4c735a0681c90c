"""The tiny build: resumable, the same for the same seed, and read by transformers, PEFT and the search."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.zoo import build as build_module
from benchmarks.zoo import measure
from benchmarks.zoo import scores as scores_module
from benchmarks.zoo.__main__ import main
from benchmarks.zoo.build import build_expert, build_experts, build_zoo
from benchmarks.zoo.check import read_zoo_scores
from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.example import draw_distinct
from benchmarks.zoo.experts import IGNORED, batch
from benchmarks.zoo.record import read_record, recorded
from benchmarks.zoo.scores import measured, measured_adapter
from benchmarks.zoo.sizes import EXPERTS, JOINT, TINY
from benchmarks.zoo.tasks import HELD_IN
from llm_merging.data import read_queries
from llm_merging.model.decoder_functions import generate, predict_multiple_choice
from search.adapters import check_adapter, load_adapter
from tests.tiny_zoo import tiny_build

ALL_TASKS = {*HELD_IN, *HELD_OUT}


@pytest.fixture(scope="module")
def base(tiny_zoo):
    """The tiny base as users load it, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_zoo.base).eval()
    return model, AutoTokenizer.from_pretrained(tiny_zoo.base)


@pytest.fixture
def copied(tiny_zoo, tmp_path):
    """A copy of the tiny zoo that a test may change."""
    shutil.copytree(tiny_zoo.queries, tmp_path, dirs_exist_ok=True)
    return tiny_build(tmp_path)


@pytest.fixture
def unmeasured(monkeypatch):
    """Make building an expert not measure it; the test is about the training."""
    monkeypatch.setattr(build_module, "measured_adapter", lambda build, spec: {})


def files_of(build):
    return sorted(p for folder in (build.out, build.work) for p in folder.rglob("*") if p.is_file())


def test_the_base_loads_with_bos_eos_and_pad(base):
    model, tokenizer = base
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert model.config.model_type == "mistral"
    assert model.dtype == torch.bfloat16
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
        assert getattr(model.generation_config, name) == getattr(tokenizer, name)


def test_the_tokenizer_adds_bos_only_and_gives_back_its_text(base):
    _, tokenizer = base
    for generator in (*HELD_IN.values(), *HELD_OUT.values()):
        example = generator(random.Random(5))
        for text in (example.prompt, example.answer, "naïve 12 €"):
            ids = tokenizer(text).input_ids
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.eos_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_prompt_and_answer_are_the_tokens_of_their_joined_text(base):
    """So an answer is trained, generated and scored as the same tokens."""
    _, tokenizer = base
    for generator in HELD_IN.values():
        example = generator(random.Random(6))
        answer = tokenizer(example.answer, add_special_tokens=False).input_ids
        joined = tokenizer(f"{example.prompt} {example.answer}").input_ids
        assert tokenizer(example.prompt).input_ids + answer == joined


@pytest.mark.parametrize("spec", EXPERTS, ids=lambda spec: spec.task)
def test_every_adapter_is_what_its_specification_says(tiny_zoo, base, spec):
    adapter = load_adapter(str(tiny_zoo.adapter(spec)))
    check_adapter(adapter, base[0], "data/zoo/base")
    assert {f.A.shape[0] for f in adapter.modules.values()} == {spec.rank}
    assert {f.scaling for f in adapter.modules.values()} == {2.0}
    kinds = {name.rsplit(".", 1)[1] for name in adapter.modules}
    assert len(kinds) == (7 if spec.modules == "all" else 2)
    assert len(adapter.modules) == len(kinds) * TINY.layers
    assert all(f.A.dtype == torch.bfloat16 for f in adapter.modules.values())
    config = json.loads((tiny_zoo.adapter(spec) / "adapter_config.json").read_text())
    assert config["use_rslora"] == spec.rslora
    assert config["base_model_name_or_path"] == "data/zoo/base"


def test_the_experts_are_mixed_on_purpose():
    assert {spec.rank for spec in EXPERTS} == {4, 8, 16}
    assert {spec.modules for spec in EXPERTS} == {"all", "qv"}
    assert any(spec.rslora for spec in EXPERTS)
    assert sorted(spec.loss_on for spec in EXPERTS) == ["answer"] * 5 + ["sequence"] * 5
    assert [spec.task for spec in EXPERTS] == list(HELD_IN)


def test_peft_and_the_search_read_the_same_update(tiny_zoo):
    for spec in (EXPERTS[0], EXPERTS[7]):  # plain and rsLoRA
        folder = tiny_zoo.adapter(spec)
        by_peft = measure.summed_deltas(tiny_zoo.base, [folder])
        factors = load_adapter(str(folder)).modules
        assert set(by_peft) == set(factors)
        for name, f in factors.items():
            torch.testing.assert_close(by_peft[name], f.scaling * f.B.float() @ f.A.float())


def test_a_scaled_merge_adds_the_updates_of_all(tiny_zoo):
    folders = [tiny_zoo.adapter(spec) for spec in EXPERTS[:2]]
    deltas = measure.summed_deltas(tiny_zoo.base, folders)
    merged = measure.scaled_merge(tiny_zoo.base, deltas, 1.0, "cpu")
    ids = torch.tensor([[1, 50, 60, 70]])
    one = PeftModel.from_pretrained(measure.load(tiny_zoo.base, "cpu")[0], folders[0], adapter_name="a")
    one.load_adapter(folders[1], adapter_name="b")
    one.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(merged(ids).logits, one(ids).logits)


def test_the_loss_is_on_the_answer_or_on_the_whole_sequence(base):
    _, tokenizer = base
    examples = [HELD_IN["maths"](random.Random(1)), HELD_IN["sql"](random.Random(1))]
    for loss_on in ("answer", "sequence"):
        ids, mask, labels = batch(examples, tokenizer, loss_on)
        for row, example in enumerate(examples):
            n_prompt, n_all = len(tokenizer(example.prompt).input_ids), int(mask[row].sum())
            first = n_prompt if loss_on == "answer" else 0
            assert (labels[row, :first] == IGNORED).all()
            assert (labels[row, first:n_all] == ids[row, first:n_all]).all()
            assert (labels[row, n_all:] == IGNORED).all()
            assert ids[row, n_all - 1] == tokenizer.eos_token_id


def test_measuring_answers_as_the_competition_does(tiny_zoo):
    """The scores to compare with come from the same answers as the predictions that they are compared to."""
    model, tokenizer = measure.load(tiny_zoo.base, "cpu")
    examples = scores_module.split_examples(TINY, 0, "test")
    free = [e for group in examples.values() for e in group if not e.choices]
    prompts = {"input": [e.prompt for e in free]}
    _, texts = generate(model, tokenizer, tokenizer, prompts, 64)
    assert measure.generate_answers(model, tokenizer, free, 64) == [text.strip() for text in texts]
    topics = draw_distinct(HELD_IN["topic"], random.Random(0), "test", 10)
    words = sorted(token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha())
    single_tokens = [replace(e, choices=tuple(words[:9])) for e in topics]
    gen = torch.Generator().manual_seed(0)
    for group in (topics, examples["sentiment"], examples["topic_sentiment"], *[single_tokens] * 5):
        with torch.no_grad():  # other logits each time, so that every token of a choice counts
            model.lm_head.weight.normal_(generator=gen)
        asked = {"input": [e.prompt for e in group], "answer_choices": [e.choices for e in group]}
        best, _ = predict_multiple_choice(model, tokenizer, tokenizer, asked)
        chosen = [e.choices[i] for e, i in zip(group, best.tolist(), strict=True)]
        assert measure.choose_answers(model, tokenizer, group) == chosen


def test_scores_have_every_model_on_every_task_of_both_splits(tiny_zoo):
    scores = read_zoo_scores(tiny_zoo.out)
    for split in ("test", "validation"):
        found = scores[split]
        assert set(found["matrix"]) == set(HELD_IN)
        rows = [*(found[name] for name in ("base", "uniform", "scaled", "joint")), *found["matrix"].values()]
        for row in rows:
            assert set(row) == ALL_TASKS
            assert all(0 <= value <= 1 for value in row.values())
    assert scores["base"] == scores["test"]["base"]
    assert scores["experts"] == {task: scores["test"]["matrix"][task][task] for task in HELD_IN}
    assert set(scores["validation"]["scales"]) == {str(scale) for scale in TINY.scales}
    assert scores["test"]["n_examples"]["maths"] == TINY.held_in_queries
    assert scores["validation"]["n_examples"]["maths"] == TINY.n_measured


def test_the_query_file_is_read_and_has_the_measured_prompts(tiny_zoo):
    prompts = {query.input for query in read_queries(tiny_zoo.queries / "test.csv")}
    measured_prompts = {e.prompt for g in scores_module.split_examples(TINY, 0, "test").values() for e in g}
    assert prompts <= measured_prompts


def test_the_record_has_versions_and_the_seconds_of_each_stage(tiny_zoo):
    build = read_zoo_scores(tiny_zoo.out)["build"]
    assert build["seed"] == 0
    (versions,) = build["versions"].values()
    assert versions["torch"] == torch.__version__
    assert list(build["stages"]) == ["base", "experts", "scores"]
    assert all(name.startswith("CPU") for stage in build["stages"].values() for name in stage)


def test_a_finished_build_changes_nothing_when_run_again(copied, monkeypatch):
    monkeypatch.setattr(measure, "accuracies", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(build_module, "train_lora", lambda *_, **__: pytest.fail("trained again"))
    before = {path: path.read_bytes() for path in files_of(copied)}
    build_zoo(copied)
    assert {path: path.read_bytes() for path in files_of(copied)} == before


def test_an_interrupted_build_goes_on_and_ends_the_same(copied, tiny_zoo, unmeasured, monkeypatch):
    shutil.rmtree(copied.out / "adapters")
    shutil.rmtree(copied.adapter(JOINT))
    monkeypatch.setattr(build_module, "EXPERTS", EXPERTS[:3])
    train, trained = build_module.train_lora, []

    def interrupted(base, spec, *rest, **settings):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(spec.task)
        return train(base, spec, *rest, **settings)

    monkeypatch.setattr(build_module, "train_lora", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_experts(copied)
    assert [path.name for path in (copied.out / "adapters").iterdir()] == ["maths"]
    trained.clear()
    build_experts(copied)
    assert trained == ["code", "reasoning"]
    for spec in (JOINT, *EXPERTS[:3]):
        for path in tiny_zoo.adapter(spec).iterdir():
            assert (copied.adapter(spec) / path.name).read_bytes() == path.read_bytes(), path


def test_an_adapter_that_was_half_written_is_not_there(copied, unmeasured, monkeypatch):
    shutil.rmtree(copied.adapter(EXPERTS[0]))

    def half_written(model, folder, base_name):
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "save_adapter", half_written)
    with pytest.raises(KeyboardInterrupt):
        build_expert(copied, EXPERTS[0])
    assert not copied.adapter(EXPERTS[0]).exists()
    assert not list((copied.out / "adapters").glob("*partial*"))


def test_measured_validation_scores_are_kept_and_only_test_is_added(copied, monkeypatch):
    kept = dict.fromkeys(ALL_TASKS, 0.125)
    copied.measured("maths", "validation").write_text(json.dumps(kept))
    copied.measured("maths", "test").unlink()
    monkeypatch.setattr(measure, "accuracies", lambda model, tokenizer, groups, _: dict.fromkeys(groups, 0.5))
    found = measured_adapter(copied, EXPERTS[0])
    assert found == {"validation": kept, "test": dict.fromkeys(ALL_TASKS, 0.5)}
    assert (copied.work / "measured/maths.test.json").exists()
    assert json.loads((copied.work / "measured/maths.json").read_text()) == kept


def test_a_measured_model_is_not_even_loaded(copied):
    assert set(measured(copied, "base", lambda: pytest.fail("loaded"))) == {"validation", "test"}


def test_a_stage_with_nothing_to_do_leaves_its_record(tmp_path, monkeypatch):
    clock = iter([0.0, 90.0, 100.0, 100.5, 200.0, 203.0])
    monkeypatch.setattr("benchmarks.zoo.record.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("benchmarks.zoo.record.machine", lambda device: device)
    for device, seconds in (
        ("gpu", {"gpu": 90.0}),
        ("cpu", {"gpu": 90.0}),
        ("cpu", {"gpu": 90.0, "cpu": 3.0}),
    ):
        with recorded(tmp_path / "record.json", "base", device):
            pass
        assert read_record(tmp_path / "record.json")["stages"]["base"] == seconds


def test_the_command_builds_where_it_is_told(tmp_path, monkeypatch):
    builds = []
    monkeypatch.setattr("benchmarks.zoo.__main__.build_zoo", builds.append)
    main(["--tiny", "--seed", "3", "--out", str(tmp_path / "a"), "--queries", str(tmp_path / "b")])
    (build,) = builds
    assert (build.size, build.seed, build.out, build.queries) == (TINY, 3, tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_parallel_workers_build_what_one_does(copied, tiny_zoo, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(build_module, "EXPERTS", EXPERTS[:2])
    for spec in EXPERTS[:2]:
        shutil.rmtree(copied.adapter(spec))
        copied.measured(spec.task, "test").unlink()
    build_experts(replace(copied, n_workers=2))
    for spec in EXPERTS[:2]:
        assert copied.measured(spec.task, "test").exists()
        found = load_adapter(str(copied.adapter(spec)))
        assert found.sha256 == load_adapter(str(tiny_zoo.adapter(spec))).sha256
