"""Video-ChatGPT's instructions: one question per entry.

[{"video_id": "v_k_ZXmr8pmrs", "q": "What happens?", "a": "…"}, …]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

from emu_jax.data.raw.video_chats import Turn, VideoChats, make_turn


@dataclasses.dataclass(frozen=True)
class VideoChatGPT(VideoChats):
    """Video-ChatGPT's questions; all questions about one video, wherever they are in the file, form one chat."""

    about: ClassVar[str] = "questions about videos: Video-ChatGPT's JSON"

    def chat_of(self, number: int, record: dict[str, Any]) -> tuple[Hashable, object]:
        video = record.get("video_id")
        return (video, video) if isinstance(video, str) and video.strip() else (number, video)

    def turns_of(self, record: dict[str, Any]) -> list[Turn]:
        return [make_turn([record.get("q")], record.get("a"), 1)]


READER = VideoChatGPT
