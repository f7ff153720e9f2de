"""The system messages of chats about an image or a video that Emu-I was tuned with.

    <s> You will be presented with an image: [IMG] ImageContent [/IMG] . You … [USER] : [IMG] <image>… [/IMG] What …

The delimiters in the messages become special tokens, as in the reference's tokenizer; the word between them is text.
Tuning and generation use the same messages.
"""

from __future__ import annotations

IMAGE_SYSTEM = (
    "You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the image after I provide it"
    " to you. Please answer my questions based on the given image."
)
VIDEO_SYSTEM = (
    "You are a helpful assistant and you will be presented with a video consisting of multiple chronological images: "
    "[IMG]ImageContent[/IMG]. You will be able to see the video after I provide it to you. Please answer my questions "
    "based on the given video."
)
# The only texts of training data in which names of special tokens become these tokens.
SYSTEM_MESSAGES = frozenset({IMAGE_SYSTEM, VIDEO_SYSTEM})
