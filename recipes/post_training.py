"""After pre-training: supervised finetuning (s3.3), and text-to-image at 1024 px (s3.7).

The paper states of finetuning: 64 nodes, a small batch, a cosine learning rate, pre-trained weights, clips of
10.6 to 16 s of which half are 16 s; and that several such runs are averaged. Of text-to-image: the image
autoencoder in place of the temporal one, 1024 px, and the quality tuning in full but for its GPUs. All other
numbers here are our default.
"""

from dataclasses import replace

from nemo_moviegen.recipe import LatentData, Layout, Optim, Validation, VideoRecipe
from recipes import video_30b


def sft() -> VideoRecipe:
    """Supervised finetuning (s3.3): clips of 10.6 to 16 s at 768 px, cosine learning rate, 512 H100s.

    Half of the clips are exactly 16 s (at 16 frames a second), the others 10.6 to 16 s (their middle 10.67 s
    at 24): both are 256 frames, and a set of that mix is drawn as it is, so the half is the set's own. No
    images (our reading: the set is of videos).
    NOT STATED, our default: TP 4, CP 2 -> 64 copies, 1 clip each: batch 64; peak rate 1e-5, which is that of
    the last pre-training stage; 4k steps, 200 of warm-up; weight decay 0.1.
    Runs that differ in data, settings and pre-training checkpoint (`init_from`) are averaged by
    `moviegen average RUN RUN ... --output NEW`.
    """
    before = video_30b.t2iv_768_cp2_4096()
    return replace(
        before,
        name="video_30b.sft",
        cluster="h100_512",
        data=LatentData(folder="data/latents_sft", buckets="sft_768", image_every=0),
        optim=replace(before.optim, learning_rate=1e-5, decay="cosine", warmup_steps=200),
        global_batch=64,
        num_steps=4000,
        output="runs/video_30b/sft",
        init_from=before.output,
        save_every=500,
        keep_last=4,
        validation=Validation(every=250),
    )


def t2i_1024() -> VideoRecipe:
    """Text-to-image post-training (s3.7): 1024 px latents of the image autoencoder, from the video model.

    `moviegen encode --autoencoder out/tae/image_init --buckets image_1024` writes them: 8x8 and 16 channels,
    as before, so patch embedding and head stay and learn the new latents. 4,096 or 4,032 tokens an image.
    NOT STATED, our default: 512 H100s, 2 images each: batch 1,024; 50k steps at 6e-5.
    """
    video = video_30b.t2iv_768_cp2_4096()
    return replace(
        video,
        name="video_30b.t2i_1024",
        cluster="h100_512",
        layout=Layout(sharding="full", recompute="full"),
        data=LatentData(folder="data/latents_image_1024", buckets="image_1024", image_every=1),
        latent_frames=1,
        latent_height=128,
        latent_width=128,
        optim=replace(video.optim, learning_rate=6e-5),
        global_batch=1024,
        micro_batch=2,
        num_steps=50_000,
        output="runs/video_30b/t2i_1024",
        init_from=video.output,
    )


def t2i_quality() -> VideoRecipe:
    """Quality tuning of text-to-image (s3.7): 6k steps, batch 64, 1e-5 constant after 2,000 steps of warm-up.

    On O(1000) images by artists, 1024 px. NOT STATED: the GPUs; ours is one node of eight H200s, TP 8.
    """
    before = t2i_1024()
    return replace(
        before,
        name="video_30b.t2i_quality",
        cluster="h200_8",
        layout=Layout(tensor=8, sharding="full", recompute="full"),
        data=replace(before.data, folder="data/latents_image_quality"),
        optim=Optim(learning_rate=1e-5, warmup_steps=2000, decay="constant"),
        global_batch=64,
        micro_batch=8,
        num_steps=6000,
        output="runs/video_30b/t2i_quality",
        init_from=before.output,
    )
