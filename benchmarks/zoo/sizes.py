"""How big the zoo is: the experts, the shipped build and a tiny one for tests.

Numbers only; knows nothing of how they are used.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """How one expert is trained."""

    task: str
    rank: int
    modules: str
    """"all": every linear module of the decoder layers; "qv": q_proj and v_proj only."""
    loss_on: str
    """"sequence": every token of the text; "answer": the answer's tokens alone."""
    learning_rate: float
    """Peak."""
    steps: int
    rslora: bool = False


@dataclass(frozen=True, slots=True)
class ZooSize:
    """Every number that a build needs; token counts are per batch row."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    n_documents: int
    pretrain_steps: int
    pretrain_rows: int
    row_tokens: int
    max_expert_steps: int
    """Cuts the steps of every expert and of the joint LoRA."""
    expert_rows: int
    joint_rows: int
    n_measured: int
    """Validation examples per task that the card's scores are measured on."""
    context: int = 4096
    answer_tokens: int = 64
    """Tokens that a model may write for an answer when it is measured."""
    held_in_queries: int = 55
    """Queries of each held-in task in test.csv."""
    held_out_queries: int = 31
    """Queries of each shipped composition in test.csv."""
    scales: tuple[float, ...] = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)
    """Scales tried for all adapters alike; the best is picked on validation labels."""


EXPERTS = (
    ExpertSpec("maths", 8, "all", "answer", 2.5e-4, 300),
    ExpertSpec("code", 8, "qv", "sequence", 1.5e-3, 400),
    ExpertSpec("reasoning", 16, "all", "answer", 1.5e-4, 300),
    ExpertSpec("chat", 4, "all", "sequence", 5e-4, 400),
    ExpertSpec("tool", 16, "qv", "answer", 3e-3, 600),
    ExpertSpec("sentiment", 8, "qv", "answer", 4.5e-4, 300),
    ExpertSpec("topic", 4, "qv", "sequence", 3e-3, 600),
    ExpertSpec("entities", 16, "all", "sequence", 1.5e-4, 300, rslora=True),
    ExpertSpec("data_to_text", 8, "all", "sequence", 1.5e-4, 300),
    ExpertSpec("sql", 8, "all", "answer", 1.5e-4, 300),
)
"""Trained at very different strengths, as by different people, so that no one scale suits all."""

JOINT = ExpertSpec("joint", 32, "all", "answer", 5e-4, 1200)
"""One LoRA trained on all held-in tasks: what is possible. Measured, not shipped."""

SHIPPED = ZooSize(
    hidden=256,
    layers=6,
    heads=8,
    kv_heads=2,
    intermediate=704,
    vocabulary=1280,
    n_documents=1_600_000,
    pretrain_steps=4500,
    pretrain_rows=512,
    row_tokens=128,
    max_expert_steps=1200,
    expert_rows=32,
    joint_rows=64,
    n_measured=200,
)

TINY = ZooSize(
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate=64,
    vocabulary=512,
    n_documents=2_000,
    pretrain_steps=20,
    pretrain_rows=16,
    row_tokens=64,
    max_expert_steps=5,
    expert_rows=8,
    joint_rows=8,
    n_measured=4,
    held_in_queries=3,
    held_out_queries=2,
    answer_tokens=8,
    scales=(0.3, 1.0),
)
