"""What `moviegen plan` does: it plans, and prints tables or JSON, or writes a page."""

import json

from nemo_moviegen.cluster import read_cluster
from nemo_moviegen.flops import split_text
from nemo_moviegen.planning import published, screen, told
from nemo_moviegen.planning.page import write_page
from nemo_moviegen.planning.plan import make_plan
from nemo_moviegen.planning.search import search, why


def run_plan(recipe, options):
    """Print what `options` of `moviegen plan` ask for; `recipe` is None where only --validate was asked.

    ValueError where the layout or the batch do not divide, not where the memory is too small.
    """
    if recipe is None:
        rows = published.validation()
        _print(options, lambda: rows, lambda console: screen.show_validation(rows, console))
        return
    cluster = read_cluster(options.cluster or recipe.cluster)
    text = None
    if options.text_tokens is not None:
        text = split_text(recipe.size, options.text_tokens)
    if options.why:
        said = why(recipe, cluster, options.why, text=text)
        _print(options, lambda: {"why": said}, lambda console: console.print(said, highlight=False))
        return
    plan, found = make_plan(recipe, cluster, text=text), None
    if options.search or options.html or not plan.fits:
        found = search(recipe, cluster, text=text)
    if options.search:
        top = options.top
        _print(
            options,
            lambda: told.search_values(found, top),
            lambda console: screen.show_search(found, top, console),
        )
    else:
        _print(
            options, lambda: told.plan_values(plan), lambda console: screen.show_plan(plan, console, found)
        )
    if options.html:
        path = write_page(options.html, plan, found, options.top)
        if not options.json:
            print(path)


def _print(options, values, show):
    from rich.console import Console

    if options.json:
        print(json.dumps(values(), indent=2))
        return
    console = Console()
    show(console if console.is_terminal else Console(width=140))
