"""A stage that starts from another stage's weights, where the two models differ in the ways the paper names.

    difference                      what becomes of the weights                        paper
    ------------------------------- -------------------------------------------------- --------------
    longer row or column table      interpolated between old rows (`grow`)             s3.1.3, s3.2
    longer frame table              old rows kept bit for bit, fresh rows appended     s3.1.3, s3.2
    more input channels             zero columns: the old function, whatever they hold s3.1.5, s5
    another text or image encoder   its projection is fresh, all others keep theirs    s4
    a whole part the old has not    as the new model initialises it, named in the log  s5

Everything else is refused by name. Pure functions on names, shapes and tensors, without torch's import: sizes
are checked before anything is built.
"""

import re
from dataclasses import dataclass

FIXED = (
    "num_layers",
    "width",
    "ffn_width",
    "num_heads",
    "output_channels",
    "patch_frames",
    "patch_height",
    "patch_width",
    "block",
    "gated_ffn",
    "qk_norm",
    "cross_attention_norm",
    "time_frequencies",
)
"""Fields of a `TransformerSize` that no stage changes."""
TABLES = {"positions.frame": "max_frames", "positions.row": "max_height", "positions.column": "max_width"}
"""Position tables and the fields that hold their lengths."""
PATCH_EMBEDDING = "patch_embedding.weight"
_CONTEXT = re.compile(r"(context_projections\.\w+\.)(\d+)(\..+)")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..+)")


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How one parameter of the new model comes about."""

    how: str
    """copy, interpolate, append, widen or fresh."""
    source: str
    """Parameter of the old model it is made from; empty for fresh."""
    old_shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    channels: tuple[int, int] = (0, 0)
    """For widen: input channels of the old and the new model."""
    context: str = ""
    """Encoder of a context projection."""


@dataclass(frozen=True, kw_only=True)
class Transition:
    """All parameters of the new model, by name, in its order."""

    growths: dict[str, Growth]

    def describe(self) -> list[str]:
        """Log lines: how many parameters are copied, and one for each that is not or changed its name."""
        copied = sum(growth.how == "copy" for growth in self.growths.values())
        lines = [f"{copied} of {len(self.growths)} parameters copied"]
        return lines + [
            f"{name} {_change(growth)}: {_words(growth)}"
            for name, growth in self.growths.items()
            if growth.how != "copy" or growth.source != name
        ]


def check_transition(old_size, new_size):
    """ValueError with every field in which `new_size` can not start from weights of `old_size`."""
    _refuse(_size_problems(old_size, new_size), old_size, new_size)


def plan_transition(old_shapes, old_size, new_shapes, new_size) -> Transition:
    """What becomes of every parameter of the new model; shapes are whole ones by `named_parameters` name.

    A context projection takes the weights of the encoder of the same name, wherever that stood: text has no
    positions, so the order of the encoders does not matter. ValueError lists all that does not match: fields
    of the sizes, parameters whose shape differs, that the old lacks, or that find no place in the new.
    """
    old_shapes, new_shapes = (
        {name: tuple(int(n) for n in shape) for name, shape in shapes.items()}
        for shapes in (old_shapes, new_shapes)
    )
    parts = {name.partition(".")[0] for name in old_shapes}
    growths, problems = {}, []
    for name, new_shape in new_shapes.items():
        source, context = _source(name, old_size, new_size)
        is_new_part = name.partition(".")[0] not in parts
        if source in old_shapes:
            growth = _growth(name, source, old_shapes[source], new_shape, old_size, new_size, context)
        elif is_new_part or (context and source is None):
            growth = Growth(how="fresh", source="", old_shape=(), new_shape=new_shape, context=context)
        else:
            growth = None
        if growth is None:
            problems.append((name, old_shapes.get(source), new_shape))
        else:
            growths[name] = growth
    taken = {_source(name, old_size, new_size)[0] for name in new_shapes}
    problems += [(name, shape, None) for name, shape in old_shapes.items() if name not in taken]
    _refuse(_size_problems(old_size, new_size) + _one_line_a_layer(problems), old_size, new_size)
    return Transition(growths=growths)


def grow(name, old, growth, fresh=None):
    """The whole new tensor from the whole `old` one, in its dtype; `fresh` is the new model's own.

    Rows and columns are interpolated linearly between the middles of the patches, ends repeated: new row j
    of M lies at old row (j + 1/2) N / M - 1/2 of N. So a part of a picture sees the same positions after the
    picture was scaled by M / N, however much of the table the picture fills; matching the tables' corners
    would hold for pictures that fill them only. For an odd M / N every old row reappears bit for bit.

    Only append and fresh read `fresh`. ValueError where a tensor has not the planned shape.
    """
    _check_shape(name, "the checkpoint's", old, growth.old_shape if growth.how != "fresh" else None)
    _check_shape(name, "the fresh", fresh, growth.new_shape if growth.how in ("append", "fresh") else None)
    if growth.how == "fresh":
        return fresh
    if growth.how == "copy":
        return old
    if growth.how == "interpolate":
        return _interpolated(old, growth.new_shape[0])
    if growth.how == "append":
        table = fresh.to(old.device, old.dtype).clone()
        table[: growth.old_shape[0]] = old
        return table
    return _widened(old, *growth.channels)


def _interpolated(table_ND, length):
    num_rows = table_ND.shape[0]
    places = [(j + 0.5) * num_rows / length - 0.5 for j in range(length)]
    places = [min(max(place, 0.0), num_rows - 1.0) for place in places]
    below = [int(place) for place in places]
    above = [min(row + 1, num_rows - 1) for row in below]
    wide_ND = table_ND.double()
    share_N1 = wide_ND.new_tensor([place - row for place, row in zip(places, below, strict=True)])[:, None]
    return ((1 - share_N1) * wide_ND[below] + share_N1 * wide_ND[above]).to(table_ND.dtype)


def _widened(weight_DX, old_channels, new_channels):
    """Channels are the fastest axis of a patch, so new columns lie between old ones."""
    width = weight_DX.shape[0]
    elements = weight_DX.shape[1] // old_channels
    wide = weight_DX.new_zeros(width, elements, new_channels)
    wide[..., :old_channels] = weight_DX.reshape(width, elements, old_channels)
    return wide.reshape(width, -1)


def _growth(name, source, old_shape, new_shape, old_size, new_size, context):
    """How a parameter of `new_shape` comes from one of `old_shape`; None where it can not."""
    same = {"source": source, "old_shape": old_shape, "new_shape": new_shape, "context": context}
    channels = (old_size.input_channels, new_size.input_channels)
    if name == PATCH_EMBEDDING and channels[0] != channels[1]:
        elements = old_size.patch_frames * old_size.patch_height * old_size.patch_width
        widths = (old_shape[1:], new_shape[1:]) == ((elements * channels[0],), (elements * channels[1],))
        fits = old_shape[:1] == new_shape[:1] and widths and channels[0] < channels[1]
        return Growth(how="widen", channels=channels, **same) if fits else None
    if old_shape == new_shape:
        return Growth(how="copy", **same)
    if name in TABLES and old_shape[1:] == new_shape[1:] and old_shape[0] < new_shape[0]:
        return Growth(how="append" if name == "positions.frame" else "interpolate", **same)
    return None


def _source(name, old_size, new_size):
    """(the old model's name of this parameter, its encoder): None for an encoder the old model has not."""
    match = _CONTEXT.fullmatch(name)
    if not match or int(match[2]) >= len(new_size.contexts):
        return name, ""
    encoder = new_size.contexts[int(match[2])].name
    places = [place for place, context in enumerate(old_size.contexts) if context.name == encoder]
    return (f"{match[1]}{places[0]}{match[3]}" if places else None), encoder


def _size_problems(old_size, new_size):
    problems = [
        f"{field} is {getattr(new_size, field)}, those weights have {getattr(old_size, field)}: "
        f"set size.{field}={getattr(old_size, field)}"
        for field in FIXED
        if getattr(old_size, field) != getattr(new_size, field)
    ]
    for field in ("input_channels", *TABLES.values()):
        old, new = getattr(old_size, field), getattr(new_size, field)
        if new < old:
            problems.append(f"{field} shrinks from {old} to {new}: set size.{field} to {old} or more")
    widths = {context.name: context.width for context in new_size.contexts}
    for context in old_size.contexts:
        if context.name not in widths:
            problems.append(
                f"contexts lack {context.name}, which those weights are trained with: add it to size.contexts"
            )
        elif widths[context.name] != context.width:
            problems.append(
                f"features of {context.name} are {widths[context.name]} wide, those weights take "
                f"{context.width}: set that width in size.contexts"
            )
    return problems


def _one_line_a_layer(problems):
    """Lines of (name, old shape, new shape); a parameter that several layers have takes one."""
    layers = {}
    for name, old_shape, new_shape in problems:
        before, number, after = match.groups() if (match := _LAYER.fullmatch(name)) else (name, "", "")
        layers.setdefault((before, after, old_shape, new_shape), []).append(number)
    return [
        f"{before}{_range(numbers)}{after} is {_shape(new_shape, 'not in the new model')}, "
        f"those weights have {_shape(old_shape, 'none of it')}"
        for (before, after, old_shape, new_shape), numbers in layers.items()
    ]


def _range(numbers):
    """0..3 for neighbours, else 0,2: layers come in order."""
    if len(numbers) > 2 and int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1:
        return f"{numbers[0]}..{numbers[-1]}"
    return ",".join(numbers)


def _refuse(problems, old_size, new_size):
    if problems:
        raise ValueError(
            f"{new_size.name} can not start from weights of {old_size.name}:\n  " + "\n  ".join(problems)
        )


def _check_shape(name, whose, tensor, shape):
    found = None if tensor is None else tuple(tensor.shape)
    if shape is not None and found != shape:
        raise ValueError(
            f"{name}: {whose} tensor is {_shape(found, 'missing')}, the plan needs {list(shape)}"
        )


def _change(growth):
    """[old shape] -> [new shape], or the one there is."""
    shapes = [list(shape) for shape in (growth.old_shape, growth.new_shape) if shape]
    return " -> ".join(map(str, shapes if growth.old_shape != growth.new_shape else shapes[:1]))


def _words(growth):
    old, new = (shape[0] if shape else 0 for shape in (growth.old_shape, growth.new_shape))
    if growth.how == "append":
        return f"rows 0..{old - 1} kept, rows {old}..{new - 1} fresh"
    if growth.how == "interpolate":
        return f"interpolated, {new / old:g} rows for each old one"
    if growth.how == "widen":
        first, stop = growth.channels
        return f"widened with zeros for input channels {first}..{stop - 1}"
    if growth.how == "copy":
        return f"copied from {growth.source}, where {growth.context} stood"
    if growth.context:
        return f"new and fresh; the old function where a sample has no token of {growth.context}"
    return "new, as the new model initialises it"


def _shape(shape, absent):
    return absent if shape is None else str(list(shape))
