"""`fv-steer inspect`."""

from pathlib import Path

import click

from fv_steer.cli.common import echo_json, evaluation_table


@click.command("inspect")
@click.argument("pack_path", metavar="PACK", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True)
def command(pack_path: Path, as_json: bool) -> None:
    """Show a pack's digest, model, recipe, recommendation, evaluation and heads."""
    from fv_steer.pack import read_pack

    pack = read_pack(pack_path)
    manifest = pack.manifest
    heads = pack.heads.tolist()
    if as_json:
        echo_json({"digest": pack.digest, "manifest": manifest.model_dump(mode="json"), "heads": heads})
        return
    model, recipe, use = manifest.model, manifest.recipe, manifest.recommended
    click.echo(f"{manifest.name}  {pack.digest}")
    click.echo(f"  {manifest.description}")
    click.echo(f"  model     {model.id} ({model.model_type}, {model.n_layers} layers x {model.n_heads} heads)")
    click.echo(f"  recipe    {recipe.source}, {recipe.head_selection} heads, {recipe.samples} samples, {recipe.dtype}")
    click.echo(f"  dataset   {recipe.dataset.name} ({recipe.dataset.licence})")
    click.echo(f"  use       {use.mode}, scale {use.scale:g}, apply {use.apply}; FV after layer {use.layer}")
    click.echo("  heads     " + " ".join(f"{layer}.{head}" for layer, head in heads))
    if manifest.evaluation:
        click.echo(evaluation_table(manifest.evaluation))
