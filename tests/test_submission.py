"""What a submission takes from the kit, and the time that it leaves to the kit's own answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from search import submission
from search.base import load_base
from search.errors import InputError
from search.merge import merge_adapters
from search.submission import (
    GENERATION_SHARE,
    choose_start,
    leave_out_misfits,
    measure_answers,
    merge_into,
    ready_base,
    ready_tokenizer,
    start_neutral,
)
from search.versions import dtype_option
from tests.test_base import save_toy_base
from tests.test_experts import stack
from tests.toys import make_model

PRIOR = {"names": ["b", "x"], "groups": ["g"], "start": [[0.7, 9.0]], "spread": [[0.1, 9.0]], "sha256": "0"}
GROUPS, BALANCED = SimpleNamespace(names=("g",)), np.array([0.5, 0.25])


def settings(**changes):
    return SimpleNamespace(**{"start": "balanced", "sigma": None} | changes)


def test_a_start_is_balanced_or_a_number():
    for choose in (choose_start, start_neutral):
        start, spread = choose(settings(), BALANCED, GROUPS, "ab", None)
        np.testing.assert_array_equal(start, [[0.5, 0.25]])
        np.testing.assert_array_equal(spread, [[0.25, 0.125]])
        start, spread = choose(settings(start=0.0, sigma=0.4), BALANCED, GROUPS, "ab", None)
        np.testing.assert_array_equal(start, [[0.0, 0.0]])
        np.testing.assert_array_equal(spread, [[0.4, 0.4]])


def test_a_bundled_prior_is_known_by_names():
    start, spread = choose_start(settings(), BALANCED, GROUPS, "ab", PRIOR)
    np.testing.assert_array_equal(start, [[0.5, 0.7]])
    np.testing.assert_array_equal(spread, [[0.25, 0.1]])
    with pytest.raises(InputError, match="other groups"):
        choose_start(settings(), BALANCED, GROUPS, "ab", {**PRIOR, "groups": ["h"]})


def test_adapters_that_no_merge_can_use_are_left_out(toy_adapters, toy_model, caplog):
    adapters, model = list(toy_adapters("llama")), toy_model("llama")
    norms = submission.relative_norms(model, stack(adapters)[0])
    kept, stacked, left_out = leave_out_misfits(adapters, model, np.sort(norms)[1] * 1.01)
    assert len(kept) == 2
    assert stacked.names == tuple(adapter.name for adapter in kept)
    assert list(left_out) == [adapters[int(norms.argmax())].name]
    assert "left out" in caplog.text
    with pytest.raises(InputError, match="no adapter can be merged"):
        leave_out_misfits(adapters, model, norms.min() / 2)


def test_the_merge_is_folded_in_and_handed_back(toy_adapters):
    adapters, model = toy_adapters("llama"), make_model("llama")
    _, groups = stack(adapters)
    table = np.random.default_rng(0).normal(size=(len(groups.names), 3))
    expected = merge_adapters(adapters, table, groups, base_name="b", dtype=torch.float64).state_dict
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = merge_into(model, adapters, table, groups)
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor)
    for name in groups.group_of:
        A, B = (merged[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(
            model.get_submodule(name).weight.data, before[f"{name}.weight"] + B @ A, atol=1e-6, rtol=1e-6
        )


def test_a_merge_that_is_the_base_is_not_empty(toy_adapters):
    adapters, model = toy_adapters("llama"), make_model("llama")
    _, groups = stack(adapters)
    before = model(torch.arange(5)[None]).logits
    merged = merge_into(model, adapters, np.zeros((len(groups.names), 3)), groups)
    assert torch.equal(model(torch.arange(5)[None]).logits, before)
    assert len(merged) == 2
    assert not any(tensor.any() for tensor in merged.values())


class Clock:
    """Time that passes only where something is done."""

    def __init__(self, monkeypatch):
        self.now_s = 0.0
        monkeypatch.setattr("search.kit_search.time", SimpleNamespace(monotonic=lambda: self.now_s))

    def take(self, seconds):
        self.now_s += seconds


class Kit:
    """Answers a text in 3 seconds, but the first in 100; reads one in half a second."""

    def __init__(self, clock):
        self._clock, self.asked, self.device = clock, [], "cpu"
        self.input_tokenizer, self.tokenizer = None, self._encode
        self.base_model = self._Reader(clock)

    class _Reader(nn.Module):
        device = torch.device("cpu")

        def __init__(self, clock):
            super().__init__()
            self._clock = clock

        def forward(self, input_ids):
            self._clock.take(0.5)
            return SimpleNamespace(logits=input_ids.float())

    def _encode(self, text, return_tensors):
        return {"input_ids": torch.tensor([[len(text)]])}

    def generate(self, batch):
        self._clock.take(3.0 if self.asked else 100.0)
        self.asked += batch["input"]


@pytest.mark.parametrize("n_queries", [1200, 10])
def test_answers_ahead_are_measured_one_at_a_time_on_own_prompts(n_queries, monkeypatch):
    kit = Kit(Clock(monkeypatch))
    seconds = measure_answers(kit, ["mine", "own", "third"], n_queries)
    assert seconds == pytest.approx(n_queries * (GENERATION_SHARE * 3.0 + (1 - GENERATION_SHARE) * 2 * 0.5))
    assert kit.asked == ["mine", "mine", "own"]


def test_without_own_prompts_something_is_asked_and_without_queries_nothing(monkeypatch):
    kit = Kit(Clock(monkeypatch))
    assert measure_answers(kit, [], 0) == 0.0
    assert kit.asked == []
    assert measure_answers(kit, [], 1) > 0
    assert kit.asked == ["Q:", "Q:"]


def test_base_and_tokenizer_are_made_ready():
    model = ready_base(nn.Linear(1, 1).half().train(), "cpu")
    assert not model.training
    assert model.weight.dtype == torch.float32
    assert not model.weight.requires_grad
    token = SimpleNamespace(pad_token_id=None, pad_token=None, eos_token="</s>")
    assert ready_tokenizer(SimpleNamespace(input_tokenizer=None, tokenizer=token)).pad_token == "</s>"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kits_base_becomes_what_a_run_loads(device, tmp_path):
    """Its positions too, which are in buffers: in bfloat16 they would be wrong after a few hundred tokens."""
    folder = save_toy_base(tmp_path)
    ours = ready_base(AutoModelForCausalLM.from_pretrained(folder, **dtype_option(torch.float64)), device)
    theirs = load_base(str(folder), device=device).model
    assert ours.device == theirs.device
    for kind in ("named_parameters", "named_buffers"):
        one, other = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor, other[name]), name


def test_of_a_base_only_parameters_change_their_type():
    model = nn.BatchNorm1d(1).double()
    ready_base(model, "cpu")
    assert (model.weight.dtype, model.running_mean.dtype) == (torch.float32, torch.float64)
