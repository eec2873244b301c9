"""Functions of a user's own, which settings name as <module>:<function>: imported, and held against their arguments."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def import_function(setting: str, name: str) -> Callable[..., Any]:
    """The function; its module is imported, and so run.

    Args:
        setting: whose value the name is, for messages.

    Raises:
        ValueError: there is no such module or function, the module cannot be imported, or it is no function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(setting, name), function)
    except AttributeError as error:
        raise ValueError(f"{setting}={name}: the module {module} has no {function!r}") from error
    if not callable(found):
        raise ValueError(f"{setting}={name}: {function!r} is of type {type(found).__name__}, expected a function")
    called: Callable[..., Any] = found
    return called


def import_module(setting: str, name: str) -> ModuleType:
    """The module of a function.

    Raises:
        ValueError: there is none, or it cannot be imported.
    """
    module = name.partition(":")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = "; is its folder on PYTHONPATH?" if module.startswith(error.name or module) else ""
        raise ValueError(f"{setting}={name}: {error}{where or f', which {module} imports'}") from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(f"{setting}={name}: importing {module} raised {describe_raised(error)}") from error


def check_arguments(what: str, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that the function does not take, or lacks; `what` opens the message."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function of C
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error


def describe_raised(error: BaseException) -> str:
    """An exception of a user's code in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ({error.filename}, line {error.lineno})"
    else:
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())[:300]
    return f"{type(error).__name__}: {text}{where}"
