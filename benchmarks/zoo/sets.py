"""Write a configuration whose adapters are one of the expert sets that methods are compared on.

The variants "mixed" (as shipped), "sequence" and "answer"; subsets "two", "three" and "five"; what must do
no harm, "duplicates", "contradiction", "broken_random", "broken_scaled" and "base_itself"; and the control
"random". Knows adapters as files and entries of a configuration, not models, merges or accuracies.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.zoo.sizes import EXPERTS
from benchmarks.zoo.variants import LOSSES, OPPOSITE
from search.adapters import CONFIG_FILE, WEIGHTS_FILE, Factors, load_adapter
from search.config import load_config
from search.errors import InputError
from search.files import atomic_write
from search.yaml_input import read_mapping

Entry = dict[str, Any]
"""One adapter of a configuration: source, name, about, skeletons."""
Change = Callable[[Factors, torch.Generator], tuple[Tensor, Tensor]]
"""New A and B of a module, of the old shapes."""

TASKS = tuple(spec.task for spec in EXPERTS)
VARIANTS = ("mixed", *LOSSES)
SUBSETS: dict[str, tuple[str, ...]] = {
    "two": ("maths", "chat"),
    "three": ("maths", "chat", "sql"),
    "five": ("maths", "code", "chat", "tool", "sql"),
}
"""One in the other, of both losses and module sets, and with compositions of two of them in the queries."""
CHOSEN: dict[str, tuple[str, ...]] = {
    **SUBSETS,
    "duplicates": ("maths",),
    "broken_random": ("code",),
    "broken_scaled": ("code",),
    "base_itself": ("chat",),
}
"""The experts that a set keeps, copies or breaks at seed 0; base_itself has the shapes of its."""
SETS = (*VARIANTS, *CHOSEN, "contradiction", "random")

RANDOM_TIMES, SCALED_TIMES, N_COPIES = 10.0, 100.0, 2
BASE_SKELETON = "### Task: Answer the question.\n### Question:{question}\n### Answer:"
"""What the user of an expert that is the base itself would believe it does."""


def chosen_experts(expert_set: str, seed: int = 0) -> tuple[str, ...]:
    """Return the experts that the set keeps (subsets), copies or breaks; seed 0 has CHOSEN, others draw.

    Raises:
        InputError: for a set that there is not.
    """
    if expert_set not in SETS:
        raise InputError(f"expert set {expert_set!r}: not known; expected one of {', '.join(SETS)}.")
    fixed = CHOSEN.get(expert_set, ())
    if seed == 0:
        return fixed
    drawn = random.Random(f"{seed} {expert_set}").sample(TASKS, len(fixed))
    return tuple(task for task in TASKS if task in drawn)


def held_in_tasks(expert_set: str, seed: int = 0) -> list[str]:
    """Return the held-in tasks that a merge of the set can be asked for, in the order of the experts.

    A broken expert's task is left out: no adapter of the set knows it. So is sentiment in "contradiction",
    where two experts answer the same queries differently and no merge is right for both. "random" has all
    ten: what the control gets on them is the point of it.
    """
    chosen = chosen_experts(expert_set, seed)
    if expert_set in SUBSETS:
        return list(chosen)
    without = {"contradiction": ("sentiment",)}.get(expert_set, chosen if is_broken(expert_set) else ())
    return [task for task in TASKS if task not in without]


def is_broken(expert_set: str) -> bool:
    """Whether one of the set's experts is broken."""
    return expert_set.startswith("broken_")


def worthless_adapters(expert_set: str, seed: int = 0) -> tuple[str, ...]:
    """Return the names of the set's adapters that a merge should give almost no weight."""
    chosen = chosen_experts(expert_set, seed)
    if expert_set == "base_itself":
        return (expert_set,)
    return chosen if is_broken(expert_set) else ()


def scores_file(expert_set: str, zoo: Path = Path("data/zoo")) -> Path:
    """Return the file of the base's and the set's experts' accuracies, as `benchmarks.score` reads it."""
    return (zoo / "variants" / expert_set if expert_set in LOSSES else zoo) / "scores.json"


def write_config(
    path: Path,
    expert_set: str,
    *,
    generated: Path,
    template: Path = Path("configs/demo.yaml"),
    skeletons: bool = True,
    seed: int = 0,
) -> None:
    """Write the template with the adapters of an expert set.

    Args:
        generated: gets the adapters that are made for the set, a folder each; those of another set or seed
            in it stay, those of the same are written anew, so not while a run reads them.
        template: names the ten experts of the shipped zoo; its settings are kept.
        skeletons: False leaves the adapters' skeletons out.
        seed: 0 has the fixed choice of experts, others draw one; random weights follow it too.

    Raises:
        InputError: for a set that there is not, a template without the ten experts, or an unbuilt variant.
    """
    chosen = chosen_experts(expert_set, seed)
    config = load_config(template)
    experts = {a.name: a.model_dump(mode="json", exclude_unset=True) for a in config.adapters}
    if missing := [task for task in TASKS if task not in experts]:
        raise InputError(f"{template}: no adapter {missing[0]!r}; expected the ten experts of data/zoo.")
    entries = _set_entries(expert_set, {task: experts[task] for task in TASKS}, chosen, seed, generated)
    if not skeletons:
        entries = [{key: entry[key] for key in entry if key != "skeletons"} for entry in entries]
    settings = read_mapping(template, ()) | {
        "base": config.base.model_dump(mode="json", exclude_unset=True),
        "adapters": entries,
    }
    with atomic_write(path) as partial:
        partial.write_text(yaml.safe_dump(settings, sort_keys=False, width=200), encoding="utf-8")


def _set_entries(
    expert_set: str, experts: dict[str, Entry], chosen: tuple[str, ...], seed: int, generated: Path
) -> list[Entry]:
    """Return the adapters of a set; `experts` are the ten by task."""
    folder = generated / f"{expert_set}-{seed}"
    if expert_set in LOSSES:
        own = [spec.task for spec in EXPERTS if spec.loss_on != expert_set]
        return [_of_variant(e, expert_set) if task in own else e for task, e in experts.items()]
    if expert_set in SUBSETS:
        return [experts[task] for task in chosen]
    if expert_set == "duplicates":
        copies = [
            {**experts[task], "name": f"{task}_copy{n + 1}"} for task in chosen for n in range(N_COPIES)
        ]
        return [*experts.values(), *copies]
    if expert_set == "contradiction":
        about = "names the feeling of a review, in labels of its own"
        opposite = _of_variant(experts["sentiment"], OPPOSITE) | {"name": OPPOSITE, "about": about}
        return [*experts.values(), opposite]
    if expert_set == "base_itself":
        new = {"name": expert_set, "about": "answers as the base does", "skeletons": [BASE_SKELETON]}
        return [*experts.values(), _generated(experts[chosen[0]] | new, folder, _zero, seed)]
    changed = chosen or (TASKS if expert_set == "random" else ())
    return [
        _generated(e, folder, CHANGES[expert_set], seed) if task in changed else e
        for task, e in experts.items()
    ]


def _of_variant(entry: Entry, variant: str) -> Entry:
    """Return the entry with the variant's weights; variants/ lies beside the zoo's adapters/."""
    source = Path(entry["source"])
    found = source.parents[1] / "variants" / variant / source.name
    if not (found / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{found}: no {WEIGHTS_FILE} in it. Build it with `python -m benchmarks.zoo.variants`."
        )
    return {**entry, "source": str(found)}


def _generated(entry: Entry, folder: Path, change: Change, seed: int) -> Entry:
    """Write an adapter with changed factors and return the entry with it in the original's place."""
    adapter = load_adapter(entry["source"])
    gen = torch.Generator().manual_seed(random.Random(f"{seed} {entry['name']}").getrandbits(63))
    tensors = {}
    for module, factors in adapter.modules.items():
        pair = change(factors, gen)
        for letter, tensor, old in zip("AB", pair, (factors.A, factors.B), strict=True):
            key = f"base_model.model.{module}.lora_{letter}.weight"
            tensors[key] = tensor.to(old.dtype).contiguous()
    made = folder / entry["name"]
    with atomic_write(made) as partial:
        partial.mkdir()
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        shutil.copyfile(Path(entry["source"]) / CONFIG_FILE, partial / CONFIG_FILE)
    return {**entry, "source": str(made)}


def random_factors(factors: Factors, gen: torch.Generator, times: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return Gaussian A and B whose product has `times` the Frobenius norm of the module's own."""
    A, B = (torch.randn(old.shape, generator=gen) for old in (factors.A, factors.B))
    wanted = times * torch.linalg.norm(factors.B.float() @ factors.A.float())
    return A, B * (wanted / torch.linalg.norm(B @ A))


def _broken_random(factors: Factors, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    return random_factors(factors, gen, RANDOM_TIMES)


def _broken_scaled(factors: Factors, _: torch.Generator) -> tuple[Tensor, Tensor]:
    return factors.A, SCALED_TIMES * factors.B


def _zero(factors: Factors, _: torch.Generator) -> tuple[Tensor, Tensor]:
    return factors.A, torch.zeros_like(factors.B)


CHANGES: dict[str, Change] = {
    "broken_random": _broken_random,
    "broken_scaled": _broken_scaled,
    "random": random_factors,
}
