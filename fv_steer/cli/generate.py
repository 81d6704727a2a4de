"""`fv-steer generate`."""

from pathlib import Path

import click

from fv_steer.cli.common import check_scale, echo_json


@click.command("generate")
@click.option("--model", required=True)
@click.option("--pack", "pack_path", required=True, type=click.Path(path_type=Path))
@click.option("--scale", type=float)
@click.option("--mode", type=click.Choice(["dfv", "fv"]))
@click.option("--apply", "apply_", type=click.Choice(["last", "generation", "all"]))
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.argument("prompt")
def command(
    model: str,
    pack_path: Path,
    scale: float | None,
    mode: str | None,
    apply_: str | None,
    max_new_tokens: int,
    device: str,
    as_json: bool,
    prompt: str,
) -> None:
    """Generate greedily from PROMPT with HF transformers, steered."""
    check_scale(scale)
    if not prompt:
        raise click.BadParameter("the prompt is empty")
    from fv_steer.pack import check_fits, read_pack
    from fv_steer_hf import steer
    from offline_extract.engine import generate, load_model

    pack = read_pack(pack_path)
    loaded = load_model(model, device=device)
    check_fits(pack, loaded.info)
    ids = loaded.tokenizer(prompt)["input_ids"]
    with steer(loaded.model, pack, scale, mode=mode, apply=apply_):  # type: ignore[arg-type]
        text = loaded.tokenizer.decode(generate(loaded, [ids], max_new_tokens)[0], skip_special_tokens=True)
    if as_json:
        echo_json({"pack": pack.name, "digest": pack.digest, "prompt": prompt, "text": text})
    else:
        click.echo(text)
