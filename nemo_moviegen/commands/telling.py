"""Commands that tell: what recipes say, what they need, where a run stands."""

import json
from pathlib import Path


def recipes_command(options):
    """All recipes, or one of them as YAML."""
    import nemo_moviegen.curation.recipe as curation
    import recipes
    from nemo_moviegen import tables
    from nemo_moviegen.recipe import override, recipe_yaml

    if not options.recipe:
        tables.show(tables.recipes_table())
        tables.show(tables.curation_table())
    elif options.recipe in recipes.CURATION:
        recipe = recipes.get_curation(options.recipe)
        print(recipe_yaml(curation.override(recipe, options.settings)), end="")
    else:
        print(recipe_yaml(override(tables.find_recipe(options.recipe), options.settings)), end="")


def count_command(options):
    """Parameters and FLOPs of a size or of a recipe's model, part by part."""
    from nemo_moviegen import tables

    size, largest = tables.find_size(options.name)
    counted = tables.count(size, options.latent or largest, options.text_tokens)
    if options.json:
        print(json.dumps(counted, indent=2))
    else:
        tables.show(tables.count_table(counted))
        print(tables.count_notes(counted))


def plan_command(options):
    """Say what a recipe needs and how long it takes on a cluster."""
    from nemo_moviegen.planning.command import run_plan
    from nemo_moviegen.recipe import TaeRecipe, override
    from nemo_moviegen.tables import find_recipe

    if options.validate:
        run_plan(None, options)
        return
    if not options.recipe:
        raise ValueError("plan needs a recipe (`moviegen recipes` lists them), or --validate")
    recipe = override(find_recipe(options.recipe), options.settings)
    if isinstance(recipe, TaeRecipe):
        raise ValueError(f"{recipe.name} trains an autoencoder; plan knows transformers")
    run_plan(recipe, options)


def progress_command(options):
    """Make the page of a run folder and print one screen."""
    from rich.console import Console

    from nemo_moviegen.live.screen import show

    print(show(options.run_folder, Console()))


def report_command(options):
    """Write the page about a demo."""
    from nemo_moviegen.report import write_report

    print(write_report(options.folder, options.output or Path(options.folder) / "report.html"))
