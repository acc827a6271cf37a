"""The command line ``lightning-influence``; arguments and configuration files are jsonargparse's.

A model and its data are named as in a LightningCLI configuration, ``--model my.Model --data my.Data``, or in the file of
one given with ``--config``. A file that leaves the classes to the script, as of ``LightningCLI(Model, Data)``, is read
together with ``--model`` and ``--data``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_influence import __version__
from lightning_influence.cli.configuration import parser_class
from lightning_influence.cli.outputs import printable
from lightning_influence.cli.trials import check, clean, proxy, tune
from lightning_influence.cli.verbs import attribute, compare, dynamics, inspect, report, select, suspects, tokens
from lightning_influence.errors import ConfigurationError, InfluenceError

VERBS: tuple[Callable[..., None], ...] = (
    inspect, attribute, report, tokens, check, proxy, suspects, dynamics, select, clean, compare, tune,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, 2 where it was used wrongly, or 1 after another error that the message explains.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        from jsonargparse import auto_cli
    except ImportError:
        print('lightning-influence: jsonargparse missing; pip install "lightning-influence[cli]"', file=sys.stderr)
        return 1
    if (directory := str(Path.cwd())) not in sys.path:  # as with python -m, so that the user's own modules are found
        sys.path.insert(0, directory)
    commands: dict[str, Any] = {verb.__name__: verb for verb in VERBS}
    options: dict[str, Any] = {
        "prog": "lightning-influence",
        "description": __doc__,
        "version": __version__,
        "as_positional": True,
    }
    try:
        auto_cli(commands, args=arguments, parser_class=parser_class(arguments), **options)
    except InfluenceError as error:
        print(printable(f"lightning-influence: {error}"), file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    return 0
