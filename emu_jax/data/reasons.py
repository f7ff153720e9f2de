"""Why something is left out of a data set: the reasons of rejects, each with its meaning.

They are the words of `rejects.jsonl` and of the manifest, which programs may count, so they do not change. A reader of
another package may have others, which count as faults.
"""

from __future__ import annotations

REASONS = {
    "count_differs": "the number of samples in a tar is not the one that img2dataset's `_stats.json` states",
    "cut_shard": "a file ends too soon, or cannot be read or unpacked further; what comes before is read",
    "cut_video": "a video ends too soon",
    "data_after_end": "a tar goes on after its end, as joined archives do; the rest is not read",
    "decoration": "an image of a page is an icon or on many pages",
    "duplicate": "another document has the same images",
    "duplicate_key": "another document has the same key",
    "empty_turn": "a turn of a chat, a question or an answer has no text",
    "extreme_aspect": "an image is longer and narrower than `--max-aspect`",
    "image_too_large": "an image file has more than 256 MB",
    "images_differ": (
        "a chat has another number of `<image>` than of images, or of `<video>` than of videos, or two fields differ"
    ),
    "leading_answer": (
        "answers before a chat's first question; the chat is kept without them, unless one shows an image"
    ),
    "low_similarity": "an image's CLIP similarity to its text is below `min_similarity`",
    "malformed_cue": "blocks of a subtitle file are not cues; the others are read",
    "member_too_large": "a member of a tar, or a sample, has more bytes than `max_member_bytes`",
    "misplaced_system": "a chat has a system message that is not its first turn, or two of them",
    "missing_image": "an image file is not there, is empty, or has no name that can be a file's",
    "missing_video": "a video file is not there",
    "no_answer": "a chat has no answer to a question",
    "no_column": "a Parquet or Arrow file has no column of images or of texts",
    "no_duration": "no JSON states a storyboard's duration",
    "no_frames": "a video has no frame that can be decoded",
    "no_id": "an image of COCO's JSON has no id",
    "no_image": "a document has no image, or none is left",
    "no_sentence": "an image of MMC4 names a sentence that is not there",
    "no_similarity": "an image of MMC4 has no similarity, and no CLIP weights are named",
    "no_subtitles": "a storyboard has no subtitles, or none in `language`",
    "no_text": "a document has no text, or none is left",
    "no_turns": "a chat has no turns",
    "not_a_chat": "a record has not the fields of a chat, or other types in them",
    "not_coco": "a JSON has not COCO's lists `images` and `annotations`",
    "other_subtitles": "subtitles in another language, or a second file of them; the video has others that are read",
    "outside": "an address of a page, or a link, leads out of its folder",
    "page_too_large": "a page has more than 16 MB",
    "pickle_member": "a member of a tar is a pickle, which could run code and is not opened",
    "repeated_key": "an earlier sample or image of the file has the same name",
    "repeated_member": "a sample of a tar has two members with the same extension",
    "repeated_role": "two turns in a row are the same speaker's",
    "text_too_long": "a text has more characters than the reader's `max_characters`",
    "too_large": "a video or a storyboard has too many bytes, pixels or frames",
    "too_many_pixels": "an image has more than 50 megapixels",
    "too_small": "an image has a side shorter than `--min-side`",
    "unknown_role": "a turn of a chat is from somebody else than human, gpt or system",
    "unread_field": (
        "a record has a field, a placeholder, a part or a turn that changes what it says and that is not read, such "
        "as `audio`, `tools` or two videos"
    ),
    "unread_member": (
        "a member of a tar is a link, a device or a sparse file, or its name is longer than 4,096 characters"
    ),
    "unreadable_file": "the system cannot read a file",
    "unreadable_image": "a file is no image, or a broken one",
    "unreadable_json": "a line or a file is not JSON",
    "unreadable_page": "a page is empty or cannot be read",
    "unreadable_record": (
        "a record is not an object, or a field has another type, such as `null` or a number where a text is expected"
    ),
    "unreadable_row": (
        "a row of a CSV has more or fewer cells than the header, or a quote that is not closed; the rows after it "
        "are read"
    ),
    "unreadable_subtitles": "a file of subtitles has another format, or an unknown encoding",
    "unreadable_text": "a text is not UTF-8, or has half of a surrogate pair",
    "unreadable_video": "a file is no video, or a broken one",
    "unsupported_depth": "the grey values of an image are negative, above 65,535, not finite, or of no known range",
    "unsafe_member": "the name of a member of a tar leads out of the archive",
    "unsafe_path": "the name of an image or a video leads out of its folder",
}
# Reasons that follow from a rule. Every other one is a fault of the data, and too many faults fail the preparation.
RULE_REASONS = frozenset(
    {
        "decoration",
        "duplicate",
        "extreme_aspect",
        "leading_answer",
        "low_similarity",
        "no_image",
        "no_text",
        "other_subtitles",
        "text_too_long",
        "too_small",
    }
)
# Images that web documents may lack because their server no longer had them: a fault only if a whole document is lost.
MISSING_PART_REASONS = frozenset({"missing_image", "no_similarity", "outside"})
