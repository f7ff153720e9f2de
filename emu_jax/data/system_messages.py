"""The paper's system messages of chats about a picture or a film (emu.md §5); [IMG] and [/IMG] in them are tokens."""

IMAGE_SYSTEM = (
    "You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the image after I "
    "provide it to you. Please answer my questions based on the given image."
)
VIDEO_SYSTEM = (
    "You are a helpful assistant and you will be presented with a video consisting of multiple chronological images: "
    "[IMG]ImageContent[/IMG]. You will be able to see the video after I provide it to you. Please answer my questions "
    "based on the given video."
)
