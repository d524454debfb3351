"""``ganexport recipes``."""

from __future__ import annotations

import click
import msgspec

from ganexport.cli._console import json_option, print_json, results


class RecipeRow(msgspec.Struct):
    """One recipe of the list.

    Attributes:
        name: What ``ganexport train`` takes.
        description: Of the recipe.
        architecture, objective: Registry keys.
        data: Default images.
        steps: Default length.
        trained: Whether weights come with it: then ``convert`` and ``generate`` take the name too.
    """

    name: str
    description: str
    architecture: str
    objective: str
    data: str
    steps: int
    trained: bool


@click.command(epilog="\b\nExamples:\n  ganexport recipes\n  ganexport recipes dcgan-mnist > mine.toml")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the recipes and trained models that come with ganexport, or print one recipe as TOML."""
    from ganexport.errors import unknown_name
    from ganexport.recipe import FILE, models_folder, recipe_names

    if name is not None:
        if name not in recipe_names():
            raise unknown_name("recipe", name, recipe_names())
        text = (models_folder() / name / FILE).read_text(encoding="utf-8")
        if as_json:
            import tomllib

            print_json(tomllib.loads(text))
        else:
            click.echo(text, nl=False)
        return
    rows = list_recipes()
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table("recipe", "architecture", "objective", "data", "steps", "weights", "what it is")
    for row in rows:
        weights = "yes" if row.trained else ""
        table.add_row(row.name, row.architecture, row.objective, row.data, str(row.steps), weights, row.description)
    results().print(table)


def list_recipes() -> list[RecipeRow]:
    """The recipes that come with ganexport; imports no torch."""
    from ganexport.recipe import FILE, models_folder, read_toml, recipe_names, resolve

    rows = []
    for name in recipe_names():
        folder = models_folder() / name
        recipe = resolve({"name": name, **read_toml(folder / FILE)}, name, components=False)
        rows.append(
            RecipeRow(
                name,
                recipe.description,
                recipe.architecture.name,
                " + ".join([recipe.objective.name, *(component.name for component in recipe.regularizers)]),
                recipe.data.source,
                recipe.training.steps,
                (folder / "weights.safetensors").is_file(),
            )
        )
    return rows
