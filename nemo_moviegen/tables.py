"""What `moviegen recipes` and `moviegen count` print. No torch."""

import recipes
from nemo_moviegen import flops
from nemo_moviegen.cluster import read_cluster
from nemo_moviegen.recipe import TaeRecipe, read_recipe
from nemo_moviegen.settings import nearest
from nemo_moviegen.sizes import SIZES


def find_recipe(name):
    """The recipe of that name, or of a YAML file that `recipe_yaml` wrote; ValueError for an unknown name."""
    return read_recipe(name) if name.endswith((".yaml", ".yml")) else recipes.get(name)


def find_size(name):
    """(size, latent to count) for the name of a size, or of a recipe that trains a transformer.

    The latent is the recipe's; for a size the largest of its recipes, else what its position tables take.
    """
    built = {recipe.name: recipe for recipe in map(recipes.get, recipes.RECIPES)}
    latents = {n: _latent(recipe) for n, recipe in built.items() if not isinstance(recipe, TaeRecipe)}
    if name in SIZES:
        size = SIZES[name]
        tables = (size.max_frames, size.max_height, size.max_width)
        patch = (size.patch_frames, size.patch_height, size.patch_width)
        of_recipes = [latent for n, latent in latents.items() if built[n].size.name == name]
        return size, max(of_recipes, default=tuple(a * b for a, b in zip(tables, patch, strict=True)))
    known = [*SIZES, *latents]
    if name not in recipes.RECIPES and not name.endswith((".yaml", ".yml")):
        raise ValueError(f"no transformer size and no recipe of one is called {name!r}{nearest(name, known)}")
    recipe = find_recipe(name)
    if isinstance(recipe, TaeRecipe):
        raise ValueError(f"{name} trains an autoencoder; count knows transformers: {', '.join(known)}")
    return recipe.size, _latent(recipe)


def recipes_table():
    """A rich table with a row for each recipe, those of one file together."""
    table = _table("recipe", "cluster", "ranks", "layout", "global batch", "steps", "what")
    before = ""
    for name, function in recipes.RECIPES.items():
        family = name.partition(".")[0]
        if before and family != before:
            table.add_section()
        before = family
        recipe, what = function(), function.__doc__.strip().splitlines()[0]
        ranks, layout = read_cluster(recipe.cluster).num_ranks, recipe.layout
        axes = f"TP{layout.tensor} CP{layout.context} DP{layout.data_parallel(ranks)}"
        numbers = [f"{value:,}" for value in (ranks, recipe.global_batch, recipe.num_steps)]
        table.add_row(name, recipe.cluster, numbers[0], axes, *numbers[1:], what)
    return table


def curation_table():
    """A rich table with a row for each recipe of `moviegen curate`."""
    table = _table("recipe", "filters", "what")
    for name, function in recipes.CURATION.items():
        table.add_row(name, f"{len(function().filters)}", function.__doc__.strip().splitlines()[0])
    return table


def count(size, latent_shape, text_tokens) -> dict:
    """Parameters and FLOPs of one sample, in all and for each component."""
    parameters = flops.parameters(size)
    forward = flops.forward_flops(size, latent_shape, text_tokens)
    return {
        "size": size.name,
        "latent_shape": list(latent_shape),
        "tokens": size.num_tokens(latent_shape),
        "text_tokens": text_tokens,
        "parameters": sum(parameters.values()),
        "forward_flops_per_sample": sum(forward.values()),
        "train_flops_per_sample": flops.TRAIN_PASSES * sum(forward.values()),
        "components": {
            name: {
                "parameters": parameters[name],
                "forward_flops": forward[name],
                "train_flops": flops.TRAIN_PASSES * forward[name],
            }
            for name in flops.COMPONENTS
        },
    }


def count_table(counted):
    """A rich table of what `count` returned, with its sums in the last row."""
    table = _table("component", "parameters", "forward FLOPs", "train FLOPs", "share of FLOPs")
    for name, row in counted["components"].items():
        share = row["train_flops"] / counted["train_flops_per_sample"]
        numbers = (f"{row['forward_flops']:.4g}", f"{row['train_flops']:.4g}", f"{share:.2%}")
        table.add_row(name.replace("_", " "), f"{row['parameters']:,}", *numbers)
    sums = (f"{counted['forward_flops_per_sample']:.4g}", f"{counted['train_flops_per_sample']:.4g}", "")
    table.add_section()
    table.add_row("sum", f"{counted['parameters']:,}", *sums)
    return table


def count_notes(counted) -> str:
    """What the table's numbers are of, in lines."""
    parameters, shape = counted["parameters"], "x".join(map(str, counted["latent_shape"]))
    amount = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
    flop = f"{counted['train_flops_per_sample']:.2e}"
    return f"""{counted["size"]}: {amount} parameters; {flop} FLOPs to train on one sample,
a latent of {shape} ({counted["tokens"]:,} tokens) with {counted["text_tokens"]:,} real text tokens.
A 100-word caption is about 128 tokens in each of UL2 and MetaCLIP; ByT5 sees quoted text only;
--text-tokens changes the number. FLOPs are those of matrix products: a multiply-add is 2, backward
is 2 x forward."""


def show_pairs(rows):
    """Print (what, value) rows."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, value in rows:
        table.add_row(Text(what, style="dim"), Text(value))  # a folder may be called [x]
    show(table)


def show(table):
    """Print `table`, as wide as it needs where the output is no terminal."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def _latent(recipe):
    return recipe.latent_frames, recipe.latent_height, recipe.latent_width


def _table(*columns):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        is_text = column in ("recipe", "component", "cluster", "layout", "what")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "what")
    return table
