"""The quick start's evaluation: captions, drawings and chats of the embedded images, and the report of a run."""
