"""Questions about videos in the format of MSVD-QA: [{"id", "video_id", "question", "answer"}].

Kind: the question's first word where it is what, who, how, when or where; the datasets' paper reports scores by it.
(Fields: from code that reads the files; the files themselves: unverified.)
"""

from __future__ import annotations

from collections.abc import Callable

from emu_jax.evaluate.formats.files import Entry, Files, unique
from emu_jax.evaluate.question import Question

WORDS = ("what", "who", "how", "when", "where")


def reader(
    video_names: Callable[[Files], Callable[[Entry], tuple[str, ...]]],
) -> Callable[[Files, str], list[Question]]:
    """Reads `{split}_qa.json`; `video_names` gives the file names that a question's video may have."""

    def read(files: Files, split: str) -> list[Question]:
        names = video_names(files)
        records = files.records(f"{split}_qa.json")
        questions = []
        for key, entry in unique(records, lambda entry: entry.whole("id"), "id").items():
            text = entry.text("question")
            word = text.split(maxsplit=1)[0].lower() if text.strip() else ""
            questions.append(
                Question(
                    id=str(key),
                    video=files.shown(*names(entry)),
                    text=text,
                    answers=(entry.text("answer"),),
                    kind=word if word in WORDS else "",
                )
            )
        return questions

    return read
