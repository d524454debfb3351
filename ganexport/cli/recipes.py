"""``ganexport recipes``."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from ganexport.cli._console import json_option, print_json, results

#: What a trained model's folder holds beside its recipe and weights.
RECORD, PICTURE = "evaluation.json", "samples.png"


class RecipeRow(msgspec.Struct):
    """One recipe of the list.

    Attributes:
        name: What ``ganexport train`` takes.
        description: Of the recipe.
        architecture, objective: Registry keys.
        data: Default images.
        steps: Default length.
        trained: Whether weights come with it: then ``convert`` and ``generate`` take the name too.
        frechet: Measured Fréchet distance of those weights; None without.
        picture: Path of their sample grid; None without.
    """

    name: str
    description: str
    architecture: str
    objective: str
    data: str
    steps: int
    trained: bool
    frechet: float | None = None
    picture: str | None = None


@click.command(
    epilog="\b\nExamples:\n  ganexport recipes\n  ganexport recipes dcgan-mnist > mine.toml\n"
    "  ganexport recipes --grid models.png"
)
@click.argument("name", required=False)
@click.option(
    "--grid", metavar="F.png", type=click.Path(path_type=Path, dir_okay=False), help="Write one picture of all models."
)
@json_option
def command(name: str | None, grid: Path | None, as_json: bool) -> None:
    """List the recipes and trained models that come with ganexport, or print one recipe as TOML."""
    from ganexport.errors import UsageError, unknown_name
    from ganexport.recipe import FILE, models_folder, recipe_names

    if name is not None:
        if grid is not None:
            raise UsageError("--grid shows all trained models: leave the name out")
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
    if grid is not None:
        write_grid(grid, rows)
    if as_json:
        print_json(rows)
        return
    if grid is not None:
        click.echo(f"{grid}: samples of {', '.join(row.name for row in rows if row.picture)}")
        return
    from rich.table import Table

    table = Table("recipe", "architecture", "objective", "steps", "trained", "Fréchet", "what it is")
    for row in rows:
        distance = "" if row.frechet is None else f"{row.frechet:.1f}"
        trained = "yes" if row.trained else ""
        table.add_row(row.name, row.architecture, row.objective, str(row.steps), trained, distance, row.description)
    results().print(table)
    results().print(
        "trained: ganexport generate and convert take the name. Fréchet: distance to MNIST, as in the model's card."
    )


def list_recipes() -> list[RecipeRow]:
    """The recipes that come with ganexport; imports no torch."""
    from ganexport.recipe import FILE, models_folder, read_toml, recipe_names, resolve

    rows = []
    for name in recipe_names():
        folder = models_folder() / name
        recipe = resolve({"name": name, **read_toml(folder / FILE)}, name, components=False)
        trained = (folder / "weights.safetensors").is_file()
        record, picture = folder / RECORD, folder / PICTURE
        distance = msgspec.json.decode(record.read_bytes())["evaluation"]["frechet"] if record.is_file() else None
        rows.append(
            RecipeRow(
                name,
                recipe.description,
                recipe.architecture.name,
                " + ".join([recipe.objective.name, *(component.name for component in recipe.regularizers)]),
                recipe.data.source,
                recipe.training.steps,
                trained,
                distance,
                str(picture) if picture.is_file() else None,
            )
        )
    return rows


def _caption(row: RecipeRow) -> str:
    """In the letters that Pillow's built-in font has: ASCII."""
    return row.name if row.frechet is None else f"{row.name}, FD {row.frechet:.1f}"


def write_grid(path: Path, rows: list[RecipeRow]) -> None:
    """One picture with a labelled strip of samples a trained model.

    Raises:
        UsageError: Not a .png, or no model comes with samples.
        OutputError: Not writable, or the disk is full.
    """
    import io

    from PIL import Image, ImageDraw, ImageFont

    from ganexport.artifact import write_atomic
    from ganexport.errors import UsageError

    if path.suffix.lower() != ".png":
        raise UsageError(f"--grid {path}: the picture's name must end in .png")
    shown = [row for row in rows if row.picture is not None]
    if not shown:
        raise UsageError("--grid: no trained model comes with this installation")
    strips = []
    for row in shown:
        assert row.picture is not None
        with Image.open(row.picture) as picture:
            strips.append(picture.convert("L"))
    caption, margin = 20, 8
    columns = min(2, len(strips))
    lines = [strips[i : i + columns] for i in range(0, len(strips), columns)]
    pitch = max(strip.width for strip in strips) + margin
    height = sum(max(strip.height for strip in line) + caption + margin for line in lines)
    canvas = Image.new("L", (columns * pitch + margin, height + margin), 255)
    pen, font, top = ImageDraw.Draw(canvas), ImageFont.load_default(13), margin
    captions = iter(_caption(row) for row in shown)
    for line in lines:
        for column, strip in enumerate(line):
            left = margin + column * pitch
            pen.text((left, top), next(captions), fill=0, font=font)
            canvas.paste(strip, (left, top + caption))
        top += max(strip.height for strip in line) + caption + margin
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
