"""An encoder out of a local Hugging Face folder: safetensors alone, and only the tensors the encoder has.

The model is built without memory, shared out over ranks where that is asked for, and then filled tensor by
tensor, each rank reading its own rows. A decoder or a picture tower in the same files is never read.
"""

import json

import torch

from nemo_moviegen.text_encoders.sharding import held_rows, local

# the model types of transformers a context may be stored as; of clip the text tower is taken
_MODEL_TYPES = {
    "ul2": ("t5",),
    "metaclip": ("clip_text_model", "clip"),
    "byt5": ("t5",),
    "t5": ("t5",),
}
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "spiece.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# T5EncoderModel holds one table under two names, and its files keep either
_OTHER_NAME = {"shared.weight": "encoder.embed_tokens.weight"}


def is_clip(name) -> bool:
    """Whether the context of this name is a CLIP text tower, else it is a T5 encoder. ValueError: unknown."""
    if name not in _MODEL_TYPES:
        raise ValueError(f"no text encoder {name!r}; known: {', '.join(_MODEL_TYPES)}")
    return "clip" in _MODEL_TYPES[name]


def check_files(subfolder, size, context_sizes):
    """ValueError that names what an encoder's folder lacks, or the pickle it holds, and what to do."""
    model_class = _model_class(size.name).__name__
    weights = list(subfolder.glob("*.safetensors"))
    pickles = sorted(file.name for pattern in _PICKLES for file in subfolder.glob(pattern))
    if pickles and not weights:
        raise ValueError(
            f"text encoder {size.name}: {subfolder / pickles[0]} is a pickle, which can run any code "
            "when it is opened; only safetensors are read. Where you trust it, convert it: load the folder "
            f"with transformers' {model_class} and call save_pretrained on it"
        )
    missing = None
    if not subfolder.is_dir():
        missing = "the folder"
    elif not (subfolder / "config.json").is_file():
        missing = "config.json"
    elif not weights:
        missing = "*.safetensors"
    elif not any((subfolder / name).is_file() for name in _TOKENIZER_FILES):
        missing = "the tokenizer (tokenizer_config.json and its files)"
    if missing:
        names = ", ".join(f"{s.name}/ ({s.width} wide)" for s in context_sizes)
        raise ValueError(
            f"text encoder {size.name}: {missing} is missing in {subfolder}. {subfolder.parent} needs "
            f"{names}, each with config.json, *.safetensors and tokenizer files: download the model, load it "
            f"with transformers' {model_class}, call save_pretrained on it and on its tokenizer. "
            "Toy weights of a tiny model: `moviegen encode --toy-encoders` writes them."
        )


def read_config(subfolder, size):
    """transformers' configuration of an encoder; ValueError where it is of another class, width or length."""
    from transformers import CLIPTextConfig, T5Config

    try:
        found = json.loads((subfolder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(
            f"text encoder {size.name}: {subfolder / 'config.json'} does not load: {error}; write it again"
        ) from None
    wanted = _MODEL_TYPES[size.name]
    model_type = found.get("model_type") if isinstance(found, dict) else None
    if model_type not in wanted:
        raise ValueError(
            f"text encoder {size.name}: {subfolder} holds a model of type {model_type!r}, not "
            f"{' or '.join(wanted)}: put the encoder there that its name says"
        )
    config = (CLIPTextConfig if is_clip(size.name) else T5Config).from_pretrained(subfolder)
    if config.hidden_size != size.width:
        raise ValueError(
            f"text encoder {size.name}: {subfolder} is {config.hidden_size} wide, the recipe expects "
            f"{size.width}; use the encoder the recipe names, or change its size.contexts"
        )
    positions = getattr(config, "max_position_embeddings", size.max_tokens)  # T5 has relative positions
    if positions < size.max_tokens:
        raise ValueError(
            f"text encoder {size.name}: {subfolder} has {positions} positions, the recipe keeps "
            f"{size.max_tokens} tokens; use the long-prompt encoder, or set max_tokens to {positions}"
        )
    return config


def empty_model(size, config, dtype=torch.float32):
    """The encoder alone, no decoder and no picture tower, frozen, its parameters on the meta device."""
    from transformers.modeling_utils import no_init_weights

    with no_init_weights(), torch.device("meta"):  # the global generator is left alone
        model = _model_class(size.name)(config)
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def fill(model, subfolder, size, device="cpu"):
    """The model of `empty_model` on `device`, with the weights of its folder; each rank reads its own rows.

    ValueError names a file that is absent, truncated or no safetensors, and a tensor that lacks or has
    another shape.
    """
    from safetensors import SafetensorError, safe_open

    wanted = _names_by_file(model, subfolder, size)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for path, names in wanted.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name, stored in names.items():
                    _copy(parameters[name], file.get_slice(stored), f"{path}: {stored}", size)
        except (OSError, SafetensorError) as error:
            raise _broken(size, path, error) from error
    if is_clip(size.name):  # a table of 0, 1, 2, ... that no file holds
        ids = model.text_model.embeddings.position_ids
        ids.copy_(torch.arange(ids.shape[1])[None])
    return model


def _model_class(name):
    from transformers import CLIPTextModel, T5EncoderModel

    return CLIPTextModel if is_clip(name) else T5EncoderModel


def _names_by_file(model, subfolder, size):
    """{file: {name of a parameter: name it is stored under}}."""
    file_of = _stored_tensors(subfolder, size)
    wanted = {}
    for name, _ in model.named_parameters():
        stored = name if name in file_of else _OTHER_NAME.get(name, name)
        if stored not in file_of:  # going on would mean random weights
            raise ValueError(
                f"text encoder {size.name}: the weights in {subfolder} lack {name} and maybe others; "
                f"save the whole {type(model).__name__} there"
            )
        wanted.setdefault(subfolder / file_of[stored], {})[name] = stored
    for path in wanted:
        if not path.is_file():
            raise ValueError(
                f"text encoder {size.name}: {path} is missing, {_INDEX} names it: copy all of the "
                "model's files"
            )
    return wanted


def _stored_tensors(subfolder, size):
    """{name of a stored tensor: name of its file}, from the index of sharded weights or from the one file."""
    from safetensors import SafetensorError, safe_open

    index = subfolder / _INDEX
    if index.is_file():
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(size, index, error) from error
    files = sorted(subfolder.glob("*.safetensors"))
    whole = subfolder / "model.safetensors"
    if not whole.is_file() and len(files) > 1:
        raise ValueError(
            f"text encoder {size.name}: {subfolder} has {len(files)} safetensors files and no {_INDEX} that "
            "says what is where: copy it too"
        )
    path = whole if whole.is_file() else files[0]
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path.name)
    except (OSError, SafetensorError) as error:
        raise _broken(size, path, error) from error


def _copy(parameter, stored, where, size):
    if list(parameter.shape) != stored.get_shape():
        raise ValueError(
            f"text encoder {size.name}: {where} has the shape {stored.get_shape()}, config.json says "
            f"{list(parameter.shape)}: take both from one model"
        )
    first, end = held_rows(parameter)
    if end > first:
        local(parameter).copy_(stored[first:end])


def _broken(size, path, error):
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"text encoder {size.name}: {path} does not load, it is truncated or damaged ({reason}): "
        "copy it again"
    )
