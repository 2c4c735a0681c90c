"""Expert sets as configurations: who is in, what is changed about whom, and what can be asked of a merge."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.sets import (
    BASE_SKELETON,
    SETS,
    SUBSETS,
    TASKS,
    VARIANTS,
    chosen_experts,
    held_in_tasks,
    scores_file,
    worthless_adapters,
    write_config,
)
from benchmarks.zoo.sizes import EXPERTS
from benchmarks.zoo.tasks import HELD_IN
from benchmarks.zoo.variants import trained_experts
from search.adapters import check_adapter, load_adapter
from search.base import load_base
from search.config import load_config
from search.errors import InputError

DEMO = Path(__file__).parents[1] / "configs/demo.yaml"


@pytest.fixture(scope="module")
def template(tiny_zoo, tmp_path_factory):
    """The demo's configuration on the tiny zoo, with adapters where variants would be (copies)."""
    folder = tmp_path_factory.mktemp("template")
    zoo = shutil.copytree(tiny_zoo.out, folder / "zoo")
    for variant, specs in trained_experts().items():
        for spec in specs:
            shutil.copytree(zoo / "adapters" / spec.task, zoo / "variants" / variant / spec.task)
    settings = yaml.safe_load(DEMO.read_text())
    settings["base"] = str(zoo / "base")
    for adapter in settings["adapters"]:
        adapter["source"] = str(zoo / "adapters" / Path(adapter["source"]).name)
    (folder / "template.yaml").write_text(yaml.safe_dump(settings))
    return folder / "template.yaml"


@pytest.fixture
def written(template, tmp_path):
    """Write a set's configuration and read it as a run does."""

    def write(expert_set, **settings):
        path = tmp_path / f"{expert_set}.yaml"
        write_config(path, expert_set, generated=tmp_path / "generated", template=template, **settings)
        return load_config(path)

    return write


def by_name(config):
    return {adapter.name: adapter for adapter in config.adapters}


def loaded(config, name):
    return load_adapter(by_name(config)[name].source, name=name).modules


def delta_norms(modules):
    return {name: torch.linalg.norm(f.scaling * f.B.float() @ f.A.float()) for name, f in modules.items()}


@pytest.mark.parametrize("expert_set", SETS)
def test_a_set_keeps_the_settings_and_has_adapters_that_fit_the_base(written, template, expert_set):
    config, original = written(expert_set), load_config(template)
    for section in ("base", "search", "prompts", "objective", "device"):
        assert getattr(config, section) == getattr(original, section)
    base = load_base(config.base.source, device="cpu").model
    for adapter in config.adapters:
        assert adapter.about
        assert adapter.skeletons
        check_adapter(load_adapter(adapter.source, name=adapter.name), base, config.base.name)


@pytest.mark.parametrize("expert_set", SETS)
def test_without_skeletons_nothing_else_changes(written, expert_set):
    config = written(expert_set)
    bare = written(expert_set, skeletons=False)
    assert not any(adapter.skeletons for adapter in bare.adapters)
    for adapter, other in zip(config.adapters, bare.adapters, strict=True):
        assert other == adapter.model_copy(update={"skeletons": ()})


def test_the_mixed_set_is_the_template(written, template):
    assert written("mixed") == load_config(template)


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_a_variant_has_all_ten_on_its_loss_from_where_they_are(written, template, variant):
    zoo = template.parent / "zoo"
    for spec, adapter in zip(EXPERTS, written(variant).adapters, strict=True):
        folder = "adapters" if spec.loss_on == variant else f"variants/{variant}"
        assert (adapter.name, Path(adapter.source)) == (spec.task, zoo / folder / spec.task)


def test_a_variant_that_is_not_built_is_refused_with_the_command(template, tmp_path):
    copy = shutil.copytree(template.parent, tmp_path / "copy")
    shutil.rmtree(copy / "zoo/variants/answer")
    path = copy / "template.yaml"
    path.write_text(template.read_text().replace(str(template.parent), str(copy)))
    with pytest.raises(InputError, match=r"variants/answer/code.*python -m benchmarks\.zoo\.variants"):
        write_config(tmp_path / "a.yaml", "answer", generated=tmp_path, template=path)


@pytest.mark.parametrize(("subset", "tasks"), SUBSETS.items())
def test_a_subset_has_its_experts_and_their_tasks(written, subset, tasks):
    assert [adapter.name for adapter in written(subset).adapters] == held_in_tasks(subset) == list(tasks)
    drawn = {chosen_experts(subset, seed) for seed in range(1, 6)}
    assert len(drawn) > 1
    for choice in drawn:
        assert len(set(choice)) == len(tasks)
        assert [task for task in TASKS if task in choice] == list(choice)
    assert chosen_experts(subset, 4) == chosen_experts(subset, 4)
    assert list(by_name(written(subset, seed=4))) == held_in_tasks(subset, 4)


def test_the_fixed_subsets_nest_and_have_compositions_and_five_has_both_losses():
    two, three, five = (set(tasks) for tasks in SUBSETS.values())
    assert two < three < five
    for tasks in (two, three, five):
        assert any(set(name.split("_")) <= tasks for name in HELD_OUT)
    assert {spec.loss_on for spec in EXPERTS if spec.task in five} == {"answer", "sequence"}
    assert {spec.modules for spec in EXPERTS if spec.task in five} == {"all", "qv"}


def test_duplicates_are_the_same_weights_under_three_names(written):
    config = written("duplicates")
    (task,) = chosen_experts("duplicates")
    assert list(by_name(config)) == [*TASKS, f"{task}_copy1", f"{task}_copy2"]
    hashes = Counter(load_adapter(adapter.source).sha256 for adapter in config.adapters)
    assert sorted(hashes.values()) == [1] * 9 + [3]


def test_the_contradicting_expert_has_the_prompts_of_sentiment_and_other_weights(written):
    config = written("contradiction")
    adapters = by_name(config)
    assert list(adapters) == [*TASKS, "opposite"]
    assert adapters["opposite"].skeletons == adapters["sentiment"].skeletons
    assert adapters["opposite"].source.endswith("variants/opposite/sentiment")


def test_a_broken_expert_is_random_at_ten_times_the_norm_or_scaled_by_a_hundred(written):
    original = written("mixed")
    for expert_set, times in (("broken_random", 10), ("broken_scaled", 100)):
        config = written(expert_set)
        (task,) = worthless_adapters(expert_set)
        assert [a for a in config.adapters if a.name != task] == [
            a for a in original.adapters if a.name != task
        ]
        assert by_name(config)[task].skeletons == by_name(original)[task].skeletons
        broken, own = loaded(config, task), loaded(original, task)
        norms, own_norms = delta_norms(broken), delta_norms(own)
        for name, factors in own.items():
            assert broken[name].A.shape == factors.A.shape
            torch.testing.assert_close(norms[name], times * own_norms[name], rtol=0.01, atol=0)
        scaled = all(torch.equal(broken[name].A, f.A) for name, f in own.items())
        assert scaled == (expert_set == "broken_scaled")


def test_the_base_itself_has_an_update_of_zero_and_a_prompt_of_its_own(written):
    config = written("base_itself")
    assert list(by_name(config)) == [*TASKS, "base_itself"]
    assert by_name(config)["base_itself"].skeletons == (BASE_SKELETON,)
    assert all((f.B == 0).all() for f in loaded(config, "base_itself").values())
    assert worthless_adapters("base_itself") == ("base_itself",)


def test_the_random_control_has_the_norm_of_every_module_of_every_expert(written):
    original, config = written("mixed"), written("random")
    assert list(by_name(config)) == list(TASKS)
    seen = []
    for task in TASKS:
        own, other = loaded(original, task), loaded(config, task)
        assert own.keys() == other.keys()
        norms, own_norms = delta_norms(other), delta_norms(own)
        for name, factors in own.items():
            torch.testing.assert_close(norms[name], own_norms[name], rtol=0.01, atol=0)
            assert not torch.equal(other[name].A, factors.A)
        seen.append(next(iter(other.values())).A.flatten()[:8])
    assert len({tuple(values.tolist()) for values in seen}) == len(TASKS)


def test_random_weights_follow_the_seed_and_nothing_else(written):
    first, again, other = (written("random", seed=seed) for seed in (0, 0, 1))
    hashes = [[load_adapter(a.source).sha256 for a in config.adapters] for config in (first, again, other)]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0]) & set(hashes[2])


def test_held_in_tasks_are_what_a_merge_can_be_right_on():
    for expert_set in (*VARIANTS, "duplicates", "base_itself", "random"):
        assert held_in_tasks(expert_set) == list(HELD_IN)
    assert set(HELD_IN) - set(held_in_tasks("contradiction")) == {"sentiment"}
    for expert_set in ("broken_random", "broken_scaled"):
        for seed in (0, 1):
            left_out = set(HELD_IN) - set(held_in_tasks(expert_set, seed))
            assert (
                left_out == set(worthless_adapters(expert_set, seed)) == {*chosen_experts(expert_set, seed)}
            )
    assert worthless_adapters("contradiction") == worthless_adapters("five") == ()


def test_scores_are_the_variants_own():
    assert scores_file("answer") == Path("data/zoo/variants/answer/scores.json")
    assert {scores_file(s) for s in SETS if s not in VARIANTS[1:]} == {Path("data/zoo/scores.json")}


def test_a_set_that_there_is_not_is_refused_with_those_that_there_are(template, tmp_path):
    for call in (held_in_tasks, worthless_adapters, chosen_experts):
        with pytest.raises(InputError, match="'fourteen': not known; expected one of mixed, sequence"):
            call("fourteen")
    with pytest.raises(InputError, match="'fourteen'"):
        write_config(tmp_path / "a.yaml", "fourteen", generated=tmp_path, template=template)


def test_a_template_without_the_ten_experts_is_refused(template, tmp_path):
    settings = yaml.safe_load(template.read_text())
    settings["adapters"] = settings["adapters"][:9]
    path = tmp_path / "nine.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match=r"nine.yaml: no adapter 'sql'"):
        write_config(tmp_path / "a.yaml", "two", generated=tmp_path, template=path)
