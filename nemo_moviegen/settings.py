"""Trees of frozen dataclasses, changed and read by key; unknown keys and wrong types are named. No torch."""

import difflib
from dataclasses import MISSING, fields, is_dataclass
from typing import get_args, get_origin, get_type_hints

_MOST_NAMED = 30


def override(settings, assignments):
    """`settings` with `key.path=value` assignments applied and checked again; entries of a tuple are `key.0`.

    Raises ValueError naming the nearest key for an unknown one, the wanted type for a bad value, and what
    the settings themselves say where the values do not fit each other, once all are assigned.
    """
    if not assignments:
        return settings
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = _editable(OmegaConf.structured(settings))
    values = dict(_leaves(OmegaConf.to_container(tree)))
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(
                f"{assignment!r} is not an assignment: write key=value, for example num_steps=100"
            )
        if key not in values:
            raise ValueError(f"{settings.name} has no setting {key!r}{nearest(key, sorted(values))}")
        try:
            OmegaConf.update(tree, key, _value(text, values[key]), force_add=False)
        except OmegaConfBaseException as error:
            raise ValueError(f"{assignment!r} does not fit {settings.name}: {_reason(error)}") from None
    return _built(tree, settings.name)


def from_plain(kind, values, where):
    """A dataclass of `kind` from what a YAML or JSON reader returned; `where` begins each ValueError.

    Every key must be known and every value of the declared type: nothing is converted but int to float.
    """
    if is_dataclass(kind):
        if not isinstance(values, dict):
            raise ValueError(f"{where} is {values!r}; it needs the keys of {kind.__name__}")
        known = {f.name: f for f in fields(kind)}
        for name in values:
            if name not in known:
                raise ValueError(f"{where} has no setting {name!r}{nearest(str(name), sorted(known))}")
        required = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
        if missing := sorted(required - values.keys()):
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        hints = get_type_hints(kind)
        return kind(**{n: from_plain(hints[n], v, f"{where}: {n}") for n, v in values.items()})
    if get_origin(kind) is tuple and isinstance(values, list):
        return tuple(from_plain(get_args(kind)[0], v, f"{where}.{i}") for i, v in enumerate(values))
    if kind is float and type(values) is int:
        return float(values)
    if type(values) is not kind:
        wanted = getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else "list"
        raise ValueError(f"{where} is {values!r}; it needs a value of type {wanted}")
    return values


def nearest(word, known) -> str:
    """`; did you mean X?` with the nearest of `known`, or a list of them where nothing is near.

    A key is also found by its last part (`context` for `layout.context`), by that part's initials
    (`lr` for `optim.learning_rate`) and by a near miss of it (`optim.warmup` for `optim.warmup_steps`).
    """
    leaf = word.rsplit(".", 1)[-1]
    leaves = {k: k.rsplit(".", 1)[-1] for k in known}
    close = [
        *[k for k in known if leaves[k] == leaf],
        *[k for k in known if "".join(part[:1] for part in leaves[k].split("_")) == leaf],
        *[k for k in known if k.startswith(f"{word}.")],
        *difflib.get_close_matches(word, known, n=1),
        *[k for k in known if difflib.get_close_matches(leaf, [leaves[k]])],
    ]
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known[:_MOST_NAMED])}{', ...' if len(known) > _MOST_NAMED else ''}"


def _editable(node):
    from omegaconf import Container, OmegaConf

    OmegaConf.set_readonly(node, False)  # frozen dataclasses become read-only nodes, each with its own flag
    keys = range(len(node)) if OmegaConf.is_list(node) else node.keys()
    for child in (node._get_node(key) for key in keys):
        if isinstance(child, Container) and not child._is_missing() and not child._is_none():
            _editable(child)
    return node


def _leaves(tree, prefix=""):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            if isinstance(value, list):
                yield f"{prefix}{key}", value
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(text, present):
    """`text` as YAML reads it, but left alone where the setting is a text: `a: b` or nothing at all."""
    import yaml
    from omegaconf import OmegaConf

    if isinstance(present, str):
        return text
    try:
        value = OmegaConf.from_dotlist([f"value={text}"]).value
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not a value: {_reason(error)}") from None
    whole = type(present) is int and isinstance(value, float) and value.is_integer()  # 1e6 steps
    return int(value) if whole else value


def _built(tree, name):
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}: {_reason(error)}") from None


def _reason(error) -> str:
    return str(error).splitlines()[0]
