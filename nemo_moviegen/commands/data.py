"""Commands that make data: videos to clips to latents."""

from pathlib import Path

from nemo_moviegen.commands.asked import bucket_of, tiling_of


def shapes_command(options):
    """Render Moving Shapes and write their manifest."""
    from nemo_moviegen.data.clips import write_manifest
    from nemo_moviegen.data.synthetic import write_moving_shapes

    settings = {
        "num_frames": options.frames,
        "size_px": options.size,
        "fps": options.fps,
        "seed": options.seed,
    }
    clips = write_moving_shapes(options.folder, options.clips, **settings)
    if options.heldout:
        clips += write_moving_shapes(options.folder, options.heldout, split="heldout", **settings)
    print(write_manifest(Path(options.folder) / "manifest.parquet", clips))


def cut_command(options):
    """Cut videos into clips and add them to a manifest."""
    from nemo_moviegen.data.clips import read_manifest, write_manifest
    from nemo_moviegen.data.cutting import cut_clips

    clips = read_manifest(options.manifest) if Path(options.manifest).exists() else []
    for video in options.videos:
        clips += cut_clips(
            video, options.seconds, caption=options.caption, split=options.split, images=options.images
        )
    print(write_manifest(options.manifest, clips))


def curate_command(options):
    """Choose from a folder of videos the clips worth training on."""
    import recipes
    from nemo_moviegen.curation.recipe import override
    from nemo_moviegen.curation.run import MANIFEST, REPORT, curate

    recipe = override(recipes.get_curation(options.recipe), options.settings)
    done = curate(options.folder, options.output, recipe, options.task, options.workers)
    output = Path(options.output)
    print(f"{done['num_scored']} videos scored", end="")
    if done["num_missing"]:
        print(f"; other tasks owe {done['num_missing']}, the last of them selects")
    else:
        print(
            f"; {output / MANIFEST}: {done['num_clips']} clips and {done['num_images']} images; "
            f"{done['num_refused']} files quarantined; see {output / REPORT}"
        )


def encode_command(options):
    """Write the latents and text features of the clips of manifests."""
    from nemo_moviegen.buckets import bucket_set
    from nemo_moviegen.data.encoded import told
    from nemo_moviegen.encode import encode
    from nemo_moviegen.tables import find_size
    from nemo_moviegen.text_encoders import write_toy_encoders

    size, _ = find_size(options.model or ("video_tiny" if options.toy_encoders else "video_30b"))
    if options.buckets == "single":
        shapes = {"bucket": bucket_of(options)}
    elif options.frames or options.size or options.fps:
        raise ValueError(
            f"--buckets {options.buckets} says what shapes clips get: drop --frames, --size, --fps"
        )
    else:
        shapes = {"bucket_set": bucket_set(options.buckets)}
    if options.toy_encoders:
        write_toy_encoders(options.encoders, size.contexts)
    done = encode(
        options.manifests,
        options.autoencoder,
        options.encoders,
        options.output,
        context_sizes=size.contexts,
        task=options.task,
        batch_size=options.batch,
        num_threads=options.threads,
        tiling=tiling_of(options, options.autoencoder),
        **shapes,
    )
    print(told(options.output, done))
