"""What the commands read of a LightningCLI configuration file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from yaml import YAMLError  # type: ignore[import-untyped]

from lightning_influence.errors import ConfigurationError


def _own_part(content: Any, keys: set[str], classes: Mapping[str, str | None]) -> dict[str, Any]:
    """What a command reads of a LightningCLI configuration, whose trainer, optimizer and so on are not its concern.

    Args:
        content: of the file.
        keys: names of the command's arguments.
        classes: of model and data where the command line names them.

    Raises:
        ConfigurationError: a model or data without a class, or nothing that the command reads.
    """
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"the configuration is a {type(content).__name__}; it has to map names to values.")
    content = {**content, **(content.get("fit") or {})}  # as of one file for all of LightningCLI's subcommands
    own = {key: value for key, value in content.items() if key in keys and value is not None}
    if "log" in keys and (log := _recorded_to(content)) is not None:
        own.setdefault("log", log)
    if not own:
        raise ConfigurationError(
            f"the configuration has {', '.join(map(str, content)) or 'nothing'}, but no model or data."
        )
    for name in own.keys() & {"model", "data"}:
        section = own[name]
        if isinstance(section, Mapping) and not section.keys() & {"class_path", "init_args"}:
            if classes.get(name) is None:
                raise ConfigurationError(
                    f"the configuration gives the arguments of {name} but no class, as LightningCLI(Model, Data) writes it; "
                    f"name the class: --{name} my.{name.title()}"
                )
            own[name] = {"class_path": classes[name], "init_args": dict(section)}
    return own


def _recorded_to(content: Mapping[str, Any]) -> str | None:
    """The directory of the log that a configuration's `InfluenceCallback` writes; None where it has none."""
    callbacks = (content.get("trainer") or {}).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, Mapping) and str(callback.get("class_path", "")).endswith("InfluenceCallback"):
            options = callback.get("init_args") or {}
            return options.get("log") or options.get("dirpath")
    return None


def parser_class(arguments: Sequence[str]) -> type[Any]:
    """Jsonargparse's parser, except that of a configuration file it reads the command's own part."""
    from jsonargparse import ArgumentParser, get_loader

    # a file's init args belong to the class that the command line names, before or after it
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("model", "data"):
        scan.add_argument(f"--{name}", f"--{name}.class_path", dest=name, nargs="?")
    classes = vars(scan.parse_known_args(arguments)[0])

    class Parser(ArgumentParser):
        def parse_string(self, content: str, *rest: Any, **options: Any) -> Any:
            if not any(action.dest == "subcommand" for action in self._actions):
                keys = {action.dest for action in self._actions if action.option_strings}
                keys.discard("trainer")  # of the whole run
                try:
                    loaded = get_loader("yaml")(content)
                except YAMLError as error:
                    raise ConfigurationError(f"the configuration is not YAML: {error}") from error
                content = json.dumps(_own_part(loaded, keys, classes))
            return super().parse_string(content, *rest, **options)

    return Parser
