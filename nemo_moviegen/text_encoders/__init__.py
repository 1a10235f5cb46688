"""Frozen text encoders: UL2, MetaCLIP and ByT5 for video (Movie Gen s3.1.4), T5 for audio (s6.1).

    prompt -> what each encoder sees -> tokens -> last layer [L, width], real tokens only

They are read from a local folder, never from a hub. It has one subfolder for each name of the recipe's
`size.contexts`, as transformers saves a model and its tokenizer: config.json, *.safetensors and the
tokenizer's files. Toy encoders are the same classes at toy width, with seeded random weights.
"""

from nemo_moviegen.text_encoders.encoders import TextEncoders as TextEncoders
from nemo_moviegen.text_encoders.encoders import encoder_device as encoder_device
from nemo_moviegen.text_encoders.sharding import shard_over as shard_over
from nemo_moviegen.text_encoders.toy import write_toy_encoders as write_toy_encoders
