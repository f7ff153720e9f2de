"""VideoChat's instructions: one chat per entry.

[{"video": "050951_051000/1022713978.mp4", "QA": [{"i": "", "q": "What happens?", "a": "…"}, …]}, …]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

from emu_jax.data.raw.files import Skip
from emu_jax.data.raw.video_chats import Turn, VideoChats, make_turn


@dataclasses.dataclass(frozen=True)
class VideoChat(VideoChats):
    """VideoChat's chats; `i` of the first question is an instruction before it, or stands for it."""

    about: ClassVar[str] = "conversations about videos: VideoChat's JSON"

    def chat_of(self, number: int, record: dict[str, Any]) -> tuple[Hashable, object]:
        return number, record.get("video")

    def turns_of(self, record: dict[str, Any]) -> list[Turn]:
        found = record.get("QA")
        if not isinstance(found, list) or not found:
            raise Skip("no_turns", "QA is not a list of questions and answers, or is empty")
        turns = []
        for number, turn in enumerate(found, 1):
            if not isinstance(turn, dict):
                raise Skip("empty_turn", f"question {number} is not an object")
            asked = [turn.get("q", "")]
            if number == 1:
                asked.insert(0, turn.get("i") or record.get("i") or "")
            turns.append(make_turn(asked, turn.get("a"), number))
        return turns


READER = VideoChat
