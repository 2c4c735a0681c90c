"""`merge`: recorded merges, loaded by PEFT and transformers, against the population that found them."""

import json
import shutil
from dataclasses import asdict
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from search.adapters import Adapter, load_adapter
from search.base import LoadedBase, hash_weights
from search.delivery import deliver_merge
from search.errors import InputError
from search.export import export_merge
from search.merge import merge_adapters
from search.parts import assemble_parts
from search.population import population
from search.versions import dtype_option
from tests.test_base import make_toy_tokenizer
from tests.toys import (
    Recipe,
    assert_same,
    load_with_peft,
    make_model,
    mixed_recipes,
    random_ids,
    save_adapter,
)

IDS = random_ids(1, 6)
TIED = "gpt2 with an adapter on its tied output layer"
CASES = ("llama", "gpt2", TIED)


class Case:
    """A saved base, its adapters and a delivered merge of random coefficients in `run`."""

    def __init__(self, folder: Path, case: str, dtype: torch.dtype = torch.float64) -> None:
        self.folder, architecture = folder, case.split()[0]
        self.model = make_model(architecture, dtype=dtype)
        self.base, self.run = folder / "base", folder / "run"
        self.model.name_or_path = self.model.config.name_or_path = str(self.base)
        self.model.save_pretrained(self.base)
        make_toy_tokenizer().save_pretrained(self.base)
        recipes = (*mixed_recipes(architecture), *([Recipe(targets=("lm_head",))] if case == TIED else []))
        paths = [save_adapter(self.model, folder / f"e{i}", recipe) for i, recipe in enumerate(recipes)]
        self.adapters = tuple(load_adapter(str(path)) for path in paths)
        loaded = LoadedBase(self.model, None, str(self.base), None, hash_weights(self.base))
        self.parts = assemble_parts(loaded, self.adapters, base_name=str(self.base), kind="layer")
        self.coefficients = np.random.default_rng(0).normal(size=self.parts.shape)
        provenance = {"seed": 0, "winner": "archive 1"}
        deliver_merge(
            self.parts, self.coefficients, str(self.base), self.run, objective={}, provenance=provenance
        )

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """What the search saw."""
        rows = torch.from_numpy(self.coefficients)[None]
        with population(self.model, self.parts.stacked, rows, self.parts.groups):
            return self.model(IDS).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), request.param)


def run_copy(case: Case, folder: Path, **changes: object) -> Path:
    """A coefficients.json like the delivered one, with some fields replaced."""
    document = json.loads((case.run / "coefficients.json").read_text()) | changes
    path = folder / "coefficients.json"
    path.write_text(json.dumps(document))
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is written


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word")
def test_the_adapter_in_peft_gives_the_logits_of_the_search(case: Case, tmp_path: Path) -> None:
    result = export_merge(case.run, tmp_path / "out")
    assert_same(load_with_peft(case.model, tmp_path / "out")(IDS).logits, case.logits())
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (case.run / "adapter" / weights).read_bytes()
    assert result.rank == json.loads((tmp_path / "out/adapter_config.json").read_text())["r"]
    assert (result.relative_error, result.modules) == (None, len(case.parts.groups.group_of))
    assert (result.worst_module, result.worst_error) == (None, None)
    assert result.n_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert json.loads(json.dumps(asdict(result)))["output"] == str(tmp_path / "out")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word")
def test_the_dense_model_loads_alone_and_gives_the_logits_that_peft_merges_to(
    case: Case, tmp_path: Path
) -> None:
    result = export_merge(case.run, tmp_path / "out", dense=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **dtype_option("auto"))
    assert loaded.dtype == torch.float64  # the base's own, not the device's
    assert_same(loaded(IDS).logits, case.logits())
    assert (result.rank, result.relative_error) == (None, None)
    if case.model.config.tie_word_embeddings and "lm_head" in case.parts.groups.group_of:
        assert not loaded.config.tie_word_embeddings
        return  # PEFT merges into the embeddings too
    merged_by_peft = load_with_peft(case.model, case.run / "adapter").merge_and_unload()
    assert_same(loaded(IDS).logits, merged_by_peft(IDS).logits)


def test_the_dense_folder_has_tokenizer_card_and_coefficients(llama: Case, tmp_path: Path) -> None:
    export_merge(llama.run, tmp_path / "out", dense=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abc").input_ids == make_toy_tokenizer()("abc").input_ids
    assert tokenizer.pad_token is None  # as the base has it
    assert metadata_load(tmp_path / "out/README.md")["library_name"] == "transformers"
    assert {"README.md", "coefficients.json", "config.json", "model.safetensors"} < set(
        names_in(tmp_path / "out")
    )
    again = export_merge(tmp_path / "out", tmp_path / "again")  # its coefficients.json is one more source
    assert again.modules == len(llama.parts.groups.group_of)


def test_a_smaller_rank_is_near_and_its_error_is_told(llama: Case, tmp_path: Path) -> None:
    exact = export_merge(llama.run, tmp_path / "exact")
    cut = export_merge(llama.run, tmp_path / "cut", rank=3)
    assert (cut.rank, cut.modules) == (3, exact.modules)
    lost = whole = 0.0
    errors = {}
    before, after = (load_adapter(str(tmp_path / name)).modules for name in ("exact", "cut"))
    for name in before:
        delta = before[name].B @ before[name].A
        left_out = (delta - after[name].B @ after[name].A).square().sum()
        lost += float(left_out)
        whole += float(delta.square().sum())
        errors[name] = float((left_out / delta.square().sum()) ** 0.5)
    assert cut.relative_error == pytest.approx((lost / whole) ** 0.5)
    assert 0 < cut.relative_error < 1
    assert cut.worst_module == max(errors, key=errors.__getitem__)
    assert cut.worst_error == pytest.approx(max(errors.values()))
    card = (tmp_path / "cut/README.md").read_text()
    assert f"leaves out {cut.relative_error:.3g} of the sum" in card
    shown = cut.worst_module.replace("_", "\\_")
    assert f"The module that loses most is {shown}: {cut.worst_error:.3g} of its update." in card
    assert names_in(tmp_path / "cut") == names_in(tmp_path / "exact")


def test_a_trace_gives_the_same_adapter_as_its_coefficients(llama: Case, tmp_path: Path) -> None:
    from_file = export_merge(llama.run, tmp_path / "file")
    document = json.loads((llama.run / "coefficients.json").read_text())
    header = {
        "kind": "header",
        "schema": 1,
        "config": {
            "base": {"name": str(llama.base)},
            "search": {"space": "layer"},
            "objective": {"name": "entropy_excess", "combine": "mean"},
        },
        "seed": 0,
        "base": document["base"],
        "adapters": document["adapters"],
        "groups": list(document["groups"]),
        "versions": {},
        "commit": None,
    }
    finalists = {
        "kind": "event",
        "event": "finalists",
        "names": ["archive 1"],
        "winner": "archive 1",
        "losses": [0.5],
        "per_expert": [[0.1, 0.2, 0.3]],
        "winner_coefficients": document["coefficients"],
    }
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in (header, finalists)))
    from_trace = export_merge(trace, tmp_path / "trace")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "trace" / weights).read_bytes() == (tmp_path / "file" / weights).read_bytes()
    assert (from_trace.rank, from_trace.modules) == (from_file.rank, from_file.modules)
    assert "| disagreement |" in (tmp_path / "trace/README.md").read_text()


def test_an_adapter_needs_no_base(llama: Case, tmp_path: Path) -> None:
    path = run_copy(llama, tmp_path, base={"id": "gone/base", "name": "org/base"})
    export_merge(path, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_types_are_those_of_the_weights_unless_asked_for(llama: Case, tmp_path: Path) -> None:
    for name, expected in (("auto", torch.float64), ("bfloat16", torch.bfloat16)):
        export_merge(llama.run, tmp_path / name, dtype=name)
        export_merge(llama.run, tmp_path / f"cut-{name}", dtype=name, rank=2)
        export_merge(llama.run, tmp_path / f"dense-{name}", dtype=name, dense=True)
        for path in tmp_path.glob(f"*{name}/*.safetensors"):
            assert {tensor.dtype for tensor in load_file(path).values()} == {expected}
    with pytest.raises(InputError, match="dtype 'int8' is unknown"):
        export_merge(llama.run, tmp_path / "x", dtype="int8")


def test_a_narrow_base_stays_narrow_and_coefficients_on_narrow_adapters_are_not_rounded(
    tmp_path: Path,
) -> None:
    case = Case(tmp_path, "llama", torch.bfloat16)
    export_merge(case.run, tmp_path / "adapter")
    exact = merge_adapters(case.adapters, case.coefficients, case.parts.groups, base_name="")
    torch.testing.assert_close(
        load_file(tmp_path / "adapter/adapter_model.safetensors"), exact.state_dict, rtol=0, atol=0
    )
    export_merge(case.run, tmp_path / "out", dense=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **dtype_option("auto"))
    assert loaded.dtype == torch.bfloat16


def test_defaults_of_generation_are_copied_even_where_transformers_would_not_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, "llama")
    save = GenerationConfig.save_pretrained

    def save_strictly(self: GenerationConfig, *given: object, **named: object) -> None:
        if "strict" in signature(self.validate).parameters:
            self.validate(strict=True)  # as transformers 5.17 does, whoever set the values
        save(self, *given, **named)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", save_strictly)
    defaults = '{"do_sample": false, "temperature": 0.6}'
    (case.base / "generation_config.json").write_text(defaults)
    export_merge(case.run, tmp_path / "out", dense=True)
    assert (tmp_path / "out/generation_config.json").read_text() == defaults


# ---- refused


def test_weights_that_changed_are_refused_with_both_hashes(llama: Case, tmp_path: Path) -> None:
    changed = tmp_path / "e1"
    shutil.copytree(llama.adapters[1].source, changed)
    tensors = load_file(changed / "adapter_model.safetensors")
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, changed / "adapter_model.safetensors")
    document = json.loads((llama.run / "coefficients.json").read_text())
    document["adapters"][1]["id"] = str(changed)
    path = run_copy(llama, tmp_path, **document)
    found, recorded = load_adapter(str(changed)).sha256[:12], llama.adapters[1].sha256[:12]
    with pytest.raises(InputError, match=rf"adapter 'e1' .* is {found}, recorded was {recorded}: not the"):
        export_merge(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    document["adapters"][1]["sha256"] = None  # any weights will do
    export_merge(run_copy(llama, tmp_path, **document), tmp_path / "out")


def test_a_base_that_changed_is_refused_for_a_dense_model(llama: Case, tmp_path: Path) -> None:
    base = {"id": str(llama.base), "sha256": "f" * 64}
    path = run_copy(llama, tmp_path, base=base)
    with pytest.raises(InputError, match=r"base .* recorded was ffffffffffff: not the weights"):
        export_merge(path, tmp_path / "out", dense=True)
    assert names_in(tmp_path) == ["coefficients.json"]


@pytest.mark.parametrize("gone", ["/gone/e0", "gone/e0"])  # the second could be a hub id, but has no revision
def test_an_adapter_that_is_gone_is_named(llama: Case, tmp_path: Path, gone: str) -> None:
    document = json.loads((llama.run / "coefficients.json").read_text())
    document["adapters"][0]["id"] = gone
    path = run_copy(llama, tmp_path, **document)
    with pytest.raises(InputError, match=f"adapter 'e0': found no folder '{gone}', seen from"):
        export_merge(path, tmp_path / "out")


def test_a_base_that_is_gone_is_named_for_a_dense_model(llama: Case, tmp_path: Path) -> None:
    path = run_copy(llama, tmp_path, base={"id": "gone/base", "name": "org/base"})
    with pytest.raises(InputError, match=r"coefficients\.json: base: found no folder 'gone/base'"):
        export_merge(path, tmp_path / "out", dense=True)


def test_a_base_of_another_shape_is_refused_before_its_weights_are_read(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "base"
    make_model("gpt2").save_pretrained(other)
    monkeypatch.setattr("search.export.load_base", None)
    with pytest.raises(InputError, match=r"the base has no module 'model\.layers"):
        export_merge(run_copy(llama, tmp_path, base={"id": str(other)}), tmp_path / "out", dense=True)


def test_rank_and_dense_together_are_refused(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--rank is of an adapter and --dense writes a whole model"):
        export_merge(llama.run, tmp_path / "out", rank=4, dense=True)


def test_a_rank_below_one_is_refused(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--rank: found 0"):
        export_merge(llama.run, tmp_path / "out", rank=0)


@pytest.mark.parametrize("dense", [True, False])
def test_an_output_with_other_peoples_files_is_left_alone(llama: Case, tmp_path: Path, dense: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="Choose"):
        export_merge(llama.run, tmp_path, dense=dense)
    assert names_in(tmp_path) == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file, expected a folder"):
        export_merge(llama.run, tmp_path / "thesis.txt", dense=dense)


def test_an_expert_is_not_replaced_by_its_own_merge(llama: Case) -> None:
    expert: Adapter = llama.adapters[0]
    (Path(expert.source) / "README.md").unlink(missing_ok=True)  # PEFT's own card would be refused already
    with pytest.raises(InputError, match="is an adapter that is merged here"):
        export_merge(llama.run, Path(expert.source))
    assert load_adapter(expert.source).sha256 == expert.sha256


def test_an_exported_adapter_is_replaced_by_another(llama: Case, tmp_path: Path) -> None:
    export_merge(llama.run, tmp_path / "out")
    export_merge(llama.run, tmp_path / "out", rank=2)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 2
    assert names_in(tmp_path) == ["out"]
    with pytest.raises(InputError, match="holds files already, and --dense wants a new folder"):
        export_merge(llama.run, tmp_path / "out", dense=True)


@pytest.mark.parametrize("error", [SafetensorError("No space left"), OSError(28, "No space left")])
def test_a_full_disk_leaves_no_half_model(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fill_up(self: nn.Module, folder: Path, **_: object) -> None:
        (folder / "half").write_text("written")
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fill_up)
    with pytest.raises(InputError, match=r"cannot write .*out: No space left"):
        export_merge(llama.run, tmp_path / "out", dense=True)
    assert names_in(tmp_path) == []
