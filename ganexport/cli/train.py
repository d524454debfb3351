"""``ganexport train``."""

from __future__ import annotations

import os
import shlex

import click

from ganexport.cli._console import json_option, print_json, remarks


@click.command(
    epilog="""\b
Examples:
  ganexport train dcgan-mnist --out digits
  ganexport train dcgan-mnist --data mnist/ --set training.steps=4000 --tune --out digits
  ganexport train --resume --out digits
  ganexport train dcgan-mnist --init-from digits --freeze-d 1 --data few/ --out tuned
  torchrun --nproc-per-node 4 -m ganexport.cli train dcgan-mnist --out digits
"""
)
@click.argument("recipe", required=False)
@click.option("--data", metavar="D", help="Images: a name, idx files, a folder of pictures, .npz or .npy.")
@click.option("--out", metavar="RUN", type=click.Path(), help="The run's folder.  [default: runs/RECIPE]")
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipe; repeatable.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in RUN.")
@click.option("--rollback", is_flag=True, help="On divergence go back to the last checkpoint at half the rate.")
@click.option(
    "--init-from", metavar="SOURCE", help="Start from the weights of a run, trained model or file, as far as they fit."
)
@click.option(
    "--freeze-d", type=click.IntRange(0), metavar="K", help="Do not train the K discriminator stages next to the image."
)
@click.option("--tune", is_flag=True, help="First time precisions, compilation and threads here; take the fastest.")
@click.option("--tune-only", is_flag=True, help="Only print the tuner's table.")
@click.option("--dry-run", is_flag=True, help="Check recipe, data and networks; write nothing.")
@click.option("--download", is_flag=True, help="Allow fetching a named data set.")
@json_option
def command(
    recipe: str | None,
    data: str | None,
    out: str | None,
    sets: tuple[str, ...],
    resume: bool,
    rollback: bool,
    init_from: str | None,
    freeze_d: int | None,
    tune: bool,
    tune_only: bool,
    dry_run: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Train a GAN from RECIPE (a name from `ganexport recipes`, or a TOML file).

    The resolved recipe is printed and saved before training starts. SIGTERM or Ctrl-C writes a checkpoint and
    stops; --resume goes on bit for bit (on a CPU).
    """
    from ganexport.cli._torch import require_training

    require_training()
    from ganexport.training.api import train
    from ganexport.training.memory import keep_freed_memory
    from ganexport.training.progress import ConsoleReporter

    keep_freed_memory()

    result = train(
        recipe,
        data=data,
        out=out,
        sets=sets,
        resume=resume,
        rollback=rollback,
        init_from=init_from,
        freeze_d=freeze_d,
        tune=tune,
        tune_only=tune_only,
        dry_run=dry_run,
        download=download,
        reporter=ConsoleReporter(remarks()),
    )
    if os.environ.get("RANK", "0") != "0":  # under torchrun process 0 speaks for all
        return
    if as_json:
        print_json(result)
        return
    sizes = ", ".join(f"{name} {count:,} parameters" for name, count in result.parameters.items())
    if dry_run:
        click.echo(f"dry run: everything fits together ({sizes}); nothing was written")
    elif tune_only:
        chosen = next(row for row in result.tuning if row["chosen"])
        click.echo(f"fastest sound settings here: {chosen['name']}; nothing was trained")
    elif not result.already_finished:
        click.echo(f"{result.run}: {result.step} steps in {result.seconds:.1f} s")
        named = shlex.quote(str(result.run))
        made = shlex.quote(f"{result.run}-onnx")
        click.echo(
            f"look at {result.run}/samples and {result.run}/curves.png; "
            f"next: ganexport convert {named} --to onnx -o {made}"
        )
