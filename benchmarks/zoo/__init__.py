"""The embedded zoo: task generators, a base trained from scratch, LoRA experts, queries and a model card."""
