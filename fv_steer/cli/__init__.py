"""The command line `fv-steer`. Commands load their own module when they run, so `--help` loads no torch."""

import importlib
import sys

import click

from fv_steer._version import __version__
from fv_steer.errors import FvSteerError

#: command -> (module under fv_steer.cli, one-line help)
_LAZY = {
    "extract": ("extract", "Extract a steering pack for a task."),
    "eval": ("evaluate", "Measure a pack on held-out words."),
    "inspect": ("inspect", "Show what is in a pack."),
    "tasks": ("tasks", "List the built-in tasks, or show one."),
    "models": ("models", "List model aliases and where they are on this machine."),
    "generate": ("generate", "Generate with HF transformers, steered by a pack."),
    "serve": ("serve", "Serve a model with vLLM and steering packs."),
}


class _LazyGroup(click.Group):
    """Lists commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_LAZY)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LAZY:
            return None
        module, _ = _LAZY[cmd_name]
        command: click.Command = importlib.import_module(f"fv_steer.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _LAZY.items()])


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fv-steer")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Make a task available to a model without the prompt that asks for it."""
    ctx.obj = debug


def main() -> None:
    """Run the command line; exit 0 done, 1 the work failed, 2 bad usage or bad input."""
    try:
        cli(standalone_mode=False, obj=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Aborted.", err=True)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except FvSteerError as error:
        if "--debug" in sys.argv:
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        click.echo(f"Error: {type(error).__name__}: {error} (run with --debug for the traceback)", err=True)
        sys.exit(1)
