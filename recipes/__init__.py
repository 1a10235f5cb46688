"""What is trained, and on which clips: argument-free functions. These tables are the only registries."""

from nemo_moviegen.settings import nearest
from recipes import ablation_5b, ablations, curation, post_training, tae, tiny, video_30b

RECIPES = {
    "tae.image_init": tae.image_init,
    "tae.joint": tae.joint,
    "tae.opl_finetune": tae.opl_finetune,
    "tae.tiny_image": tae.tiny_image,
    "tae.tiny": tae.tiny,
    "tae.small": tae.small,
    "tae.small_opl": tae.small_opl,
    "tiny.t2i": tiny.t2i,
    "tiny.t2iv": tiny.t2iv,
    "tiny.shapes_long": tiny.shapes_long,
    **{f"tiny.{name}": twin for name, twin in tiny.TWINS.items()},
    **{f"ablations.{recipe.__name__}": recipe for recipe in ablations.ALL},
    "ablation_5b.t2i": ablation_5b.t2i,
    "ablation_5b.t2iv": ablation_5b.t2iv,
    **{f"video_30b.{row.__name__}": row for row in video_30b.TABLE_3},
    **{f"video_30b.{row.__name__}_fp8": video_30b.in_fp8(row) for row in video_30b.TABLE_3},
    "video_30b.t2iv_768_6144_plateau": video_30b.t2iv_768_6144_plateau,
    "video_30b.sft": post_training.sft,
    "video_30b.t2i_1024": post_training.t2i_1024,
    "video_30b.t2i_quality": post_training.t2i_quality,
}

CURATION = {
    "curation.high_res": curation.high_res,
    "curation.low_res": curation.low_res,
    "curation.tiny": curation.tiny,
}


def get(name):
    """The recipe of that name; ValueError naming the nearest for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}{nearest(name, list(RECIPES))}")
    return RECIPES[name]()


def get_curation(name):
    """The curation recipe of that name; ValueError naming the nearest for an unknown one."""
    if name not in CURATION:
        raise ValueError(f"no curation recipe {name!r}{nearest(name, list(CURATION))}")
    return CURATION[name]()
