"""Train the small pipeline that ships in a model folder's demo/, from nothing, on procedural scenes.

    .venv/bin/python scripts/train/train_demo.py ERTACache4Wan2.1
    .venv/bin/python scripts/train/train_demo.py ERTACache4FLUX --set transformer=2000 --out runs/quick
    .venv/bin/python scripts/train/train_demo.py ERTACache4CogVideoX-2B --measure

The components are those of the real pipeline; only the sizes differ. The stages (tokenizer, VAE, text encoders,
latents, transformer, …) are in scripts/train/recipes/, one recipe a model; each is resumed from its newest checkpoint under
--work. Times on 2 CPU cores are in common/docs/results.md.
"""

import importlib
import json
from dataclasses import fields
from pathlib import Path

import torch
from transformers.utils import logging

from ertacache import UserError
from ertacache.demos.model_folder import load_program
from ertacache.utils.errors import ArgumentParser, run_program

RECIPES = {
    "ERTACache4FLUX": "flux",
    "ERTACache4Wan2.1": "wan",
    "ERTACache4CogVideoX-2B": "cogvideox",
    "ERTACache4OpenSora1.2": "opensora",
}


def parse_recipe(recipe_class, changes):
    """The recipe with its numbers changed by NAME=VALUE words."""
    names = [field.name for field in fields(recipe_class)]
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in names or not value.isdigit():
            raise UserError(f"--set {change}: give NAME=NUMBER with a name of {', '.join(names)}")
        values[name] = int(value)
    return recipe_class(**values)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help=f"model folder: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, help="where the pipeline is saved (default: demo/ of the model folder)")
    parser.add_argument("--work", type=Path, help="checkpoints (default: runs/demo-MODEL)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="steps of a stage, and the like")
    parser.add_argument("--accuracy-prompts", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", action="store_true", help="only measure the prompt accuracy of the one in --out")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if folder.name not in RECIPES:
        raise UserError(f"{args.folder}: there is a recipe for {', '.join(RECIPES)}")
    logging.set_verbosity_error()  # before the recipe imports what warns on import
    module = importlib.import_module(f"recipes.{RECIPES[folder.name]}")
    recipe, out = parse_recipe(module.Recipe, args.set), args.out or folder / "demo"
    if not args.measure:
        torch.manual_seed(0)
        pipe = module.train(args.work or Path("runs") / f"demo-{RECIPES[folder.name]}", recipe, args.device)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.half()
        pipe.save_pretrained(out)
    pipe = load_program(folder).load(str(out), args.device)
    print(json.dumps(module.measure(pipe, args.accuracy_prompts)))


if __name__ == "__main__":
    run_program(main)
