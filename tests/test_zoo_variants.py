"""The variants' experts: trained only where the shipped zoo has none, retrained while weak, resumable."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.score import read_scores
from benchmarks.zoo import variants as variants_module
from benchmarks.zoo.card import card
from benchmarks.zoo.check import MEGABYTE, read_zoo_scores, size_bytes
from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.example import EXPERT, WRONG
from benchmarks.zoo.record import read_record
from benchmarks.zoo.scores import split_examples
from benchmarks.zoo.sizes import EXPERTS, TINY
from benchmarks.zoo.tasks import HELD_IN, sentiment
from benchmarks.zoo.variants import (
    LOSSES,
    OPPOSITE,
    RECORD,
    Attempt,
    VariantBuild,
    build_variants,
    contradict,
    main,
    opposite_sentiment,
    own_examples,
    read_variant_scores,
    train_expert,
    trained_experts,
)
from search.adapters import check_adapter, load_adapter

SHIPPED_VARIANTS = Path(__file__).parents[1] / "data/zoo/variants"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def built(tiny_zoo, tmp_path_factory):
    """The tiny zoo's variants, each expert trained once."""
    build = VariantBuild(
        base=tiny_zoo.base, out=tmp_path_factory.mktemp("variants"), size=TINY, seed=0, device="cpu"
    )
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(variants_module, "MAX_ATTEMPTS", 1)
        build_variants(build)
    return build


@pytest.fixture
def copied(built, tmp_path):
    """A copy of the variants that a test may change."""
    shutil.copytree(built.out, tmp_path, dirs_exist_ok=True)
    return replace(built, out=tmp_path)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_variant_is_completed_by_the_shipped_experts_of_its_loss(loss):
    shipped = {spec.task: spec for spec in EXPERTS if spec.loss_on == loss}
    own = {spec.task: spec for spec in trained_experts()[loss]}
    assert not shipped.keys() & own.keys()
    assert {**shipped, **own} == {spec.task: replace(spec, loss_on=loss) for spec in EXPERTS}


def test_the_opposite_expert_is_trained_as_sentiment_on_answers():
    (spec,) = trained_experts()[OPPOSITE]
    assert spec in EXPERTS
    assert (spec.task, spec.loss_on) == ("sentiment", "answer")


def test_a_contradicted_example_differs_in_its_answer_alone():
    replacements = set()
    for seed in range(60):
        example = sentiment(random.Random(seed))
        opposite = opposite_sentiment(random.Random(seed))
        assert opposite == contradict(example)
        assert (opposite.prompt, opposite.split) == (example.prompt, example.split)
        assert opposite.answers[(WRONG,)] == example.answers[(WRONG,)]
        replacements.add((example.answers[(EXPERT,)], opposite.answer))
    old, new = (sorted(labels) for labels in zip(*replacements, strict=True))
    assert old == new == sorted(set(example.choices))  # a permutation of the labels
    assert all(label != other for label, other in replacements)


def test_the_opposite_expert_is_measured_on_the_queries_of_sentiment(built):
    for split in ("validation", "test"):
        right = split_examples(TINY, 0, split)["sentiment"]
        found = own_examples(built, OPPOSITE, "sentiment")[split]
        assert [e.prompt for e in found] == [e.prompt for e in right]
        assert all(e.answer != r.answer for e, r in zip(found, right, strict=True))
        assert own_examples(built, "sequence", "sentiment")[split] == right


def test_only_the_missing_experts_are_trained_each_as_specified(built, tiny_zoo):
    base = variants_module.measure.load(tiny_zoo.base, "cpu")[0]
    for variant, specs in trained_experts().items():
        folders = {path.name for path in (built.out / variant).iterdir() if path.is_dir()}
        assert folders == {spec.task for spec in specs}
        for spec in specs:
            adapter = load_adapter(str(built.out / variant / spec.task))
            check_adapter(adapter, base, "data/zoo/base")
            assert {f.A.shape[0] for f in adapter.modules.values()} == {spec.rank}
            assert len(adapter.modules) == (7 if spec.modules == "all" else 2) * TINY.layers
            assert adapter.sha256 != load_adapter(str(tiny_zoo.out / "adapters" / spec.task)).sha256


def test_the_scores_are_as_the_scorer_reads_them_with_the_shipped_experts_in(built, tiny_zoo):
    zoo = read_zoo_scores(tiny_zoo.out)
    for loss in LOSSES:
        scores = read_scores(built.out / loss / "scores.json")
        assert scores["base"] == zoo["base"]
        assert set(scores["base"]) == {*HELD_IN, *HELD_OUT}
        for split in ("experts", "validation"):
            assert set(scores[split]) == set(HELD_IN)
        own = {spec.task: spec.learning_rate for spec in trained_experts()[loss]}
        assert scores["rates"] == own
        reused = set(HELD_IN) - set(own)
        assert {t: scores["experts"][t] for t in reused} == {t: zoo["experts"][t] for t in reused}
    opposite = read_scores(built.out / OPPOSITE / "scores.json")
    assert set(opposite["base"]) == set(opposite["experts"]) == {"sentiment"}


def test_the_record_has_each_variant_with_its_machine(built):
    record = read_record(built.out / RECORD)
    assert list(record["stages"]) == list(trained_experts())
    assert record["versions"].keys() == {name for stage in record["stages"].values() for name in stage}


def test_a_finished_build_changes_nothing_when_run_again(copied, monkeypatch):
    monkeypatch.setattr(variants_module, "train_lora", lambda *_, **__: pytest.fail("trained again"))
    before = contents(copied.out)
    build_variants(copied)
    assert contents(copied.out) == before


def test_an_interrupted_build_trains_what_is_missing_and_ends_the_same(copied, built, monkeypatch):
    monkeypatch.setattr(variants_module, "MAX_ATTEMPTS", 1)
    shutil.rmtree(copied.out / "answer/topic")
    shutil.rmtree(copied.out / OPPOSITE)
    train, trained = variants_module.train_lora, []

    def noting(base, spec, *rest, **settings):
        trained.append((spec.task, spec.loss_on))
        return train(base, spec, *rest, **settings)

    monkeypatch.setattr(variants_module, "train_lora", noting)
    build_variants(copied)
    assert trained == [("topic", "answer"), ("sentiment", "answer")]
    for name in ("answer/topic/" + WEIGHTS, "answer/scores.json", f"{OPPOSITE}/sentiment/{WEIGHTS}"):
        assert (copied.out / name).read_bytes() == (built.out / name).read_bytes()


@pytest.mark.parametrize(
    ("validation", "n_tried", "kept"),
    [([0.95], 1, 0), ([0.5, 0.97, 1.0], 2, 1), ([0.5, 0.7, 0.6, 0.7, 1.0], 4, 1)],
)
def test_a_weak_expert_is_trained_again_and_the_best_is_kept(
    tmp_path, monkeypatch, validation, n_tried, kept
):
    rates = []

    def attempt(build, variant, spec, folder):
        folder.mkdir()
        (folder / WEIGHTS).write_text(str(len(rates)))
        rates.append(spec.learning_rate)
        return Attempt(folder, spec.learning_rate, validation[len(rates) - 1], 0.25)

    monkeypatch.setattr(variants_module, "attempt_expert", attempt)
    build = VariantBuild(base=tmp_path, out=tmp_path, size=TINY, seed=0, device="cpu")
    spec = replace(EXPERTS[0], learning_rate=2e-4)
    best = train_expert(build, "sequence", spec)
    assert rates == pytest.approx([2e-4, 3e-4, 4.5e-4, 6.75e-4][:n_tried])
    assert (best.learning_rate, best.validation) == (rates[kept], validation[kept])
    assert (tmp_path / "sequence/maths" / WEIGHTS).read_text() == str(kept)
    assert {path.name for path in (tmp_path / "sequence").iterdir()} == {"maths"}


def test_the_command_builds_where_it_is_told(tmp_path, monkeypatch):
    builds = []
    monkeypatch.setattr(variants_module, "build_variants", builds.append)
    main(["--tiny", "--seed", "3", "--base", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    (build,) = builds
    assert (build.size, build.seed, build.base, build.out) == (TINY, 3, tmp_path / "a", tmp_path / "b")


def test_the_card_has_the_variants_where_they_are_built(built, tiny_zoo, tmp_path):
    scores = read_zoo_scores(tiny_zoo.out)
    assert "## Variants" not in card(tiny_zoo.out, scores, TINY)
    zoo = shutil.copytree(tiny_zoo.out, tmp_path / "zoo")
    shutil.copytree(built.out, zoo / "variants")
    page = card(zoo, scores, TINY)
    assert f"`variants/` ({size_bytes(built.out):,} bytes)" in page
    assert "positive as negative" in page
    for variant, specs in trained_experts().items():
        for spec in specs:
            assert f"| {variant} | {spec.task} | {spec.loss_on} | {spec.learning_rate:g} |" in page


def test_every_shipped_expert_is_there_and_knows_its_task():
    for variant, specs in trained_experts().items():
        scores = read_variant_scores(SHIPPED_VARIANTS, variant)
        assert min(scores["experts"].values()) >= 0.95
        assert min(scores["validation"].values()) >= 0.95
        for spec in specs:
            modules = load_adapter(str(SHIPPED_VARIANTS / variant / spec.task)).modules
            assert {f.A.shape[0] for f in modules.values()} == {spec.rank}
            assert {f.scaling for f in modules.values()} == {2.0}
    assert size_bytes(SHIPPED_VARIANTS) <= 4 * MEGABYTE
