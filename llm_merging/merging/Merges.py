"""The base class of merge methods: what to merge, loading, answering and saving.

Knows the starter kit's attribute and method names and where the configuration comes from; not how to merge.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import save
from torch import Tensor

from llm_merging.evaluation import Batch
from llm_merging.model import decoder_functions
from search.adapters import Adapter, check_adapter, load_adapter
from search.base import LoadedBase, choose_device, load_base, load_shapes, load_tokenizer, read_context
from search.config import SearchConfig, load_config
from search.errors import InputError
from search.files import atomic_write
from search.parts import identify_base, load_adapters

REPOSITORY = Path(__file__).resolve().parents[2]
COMPETITION_CONFIG = REPOSITORY / "configs" / "mistral-7b.yaml"
DEMO_CONFIG = REPOSITORY / "configs" / "demo.yaml"
COMPETITION_BYTES = 23 * 10**9
"""Cards sold as 24 GB report 23.6e9 bytes and more."""


def choose_config() -> tuple[Path, str]:
    """Return the default configuration for this machine, and why it is the one."""
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= COMPETITION_BYTES:
        return COMPETITION_CONFIG, "there is a CUDA device with at least 24 GB"
    return DEMO_CONFIG, "there is no CUDA device with at least 24 GB"


class Merges:
    """A merge method: after `merge`, `base_model` answers queries and `merged_model` holds the parameters."""

    def __init__(self, name: str, config: SearchConfig | None = None) -> None:
        self.name = name
        self.config = config or load_config(choose_config()[0])
        self.list_models = [(adapter.source, adapter.revision) for adapter in self.config.adapters]
        self.base_model_name = self.config.base.source
        self.base_model_revision_id = self.config.base.revision
        self.is_peft = True
        self.max_seq_len: int | None = None
        self.max_gen_len = 64
        self.device = str(choose_device(self.config.device))
        self.architecture = "decoder"
        self.base_model: Any = None
        self.tokenizer: Any = None
        self.input_tokenizer: Any = None
        self.target_tokenizer: Any = None
        self.loaded_models: dict[str, dict[str, Tensor]] = {}
        self.loaded_configs: dict[str, PeftConfig] = {}
        self.merged_model: dict[str, Tensor] = {}

        self.loaded_base: LoadedBase | None = None
        self.output = Path("output") / name
        """Folder for what the method writes."""
        self.skip_first_choice_token = False
        """True reproduces the kit's own scoring of choices."""
        self.gone_s: Callable[[], float] = lambda: 0.0
        """Seconds of the time box that are gone already."""
        self.measure_answers_s: Callable[[], float] = lambda: 0.0
        """Measures the seconds of the time box that the answers will need, at every call anew."""
        self.ended_by = ""
        """What ended the method's search: evaluations, clock or interrupt; empty where there was none."""
        self.report = ""
        """What the method has to say about its merge, for people."""
        if token := os.environ.get("HF_AUTH_TOKEN"):
            os.environ.setdefault("HF_TOKEN", token)

    def merge(self) -> None:
        """Set `base_model` to the merged model and `merged_model` to the merged parameters."""
        raise NotImplementedError

    def save_model(self, output_dir: str | os.PathLike[str]) -> None:
        """Write `merged_model` to `safetensor.pt` in the folder, whole or not at all."""
        if not self.merged_model:
            raise RuntimeError(
                f"{self.name}: merged_model is empty. merge() must fill it before save_model()."
            )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.merged_model.items()}
        with atomic_write(Path(output_dir) / "safetensor.pt") as temporary:
            temporary.write_bytes(save(tensors, metadata={"format": "pt"}))

    def measure_reserve_s(self) -> float:
        """Return the seconds of the time box that are not the method's; measuring takes some of them."""
        answers_s = self.measure_answers_s()
        return answers_s + self.gone_s()

    def context(self) -> int | None:
        """Return how many tokens a query and its answer may have, None if the base does not say."""
        return self.max_seq_len or read_context(self.base_model_name, revision=self.base_model_revision_id)

    def check_adapters(self) -> None:
        """Refuse adapters that are damaged or do not fit, before the base's weights are read (InputError)."""
        shapes = load_shapes(self.base_model_name, revision=self.base_model_revision_id)
        for adapter in self._load_adapters():
            check_adapter(adapter, shapes, self.config.base.name)

    def predict_multiple_choice(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the best choice's index for each query (n_queries,), and all scores."""
        self._check_architecture()
        return decoder_functions.predict_multiple_choice(
            self.base_model,
            self.input_tokenizer,
            self.target_tokenizer,
            batch,
            skip_first=self.skip_first_choice_token,
        )

    def generate(self, batch: Batch) -> tuple[list[list[int]], list[str]]:
        """Return the new token ids and the text of each query's greedy answer."""
        self._check_architecture()
        return decoder_functions.generate(
            self.base_model, self.input_tokenizer, self.target_tokenizer, batch, self.max_gen_len
        )

    def _load_huggingface_models_and_configs(self) -> None:
        """Fill `loaded_models` with PEFT state dicts and `loaded_configs` with PEFT configs, by name."""
        for name, revision in self.list_models:
            adapter = load_adapter(name, revision=revision)
            self.loaded_models[name] = {
                f"base_model.model.{module}.lora_{letter}.weight": getattr(factors, letter)
                for module, factors in adapter.modules.items()
                for letter in ("A", "B")
            }
            self.loaded_configs[name] = PeftConfig.from_pretrained(name, revision=revision)

    def _load_adapters(self) -> list[Adapter]:
        """Load the configured adapters, checked and ready to be merged; without those that may be missing."""
        return load_adapters(self.config)[0]

    def _load_everything(self) -> list[Adapter]:
        """Load base, tokenizer and adapters; an adapter that does not fit the base is an InputError."""
        self._load_base_model()
        self._load_tokenizer()
        adapters = self._load_adapters()
        for adapter in adapters:
            check_adapter(adapter, self.base_model, self.config.base.name)
        return adapters

    def _identify_base(self) -> dict[str, str | None]:
        """Say which base weights these are, as coefficients.json records it."""
        identity = identify_base(self.loaded_base) if self.loaded_base else {}
        return {**identity, "name": self.config.base.name}

    def _load_base_model(self) -> None:
        """Load the base model once, in eval mode on `device`."""
        self._check_architecture()
        if self.base_model is None:
            self.loaded_base = load_base(
                self.base_model_name,
                revision=self.base_model_revision_id,
                device=self.device,
                dtype=self.config.base.dtype,
            )
            self.base_model = self.loaded_base.model

    def _load_tokenizer(self) -> None:
        """Load the tokenizer once; inputs and targets share it, decoder_functions.py sees to BOS and EOS."""
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.base_model_name, revision=self.base_model_revision_id)
            self.input_tokenizer = self.target_tokenizer = self.tokenizer

    def _check_architecture(self) -> None:
        if self.architecture != "decoder":
            raise InputError(f"architecture {self.architecture!r} is not supported. Only 'decoder' is.")
