"""`fv-steer tasks`."""

import click

from fv_steer.cli.common import echo_json


@click.command("tasks")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True)
def command(name: str | None, as_json: bool) -> None:
    """List the built-in tasks, or show one with its instructions."""
    from offline_extract.tasks import load_task, task_names

    tasks = [load_task(n) for n in ([name] if name else task_names())]
    if as_json:
        rows = [
            {
                "name": t.name,
                "description": t.description,
                "pairs": len(t.pairs),
                "source": t.source,
                "licence": t.licence,
                "instructions": [i.model_dump() for i in t.instructions],
            }
            for t in tasks
        ]
        echo_json(rows[0] if name else rows)
        return
    for task in tasks:
        click.echo(f"{task.name:20} {len(task.pairs):4} pairs  {task.description}")
    if name:
        click.echo(f"source: {tasks[0].source} ({tasks[0].licence})")
        for instruction in tasks[0].instructions:
            click.echo(f"  {instruction.text}  [frame: {instruction.frame}]")
        for pair in tasks[0].pairs[:5]:
            click.echo(f"  {pair.input} -> {pair.target}")
