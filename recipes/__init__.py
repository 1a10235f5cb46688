"""What is trained: argument-free functions that return a `Recipe`. This table is the only registry."""

from nemo_moviegen.settings import nearest
from recipes import tiny

RECIPES = {
    "tiny.tae": tiny.tae,
    "tiny.t2i": tiny.t2i,
    "tiny.t2iv": tiny.t2iv,
}


def get(name):
    """The recipe of that name; ValueError naming the nearest for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}{nearest(name, sorted(RECIPES))}")
    return RECIPES[name]()
