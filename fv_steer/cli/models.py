"""`fv-steer models`."""

import click

from fv_steer.cli.common import echo_json


@click.command("models")
@click.option("--json", "as_json", is_flag=True)
def command(as_json: bool) -> None:
    """List model aliases and where they are on this machine."""
    from fv_steer.models import list_models

    rows = list_models()
    if as_json:
        echo_json(rows)
        return
    for row in rows:
        click.echo(f"{row['alias']:14} {row['model']:40} {row['path'] or 'not on this machine'}")
