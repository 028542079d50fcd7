"""The values that arguments can have which are a choice of names.

The command offers the same ones. This module needs no other, so that `safnet --help` answers at once.
"""

from typing import Literal

Variant = Literal["full", "small"]  # of the model
Precision = Literal["float32", "bfloat16", "float16"]  # of convolutions; torch's types of these names
DatasetName = Literal["kalantari17", "challenge123", "tel23", "ntire21", "folder"]
Split = Literal["Training", "Test"]  # of a data set
PanoramaSplit = Literal["train", "validation", "all"]
Depth = Literal["half", "float", "uint16"]  # numbers in radiance files
ToneMap = Literal["photo", "reinhard", "mu-law"]
Look = Literal["natural", "neutral", "flat"]  # of the tone map "photo"
Ghosts = Literal["off", "normal", "strong"]  # how far the outer exposures are distrusted
ColourSpace = Literal["rec709", "p3", "rec2020", "input"]  # of results; input: the frames' own primaries

FEWEST_FRAMES, MOST_FRAMES = 2, 9  # of a bracket
