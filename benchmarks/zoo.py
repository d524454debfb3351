"""Make a trained model's folder from a finished run: weights, picture, evaluation, card.

    ganexport train models/lsgan-mnist --data mnist/ --out run
    python -m benchmarks.zoo run --data mnist/
    python -m benchmarks.zoo --cards          # writes the cards and the list again from evaluation.json

The run must be of the recipe as it stands in models/, with the ``--set``s that are given here too (machine settings
apart). Everything in a card is read from
evaluation.json, which holds what was measured on the packed float16 weights, not on the run's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
RECORD = "evaluation.json"
PICTURE = "samples.png"
#: Recipe keys that say where and how fast a run was made, not what was learnt.
MACHINE = {
    "data.source", "data.workers", "training.threads", "training.device", "training.checkpoint_every", "training.keep",
    "logging.every", "logging.sample_every", "logging.samples", "logging.tensorboard", "description",
}  # fmt: skip
CLASSES = 10
DOCUMENT = ROOT / "docs" / "quality.md"
MARK = "<!-- models: python -m benchmarks.zoo --cards -->"


def main(arguments: list[str] | None = None) -> int:
    """Pack one run, or render the cards again."""
    parser = argparse.ArgumentParser(prog="benchmarks.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--data", default="mnist-10k", help="what the run was trained on; compared with, too")
    parser.add_argument("-n", type=int, default=10_000, help="generated images")
    parser.add_argument("--cards", action="store_true", help="only render the cards from their records")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="as given to ganexport train")
    options = parser.parse_args(arguments)
    if options.cards:
        for record in sorted(MODELS.glob(f"*/{RECORD}")):
            write_card(record.parent)
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if options.run is None:
        parser.error("name a run, or give --cards")
    pack(options.run, options.data, options.n, options.sets)
    return 0


def pack(run: Path, data: str, count: int, sets: list[str]) -> None:
    """Write weights, picture, record and card of a run into its model's folder."""
    import torch
    from safetensors.torch import save_file

    from ganexport.checkpoint import WEIGHTS, load_run
    from ganexport.recipe import load_recipe, to_plain
    from ganexport.training.metrics import read_metrics

    loaded = load_run(run)
    folder = MODELS / loaded.name
    recipe = to_plain(load_recipe(str(folder), sets))
    different = _differences(_flat(recipe), _flat(loaded.recipe))
    if different:
        sys.exit(f"{run} is not a run of {folder.name}: {'; '.join(different)}")
    half = {name: _half(tensor).contiguous() for name, tensor in loaded.module.state_dict().items()}
    save_file(half, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # the library makes it its owner's alone
    lines = [line for line in read_metrics(run) if "images_per_second" in line]
    rates = [line["images_per_second"] for line in lines]
    batch, steps = loaded.recipe["training"]["batch_size"], loaded.step
    facts = {
        "steps": steps,
        "images": steps * batch,
        "training_minutes": steps * batch / float(np.median(rates)) / 60.0,
        "threads": loaded.recipe["training"]["threads"],
        "parameters": sum(p.numel() for p in loaded.module.parameters()),
        "weights_bytes": (folder / WEIGHTS).stat().st_size,
        "torch": torch.__version__.partition("+")[0],
    }
    record = {**measure(folder, data, count, facts), "sets": sets}
    (folder / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    write_card(folder)


def _half(tensor: Any) -> Any:
    """float16 where that keeps the values; counters and anything out of its range stay as they are."""
    import torch

    if not tensor.is_floating_point() or tensor.abs().max() > torch.finfo(torch.float16).max:
        return tensor
    return tensor.half()


def measure(folder: Path, data: str, count: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the packed weights; draw the picture."""
    from ganexport.data import open_images
    from ganexport.environment import describe
    from ganexport.evaluation.evaluate import collect, evaluate_images
    from ganexport.evaluation.source import open_generator
    from ganexport.explore.latents import classes_of
    from ganexport.explore.picture import grid, write_png

    real = open_images(data)
    with open_generator(folder) as generator:
        classes = classes_of(generator.spec)
        fake = collect(lambda start, n: generator.generate(n, 0, start=start), count, 250)
        rows = CLASSES
        labels = np.repeat(np.arange(rows), 16).tolist() if classes == CLASSES else None
        picture = generator.generate(rows * 16, 1, labels=labels)
    write_png(folder / PICTURE, grid(picture.reshape(rows, 16, *picture.shape[1:])))
    evaluation = evaluate_images(fake, real.array(), source=folder.name, data=f"{real.name} (train)", seed=0)
    return {
        "model": folder.name,
        "training": facts,
        "evaluation": msgspec.to_builtins(evaluation),
        "environment": describe(),
        "conditional": classes,
    }


def write_card(folder: Path) -> None:
    """The model card, from the record and the recipe."""
    import tomllib

    record = msgspec.json.decode((folder / RECORD).read_bytes())
    recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    batch = recipe["training"].get("batch_size", 64)
    name = record["model"]
    facts, found, machine = record["training"], record["evaluation"], record["environment"]
    low, high = found["frechet_interval"]
    copies = found["memorisation"]
    shares = " ".join(f"{share:.1%}" for share in found["class_shares"])
    sets = "".join(f" --set {setting}" for setting in record["sets"])
    layout = "One row a class" if record["conditional"] else "Samples of seed 1"
    text = f"""# {name}

{recipe["description"]}.

![{layout}]({PICTURE})

{layout}, as they come: nothing was picked.

| what | value |
|---|---|
| trained on | MNIST, all 60,000 training images |
| steps | {facts["steps"]:,} of batch {batch} ({facts["images"]:,} images seen) |
| time | {facts["training_minutes"]:.0f} minutes at the run's median rate, {facts["threads"]} CPU \
thread{"s" if facts["threads"] > 1 else ""}, {machine["cpu"]["model"]} |
| weights | {facts["parameters"]:,} parameters, {facts["weights_bytes"] / 1e6:.2f} MB, float16, the moving average |
| Fréchet distance | {found["frechet"]:.1f} (95%: {low:.1f} to {high:.1f}) |
| kernel distance | {found["kernel"][0]:.3f} ± {found["kernel"][1]:.3f} |
| precision, recall | {found["precision"]:.3f}, {found["recall"]:.3f} |
| density, coverage | {found["density"]:.3f}, {found["coverage"]:.3f} |
| class shares, 0 to 9 | {shares} |
| mean confidence | {found["confidence"]:.3f} |
| near-copies of training images | {copies["copies"]:.1%} (1% by chance) |

{found["generated"]:,} images of seed 0 against {found["real"]:,} of {found["data"]}; features: {found["backbone"]}.
The figures are those of the shipped float16 weights.

```bash
ganexport generate {name} -n 64 -o grid.png
ganexport convert {name} --to onnx -o {name}
ganexport evaluate {name} --data mnist/   # the figures above
ganexport train {name} --data mnist/ --set training.threads={facts["threads"]}{sets} --out run
```

`mnist/` is a folder with MNIST's four idx files. Trained with torch {facts["torch"]}. Apache-2.0, as ganexport; MNIST
is by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, CC BY-SA 3.0.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def with_table(text: str) -> str:
    """The document with the table of all trained models between its two marks."""
    rows = [
        "| model | steps | weights | Fréchet distance | coverage | smallest class | confidence |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(MODELS.glob(f"*/{RECORD}")):
        record = msgspec.json.decode(path.read_bytes())
        facts, found = record["training"], record["evaluation"]
        rows.append(
            f"| [{record['model']}](../models/{record['model']}/README.md) | {facts['steps']:,} "
            f"| {facts['weights_bytes'] / 1e6:.2f} MB | {found['frechet']:.1f} | {found['coverage']:.3f} "
            f"| {min(found['class_shares']):.1%} | {found['confidence']:.3f} |"
        )
    before, _, rest = text.partition(MARK)
    _, end, after = rest.partition("<!-- /models -->")
    return f"{before}{MARK}\n" + "\n".join(rows) + f"\n{end}{after}"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}.{key}" if path else key).items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{path}.{i}").items()}
    return {path: value}


def _differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    keys = [key for key in {*wanted, *found} if key not in MACHINE and wanted.get(key) != found.get(key)]
    return [f"{key}: {found.get(key)} in the run, {wanted.get(key)} in the recipe" for key in sorted(keys)]


if __name__ == "__main__":
    sys.exit(main())
