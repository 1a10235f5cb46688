"""Where a training run's text features come from: out of the shards, or from frozen encoders on its ranks."""

from nemo_moviegen.data.online_text import OnlineText


def with_text(reader, recipe):
    """What `MicroBatches` reads samples and the empty prompt from: the reader, or one that encodes captions.

    Encoders run where the model trains. UL2 is replicated, or where `layout.sharding` is full lies in slices
    over the ranks that share the model's, data and context parallel of one tensor rank (Movie Gen s3.1.6).
    ValueError where `data.text_encoders` does not serve. Called once the ranks have met.
    """
    if recipe.data.text == "cached":
        return reader
    from megatron.core import parallel_state

    from nemo_moviegen.text_encoders import TextEncoders, encoder_device

    group = None
    if recipe.layout.sharding == "full":
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    device, dtype = encoder_device()
    encoders = TextEncoders.load(
        recipe.data.text_encoders, recipe.size.contexts, device=device, dtype=dtype, shard_group=group
    )
    return OnlineText(reader, encoders)
