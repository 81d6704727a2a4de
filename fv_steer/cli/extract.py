"""`fv-steer extract`."""

from pathlib import Path
from typing import Any

import click

from fv_steer.cli.common import check_scale, echo_json, evaluation_table, number_or_auto, progress_reporter
from fv_steer.errors import BadInputError, WeakPackError


@click.command("extract")
@click.option("--model", required=True, help="Alias, Hub id or local directory.")
@click.option("--task", required=True, help="A built-in task (`fv-steer tasks`), or a name for your own.")
@click.option("-o", "--output", "output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--dataset", type=click.Path(path_type=Path), help="Your word pairs: JSON, JSONL or CSV.")
@click.option("--instruction", "instructions", multiple=True, metavar="TEXT", help="Your instruction; repeatable.")
@click.option("--frame", "frames", multiple=True, metavar="WORDS", help="Each instruction's task-defining words.")
@click.option(
    "--source", type=click.Choice(["auto", "instruction", "icl", "instruction+icl"]), default="auto", show_default=True
)
@click.option("--format", "fmt", type=click.Choice(["qa", "chat"]), default="qa", show_default=True)
@click.option("--head-selection", type=click.Choice(["lrp", "aie", "random"]), default="lrp", show_default=True)
@click.option("--heads-from", type=click.Choice(["global", "task"]), default="task", show_default=True)
@click.option("--top-k", default="auto", show_default=True, callback=number_or_auto(int, "a whole number"))
@click.option("--scale", default="auto", show_default=True, callback=number_or_auto(float, "a number"))
@click.option("--samples", type=click.IntRange(1, 100_000), default=100, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--allow-weak", is_flag=True, help="Write the pack even if it does no better than its controls.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and digest as JSON.")
def command(
    output: Path,
    instructions: tuple[str, ...],
    frames: tuple[str, ...],
    fmt: Any,
    source: Any,
    as_json: bool,
    **options: Any,
) -> None:
    """Extract a steering pack: rank heads, average their outputs, measure on held-out words."""
    if len(instructions) != len(frames):
        raise BadInputError(f"{len(instructions)} --instruction but {len(frames)} --frame: give one frame for each")
    if output.is_dir() or not output.parent.is_dir():
        raise BadInputError(f"cannot write {output}: its folder {output.parent} does not exist")
    check_scale(options["scale"])
    from fv_steer.pack import write_pack
    from offline_extract.run import ExtractSettings, check_strength, extract
    from offline_extract.tasks import with_overrides

    pairs = list(zip(instructions, frames, strict=True))
    with_overrides(options["task"], options["dataset"], pairs)
    settings = ExtractSettings(
        instructions=tuple(pairs),
        format=fmt,
        source=None if source == "auto" else source,
        **options,
    )
    with progress_reporter() as progress:
        pack = extract(settings, progress)
    assert pack.manifest.evaluation is not None
    click.echo(pack.manifest.recipe.source_reason, err=True)
    click.echo(evaluation_table(pack.manifest.evaluation), err=True)
    try:
        check_strength(pack)
    except WeakPackError as weak:
        if not settings.allow_weak:
            raise
        click.echo(f"Warning: {weak}", err=True)
    write_pack(pack, output)
    click.echo(f"wrote {output}  digest {pack.digest[:12]}", err=True)
    if as_json:
        echo_json({"path": str(output), "digest": pack.digest, "manifest": pack.manifest.model_dump(mode="json")})
