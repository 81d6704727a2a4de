"""`fv-steer eval`."""

from pathlib import Path
from typing import Any

import click

from fv_steer.cli.common import check_scale, echo_json, evaluation_table, progress_reporter


@click.command("eval")
@click.option("--pack", "pack_path", required=True, type=click.Path(path_type=Path))
@click.option("--model", help="Default: the pack's base model.")
@click.option("--dataset", type=click.Path(path_type=Path), help="Your words; default: the task's held-out words.")
@click.option("--mode", type=click.Choice(["dfv", "fv"]), help="Show one mode only.")
@click.option("--scale", type=float)
@click.option("--top-k", type=int)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def command(pack_path: Path, model: str | None, mode: str | None, as_json: bool, **options: Any) -> None:
    """Accuracy on held-out words: unsteered, source prompt, DFV, FV, random heads."""
    check_scale(options["scale"])
    from fv_steer.models import ALIASES, EMBEDDED
    from fv_steer.pack import read_pack
    from offline_extract.run import evaluate_pack

    pack = read_pack(pack_path)
    base = pack.manifest.model.id
    model = model or (EMBEDDED if base == ALIASES[EMBEDDED] else base)
    with progress_reporter() as progress:
        result = evaluate_pack(pack, model, progress=progress, **options)
    if as_json:
        content = result.model_dump(mode="json")
        if mode:
            content.pop("fv" if mode == "dfv" else "dfv")
        echo_json({"pack": pack.name, "digest": pack.digest, **content})
    else:
        hidden = {"dfv": "FV", "fv": "DFV"}.get(mode or "")
        lines = evaluation_table(result).splitlines()
        click.echo("\n".join(line for line in lines if hidden is None or line.split()[0] != hidden))
