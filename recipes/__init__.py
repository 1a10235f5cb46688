"""What is trained, and on which clips: argument-free functions. These tables are the only registries."""

from nemo_moviegen.settings import nearest
from recipes import curation, tae, tiny, video_30b

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
    "video_30b.t2i_256_1536": video_30b.t2i_256_1536,
    "video_30b.t2iv_256_3072": video_30b.t2iv_256_3072,
    "video_30b.t2iv_256_6144": video_30b.t2iv_256_6144,
    "video_30b.t2iv_768_6144_a": video_30b.t2iv_768_6144_a,
    "video_30b.t2iv_768_6144_b": video_30b.t2iv_768_6144_b,
    "video_30b.t2iv_768_cp2_6144": video_30b.t2iv_768_cp2_6144,
    "video_30b.t2iv_768_cp2_4096": video_30b.t2iv_768_cp2_4096,
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
