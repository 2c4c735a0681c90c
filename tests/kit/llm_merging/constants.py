"""What is merged; a test writes models.json with folders in place of hub ids and revisions."""

import json
from pathlib import Path

_FOUND = json.loads((Path(__file__).parents[1] / "models.json").read_text())
BASE_MODEL_NAME, BASE_MODEL_REVISION_ID = _FOUND["base"]
LIST_MODELS = [tuple(pair) for pair in _FOUND["adapters"]]
EMPTY = _FOUND["empty"]
"""What loaded_models, loaded_configs and merged_model are before a method fills them: None or {}."""
