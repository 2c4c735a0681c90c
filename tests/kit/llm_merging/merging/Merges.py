"""The base class of methods, as the kit's contract states it; it needs HF_AUTH_TOKEN, as the kit does."""

import os

import torch
from peft import PeftConfig, load_peft_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_merging.constants import BASE_MODEL_NAME, BASE_MODEL_REVISION_ID, EMPTY, LIST_MODELS
from llm_merging.model import decoder_functions


class Merges:
    def __init__(self, name):
        self.name = name
        self.list_models = LIST_MODELS
        self.base_model_name = BASE_MODEL_NAME
        self.base_model_revision_id = BASE_MODEL_REVISION_ID
        self.is_peft = True
        self.max_seq_len = None
        self.max_gen_len = 64
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.architecture = "decoder"
        self.base_model = None
        self.tokenizer = self.input_tokenizer = self.target_tokenizer = None
        self.loaded_models = self.loaded_configs = self.merged_model = EMPTY
        if EMPTY is not None:
            self.loaded_models, self.loaded_configs, self.merged_model = {}, {}, {}

    def merge(self):
        raise NotImplementedError

    def _load_huggingface_models_and_configs(self):
        os.environ["HF_AUTH_TOKEN"]
        for name, revision in self.list_models:
            self.loaded_models[name] = load_peft_weights(name, device="cpu")
            self.loaded_configs[name] = PeftConfig.from_pretrained(name, revision=revision)

    def _load_base_model(self):
        self.base_model = AutoModelForCausalLM.from_pretrained(
            self.base_model_name, revision=self.base_model_revision_id, token=os.environ["HF_AUTH_TOKEN"]
        ).to(self.device)

    def _load_tokenizer(self):
        def load(**settings):
            return AutoTokenizer.from_pretrained(
                self.base_model_name, token=os.environ["HF_AUTH_TOKEN"], **settings
            )

        self.tokenizer, self.input_tokenizer, self.target_tokenizer = load(), load(), load()

    def save_model(self, output_dir):
        assert self.merged_model, "merge() must fill merged_model"
        os.makedirs(output_dir, exist_ok=True)
        save_file(self.merged_model, os.path.join(output_dir, "safetensor.pt"))

    def predict_multiple_choice(self, batch):
        return decoder_functions.predict_multiple_choice(
            self.base_model, self.input_tokenizer, self.target_tokenizer, batch
        )

    def generate(self, batch):
        return decoder_functions.generate(
            self.base_model, self.input_tokenizer, self.target_tokenizer, batch, self.max_gen_len
        )
