"""Commands that train, and what is made of trained weights."""

from nemo_moviegen.commands.asked import recipe_of


def train_command(options):
    """Train a recipe: on this machine, or as one of the ranks a launcher started."""
    from nemo_moviegen.launch import launch

    return launch(recipe_of(options.recipe, options), debug=options.debug)


def submit_command(options):
    """Check a recipe and hand it to SLURM."""
    from nemo_moviegen.cluster import read_cluster
    from nemo_moviegen.submit import make_job, submit, summary
    from nemo_moviegen.tables import show_pairs

    recipe = recipe_of(options.recipe, options)
    job = make_job(
        recipe,
        read_cluster(recipe.cluster),
        options.recipe,
        options.settings,
        name=options.name,
        after=options.after,
        options=options.sbatch,
        check_paths=not options.skip_paths,
    )
    rows = summary(job)
    show_pairs(rows)
    print(job.line)
    if not options.dry_run:
        print(f"job {submit(job)}: `moviegen progress {dict(rows)['output']}` says where it stands")


def average_command(options):
    """Average checkpoints into a new run."""
    from nemo_moviegen.training.average import average

    print(average(options.sources, options.output, weights=options.weights, kind=options.of))


def demo_command(options):
    """Run the whole chain at toy size."""
    from nemo_moviegen.demo import run_demo

    run_demo(options.out, options.scale, recipe=options.recipe, fresh=options.fresh)
