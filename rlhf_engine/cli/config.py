"""`rlhf config`: the settings, their meaning and their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_engine.cli.options import SetOption

config_app = typer.Typer(no_args_is_help=True, help="Show all settings, or the values in a file.")


@config_app.command()
def show(
    section: Annotated[
        str,
        typer.Argument(
            help="Section or setting to show, such as ppo, ppo.optim or ppo.kl_coef. Default: all except demo and figure."
        ),
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="YAML file whose values are shown. Default: the default values."),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Print every setting with its description, type and default, as YAML that can be used as a config file."""
    from rlhf_engine.config import RunConfig, load_config
    from rlhf_engine.config.describe import describe
    from rlhf_engine.config.schema import Section, unknown_key_message
    from rlhf_engine.demo.config import DemoRunConfig

    whole = load_config(config, overrides or (), kind=DemoRunConfig)
    shown: Section = whole if section else whole.without_demo()
    defaults: Section = DemoRunConfig() if section else RunConfig()
    names = section.split(".") if section else []
    for depth, name in enumerate(names):
        last = depth + 1 == len(names)
        path = ".".join(names[: depth + 1])
        if not last and not isinstance(vars(shown).get(name, shown), Section):
            raise ValueError(f"{path} is a setting, not a section; show it as {path}")
        known = [key for key, value in vars(shown).items() if last or isinstance(value, Section)]
        if name not in known:
            raise ValueError(unknown_key_message(path, name, known))
        if not isinstance(getattr(shown, name), Section):
            typer.echo(describe(shown, defaults, only=name), nl=False)
            return
        shown, defaults = getattr(shown, name), getattr(defaults, name)
    typer.echo(describe(shown, defaults), nl=False)


@config_app.callback()
def _group() -> None:
    """Keep `show` a subcommand: typer runs the only command of an app by the name of the app."""
