"""`garden server`: one flag for each field of Config, generated from it so that none can be forgotten."""

from __future__ import annotations

import inspect
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BeforeValidator

from garden_py.cli.reference_flags import REFERENCE_FLAGS, translate
from garden_py.config import Config, load_config
from garden_py.model.errors import GardenError, InvalidRequest

EXIT_USAGE = 2


def server(**flags: Any) -> None:
    """Run the container server in the foreground.

    Settings come from defaults, then --config FILE.toml, then GARDEN_* variables (GARDEN_STATE_DIR for
    --state-dir), then flags; later ones win. The server prints one line when it is ready. SIGTERM stops it;
    containers keep running and are taken over by the next server on the same --state-dir. A listening unix socket
    passed by systemd is served in place of --listen.

    Several servers on one host need different --state-dir, --run-dir, --network-pool, --network-pool-v6 (if any),
    --port-pool-start and --uid-pool-start.
    """
    import asyncio

    from garden_py.observe.log import (
        configure_logging,
    )  # first: it imports structlog without what we do not use

    # isort: split
    from garden_py import wiring

    file = flags.pop("config", None)
    try:
        given = {name: value for name, value in flags.items() if value not in (None, [], "")}
        config = load_config(translate(given), file=file)
        configure_logging(config.log_level, config.log_format)
        asyncio.run(wiring.serve(config))
    except InvalidRequest as error:
        for violation in error.violations:
            typer.echo(f"garden server: {_as_written(violation.field)}: {violation.problem}", err=True)
        raise typer.Exit(EXIT_USAGE) from error
    except GardenError as error:
        typer.echo(f"garden server: {error}", err=True)
        raise typer.Exit(1) from error
    except PermissionError as error:
        if os.geteuid() == 0:
            raise
        typer.echo(f"garden server: {error}: containers need root", err=True)
        raise typer.Exit(1) from error


def _as_written(field: str) -> str:
    """A field of a violation as the user has written it: a flag, or what is in the file or the environment."""
    return "--" + field.replace("_", "-") if field in server.__annotations__ else field


def _parameters() -> list[inspect.Parameter]:
    """`--config`, one option per field, then other names of some; None stands for "not given"."""
    found = [_option("config", Path | None, "Read settings from this TOML file (keys as flags).", None)]
    for name, field in Config.model_fields.items():
        if typing.get_origin(field.annotation) is dict:
            continue  # a table of the configuration file
        default = "" if field.default in ("", (), None) else f" [default: {field.default}]"
        # What is parsed before it is checked comes as text.
        kind = str | None if field.metadata and _is_parsed(field.metadata) else _flag_type(field.annotation)
        found.append(_option(name, kind, f"{field.description}{default}", None))
    for flag in REFERENCE_FLAGS:
        default = flag.default and f" [default: {flag.default}]"
        found.append(
            _option(flag.name, str | None, f"Name in other Garden servers. {flag.text}{default}", None)
        )
    return found


def _is_parsed(metadata: list[Any]) -> bool:
    return any(isinstance(each, BeforeValidator) for each in metadata)


def _flag_type(annotation: Any) -> Any:
    """The type of a flag: pydantic validates, so most are text; booleans are switches; tuples may be repeated."""
    if annotation is bool:
        return bool | None
    if typing.get_origin(annotation) is tuple:
        return list[str] | None
    if annotation in (int, float) and not isinstance(annotation, types.UnionType):
        return annotation | None
    return str | None


def _option(name: str, kind: Any, text: str, default: object) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    option = typer.Option(flag, help=text, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


server.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
server.__annotations__ = {p.name: p.annotation for p in _parameters()}
