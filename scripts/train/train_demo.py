"""Train the small pipeline in the demo/ of a model folder, from scratch, on emoji (FLUX) or moving scenes (videos).

    .venv/bin/python scripts/train/train_demo.py ERTACache4Wan2.1
    .venv/bin/python scripts/train/train_demo.py ERTACache4FLUX --set transformer=2000 --out runs/quick
    .venv/bin/python scripts/train/train_demo.py ERTACache4CogVideoX-2B --measure

The components are those of the real pipeline; only the sizes differ. The stages (tokenizer, VAE, text encoders,
latents, transformer, …) are in scripts/train/recipes/, one recipe per model. Each stage resumes from its newest
checkpoint under --work. The results pages in common/docs/results/ give the times on 2 CPU cores.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import importlib
import json
from dataclasses import fields
from pathlib import Path

import torch
from transformers.utils import logging

from ertacache import UserError
from ertacache.cli.arguments import ArgumentParser, check_counts
from ertacache.demos.model_folder import load_model_folder
from ertacache.utils.errors import run_program

RECIPES = {
    "ERTACache4FLUX": "flux",
    "ERTACache4Wan2.1": "wan",
    "ERTACache4CogVideoX-2B": "cogvideox",
    "ERTACache4OpenSora1.2": "opensora",
}


def parse_recipe(recipe_class, changes):
    """Return the recipe with some of its numbers replaced.

    Args:
        recipe_class: The dataclass `Recipe` of a recipe's module.
        changes: Strings NAME=NUMBER.

    Raises:
        UserError: An unknown name, or a value that is not a number.
    """
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
    parser.add_argument("--out", type=Path, help="folder to save the pipeline in (default: demo/ of the model folder)")
    parser.add_argument("--work", type=Path, help="folder of the checkpoints (default: runs/demo-MODEL)")
    text = "steps of a stage, e.g. vae=2000 (default: the recipe's)"
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help=text)
    parser.add_argument(
        "--accuracy-prompts", type=int, default=100, help="held-out captions to measure the prompt accuracy on"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu or cuda (default: a GPU when there is one)")
    parser.add_argument("--measure", action="store_true", help="only measure prompt accuracy, of the pipeline in --out")
    args = parser.parse_args()
    check_counts(args, "accuracy_prompts")
    folder = args.folder.resolve()
    if folder.name not in RECIPES:
        raise UserError(f"{args.folder}: there is a recipe for {', '.join(RECIPES)}")
    logging.set_verbosity_error()  # first: some imports of the recipe warn
    module = importlib.import_module(f"recipes.{RECIPES[folder.name]}")
    recipe, out = parse_recipe(module.Recipe, args.set), args.out or folder / "demo"
    work = args.work or Path("runs") / f"demo-{RECIPES[folder.name]}"
    if not args.measure:
        torch.manual_seed(0)
        torch.set_flush_denormal(True)  # denormal numbers are slow on a CPU
        pipe = module.train(work, recipe, args.device)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.half()
        pipe.save_pretrained(out)
        if hasattr(module, "save_references"):
            module.save_references(pipe, work, out)
    pipe = load_model_folder(folder).load(str(out), args.device)
    print(json.dumps(module.measure(pipe, args.accuracy_prompts)))


if __name__ == "__main__":
    run_program(main)
