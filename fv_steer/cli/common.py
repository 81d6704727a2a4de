"""What commands share: progress, the evaluation table, JSON output."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fv_steer.schema import Evaluation, Score

ARMS = (
    ("unsteered", "unsteered zero-shot"),
    ("source_prompt", "source prompt"),
    ("dfv", "DFV"),
    ("fv", "FV"),
    ("random_heads", "random heads"),
)


def number_or_auto(kind: Callable[[str], Any], what: str) -> Callable[..., Any]:
    """A click callback: `auto` is None, anything else must parse as `kind`."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        if value is None or value == "auto":
            return None
        try:
            return kind(value)
        except ValueError:
            raise click.BadParameter(f"{value!r} is neither {what} nor 'auto'") from None

    return callback


def check_scale(value: float | None) -> float | None:
    """A scale as requests take it; raises BadParameter otherwise."""
    from fv_steer.schema import MAX_SCALE

    if value is not None and not -MAX_SCALE <= value <= MAX_SCALE:
        raise click.BadParameter(f"--scale must be a finite number between -{MAX_SCALE:g} and {MAX_SCALE:g}")
    return value


@contextmanager
def progress_reporter() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage on a terminal, a plain line per finished stage otherwise; all on stderr."""
    if not sys.stderr.isatty():
        yield _plain_progress
        return
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            bars[stage] = tqdm(total=total, desc=f"{stage:12}", file=sys.stderr, ncols=79)
        bars[stage].n = min(done, total)
        bars[stage].refresh()

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def _plain_progress(stage: str, done: int, total: int) -> None:
    if done >= total:
        click.echo(f"{stage}: {done}/{total}", err=True)


def evaluation_table(result: "Evaluation") -> str:
    """The arms with 95% intervals, as text."""
    lines = [f"{'held-out words: ' + str(result.n):24}{'first token':>22}{'whole answer':>22}"]
    for field, title in ARMS:
        measured = getattr(result, field)
        lines.append(f"  {title:22}{_cell(measured.top1):>22}{_cell(measured.exact):>22}")
    return "\n".join(lines)


def _cell(score: "Score") -> str:
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def echo_json(value: Any) -> None:
    """Machine-readable output on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
