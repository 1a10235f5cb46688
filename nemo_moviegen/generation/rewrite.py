"""Prompts as captions are (Movie Gen s3.4.1): users write ten words, captions have a hundred.

    camera movement, what is seen and what it does, visual text to the letter

`rules` brings a prompt to their structure and adds nothing. A language model on disk fills it with detail;
the paper finetunes one of 8B for it and finds that too much of motion in a prompt spoils the video.
"""

import functools
import re
from pathlib import Path

from nemo_moviegen.prompts import quoted_text

RULES = "rules"
CAMERA = (
    *("zoom in", "zoom out", "push in", "pull out", "pan right", "pan left", "truck right", "truck left"),
    *("tilt up", "tilt down", "pedestal up", "pedestal down", "arc shot", "tracking shot", "static shot"),
    "handheld shot",
)
"""The camera labels of training captions (s3.2.1): a caption starts with the one its clip has."""
_ASKING = re.compile(
    r"^\s*(?:please\s+|can you\s+|could you\s+|i(?:'d| would)? (?:want|like) (?:to see )?)*"
    r"(?:(?:make|create|generate|show|render|draw|give)\s+(?:me\s+|us\s+)?)?"
    r"(?:(?:an?|the|some)\s+)?(?:short\s+|high[- ]quality\s+|hd\s+|4k\s+)*"
    r"(?:videos?|clips?|movies?|films?|animations?|images?|pictures?|footage|shots?)\s+"
    r"(?:of|showing|where|with)\s+",
    re.IGNORECASE,
)
_PRAISE = re.compile(
    r"(?:,\s*)?\b(?:masterpiece|best quality|high(?:ly)?[- ](?:quality|detailed|res(?:olution)?)|"
    r"ultra[- ]?hd|"
    r"[48]k(?: uhd)?|trending on \w+|award[- ]winning|octane render|unreal engine)\b",
    re.IGNORECASE,
)
MOST_CHARACTERS = 2000
"""Of a prompt that a language model is asked to rewrite."""
INSTRUCTIONS = (
    "Rewrite the prompt as the caption of a video clip, in one paragraph of about 80 words. Use simple words "
    "and whole sentences. First say who or what is seen and what happens, then the place and the light, then "
    "the camera. Keep everything the prompt says, and every text in quotation marks to the letter. Describe "
    "one movement, not several. Answer with the caption alone."
)


def rules(prompt) -> str:
    """The prompt in the structure of captions, nothing added: the same words without what no caption says.

    A request ("a video of"), praise ("4k, masterpiece") and double spaces go; a camera movement it names goes
    to the front, as in training; visual text stays to the letter. Of nothing left, the prompt is given back.
    """
    kept = []
    text = re.sub(r'"[^"]*"', lambda match: kept.append(match[0]) or f"\0{len(kept) - 1}\0", prompt)
    text = _PRAISE.sub("", _ASKING.sub("", " ".join(text.split()), count=1))
    camera = next((label for label in CAMERA if re.search(rf"\b{label}\b", text, re.IGNORECASE)), "")
    if camera:
        text = re.sub(rf"(?:,\s*|\bwith\s+)?(?:an?\s+)?\b{camera}\b", "", text, count=1, flags=re.IGNORECASE)
    text = re.sub(r"\s+([,.!?])", r"\1", " ".join(text.split())).strip(" ,;.")
    text = re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], text)
    if not text:
        return prompt.strip()
    return f"{camera}, {text}" if camera else text


rules.name = RULES


class LanguageModel:
    """A causal language model of `transformers` in a folder, asked to rewrite, greedily: one answer.

    Loaded with the first prompt, so only by the rank that rewrites. ValueError where the folder holds none,
    or then where it does not load. What it answers is used only if it keeps the visual text and is no longer
    than a caption; otherwise the rules are.
    """

    def __init__(self, folder, most_tokens=192):
        if not Path(folder, "config.json").is_file():
            raise ValueError(
                f"{folder} holds no language model (no config.json): give `rules`, or a folder that "
                "save_pretrained of transformers wrote"
            )
        self.name, self.most_tokens = str(folder), most_tokens

    @functools.cached_property
    def pair(self):
        """Its tokenizer and the model."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, local_files_only=True)
            return tokenizer, AutoModelForCausalLM.from_pretrained(self.name, local_files_only=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the language model in {self.name} does not load: {error}") from None

    def __call__(self, prompt) -> str:
        """The rewritten prompt; by the rules where the model's answer does not serve."""
        if len(prompt) > MOST_CHARACTERS:
            return rules(prompt)
        tokenizer, model = self.pair
        tokens = tokenizer(_asked(prompt, tokenizer), return_tensors="pt")
        made = model.generate(**tokens, do_sample=False, max_new_tokens=self.most_tokens)
        answer = tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        answer = " ".join(answer.split()).strip()
        keeps_text = quoted_text(answer) == quoted_text(prompt)
        return answer if answer and keeps_text else rules(prompt)


def _asked(prompt, tokenizer):
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return f"{INSTRUCTIONS}\n\nPrompt: {prompt}\nCaption:"


def find_rewrite(name):
    """None for "", `rules`, or the language model in a folder; ValueError for another name."""
    if not name:
        return None
    return rules if name == RULES else LanguageModel(name)
