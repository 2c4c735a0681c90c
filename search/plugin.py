"""Find a user's own objective by its name in the config, `package.module:function`.

Knows Python's import system and the names of the shipped objectives; not what an objective computes.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from search.errors import InputError
from search.objective import OBJECTIVES, Objective, ObjectiveFunction

_FORM = "`package.module:function`, a function of (merged_logp, expert_logp, next_tokens)"


def load_objective(name: str) -> Objective:
    """Return a shipped objective's name as it is, or import the function that the name stands for.

    Modules in the working directory can be imported, as with `python -m`. Importing runs the module.

    Raises:
        InputError: if the name is of neither form, or what it names cannot be imported or called.
    """
    if name in OBJECTIVES:
        return name
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise InputError(
            f"objective.name: {name!r} is unknown; expected one of {', '.join(OBJECTIVES)}, or {_FORM}"
        )
    function = getattr(_import_user_module(name, module_name), function_name, None)
    if not callable(function):
        found = "nothing of that name" if function is None else f"{type(function).__name__} {function_name}"
        raise InputError(
            f"objective.name: {name!r}: found {found} in {module_name}; expected {_FORM}, "
            f"or one of {', '.join(OBJECTIVES)}"
        )
    return cast(ObjectiveFunction, function)


def _import_user_module(name: str, module_name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # stays: what the function imports when it is called comes from there too
    try:
        return import_module(module_name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"objective.name: {name!r}: importing {module_name} from {here} or the installed packages gave "
            f"{reason}; expected {_FORM}, or one of {', '.join(OBJECTIVES)}"
        ) from error
