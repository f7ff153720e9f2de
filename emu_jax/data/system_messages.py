"""What stands in front of chats about an image or a video, as Emu-I was tuned with.

    <s> You will be presented with an image: [IMG] ImageContent [/IMG] . You … [USER] : [IMG] <image>… [/IMG] What …

The delimiters in the messages are those of images, as the reference's tokenizer reads them; the word between them is
a word. Tuning and generation must write the same, so that both take it from here.
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
# Texts of training data in which names of special tokens stand for the tokens; in all others they are ordinary text.
SYSTEM_MESSAGES = frozenset({IMAGE_SYSTEM, VIDEO_SYSTEM})
