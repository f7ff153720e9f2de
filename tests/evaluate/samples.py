"""A few items of every benchmark in its published layout, of real images: the embedded emoji of people.

The scored splits show held-out images; the splits that few-shot examples come from show images of the training set,
enough for eight examples. Videos are such an image that moves over the frame.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.evaluate.choice_samples import write_mmbench, write_mmmu, write_seedbench
from tests.evaluate.people import HELD_OUT, TRAIN, Person, people, write_image, write_json, write_moving_image


def write_sample(name: str, root: Path) -> None:
    """The published files of the benchmark `name`, a few items of each, under `root`."""
    WRITERS[name](root)


# ---------------------------------------------------------------- captions

VAL_IDS, TRAIN_IDS = (42, 73, 74, 133), (9, 25, 30, 34, 36, 49, 61, 64, 71)


def coco_images(root: Path, split: str = "val2014") -> list[tuple[int, str, Person]]:
    """Writes a folder of COCO's; its images' ids and names."""
    train = split == "train2014"
    written = []
    for image, person in zip(TRAIN_IDS if train else VAL_IDS, people(TRAIN if train else HELD_OUT), strict=True):
        name = f"COCO_{split}_{image:012d}.jpg"
        write_image(root / split / name, person.pixels)
        written.append((image, name, person))
    return written


def coco_captions(shown: list[tuple[int, str, Person]]) -> dict:
    """COCO's own format."""
    images = [{"license": 3, "file_name": name, "height": 128, "width": 128, "id": image} for image, name, _ in shown]
    captions = [(image, text) for image, _, person in shown for text in person.captions]
    annotations = [{"image_id": image, "id": 100 + n, "caption": text} for n, (image, text) in enumerate(captions)]
    return {"info": {"year": 2014}, "images": images, "licenses": [], "annotations": annotations}


def _karpathy(shown: list[tuple[str, str, Person]], dataset: str) -> dict:
    """(split, name, person) -> his format, without what COCO's files have besides."""
    images = []
    for number, (split, name, person) in enumerate(shown):
        sentences = [
            {"tokens": text.lower().rstrip(".").split(), "raw": text, "imgid": number, "sentid": 5 * number + n}
            for n, text in enumerate(person.captions)
        ]
        sentids = [sentence["sentid"] for sentence in sentences]
        images.append({"sentids": sentids, "imgid": number, "sentences": sentences, "split": split, "filename": name})
    return {"images": images, "dataset": dataset}


def _write_coco(root: Path) -> None:
    val, train = coco_images(root), coco_images(root, "train2014")
    write_json(root / "annotations" / "captions_val2014.json", coco_captions(val))
    write_json(root / "annotations" / "captions_train2014.json", coco_captions(train))
    splits = ["test"] * 3 + ["val"] + ["train"] * 8 + ["restval"]
    images = val + train
    named = [(split, name, person) for split, (_, name, person) in zip(splits, images, strict=True)]
    document = _karpathy(named, "coco")
    for entry, (image, name, _) in zip(document["images"], images, strict=True):
        entry |= {"filepath": name.split("_")[1], "cocoid": image}
    write_json(root / "dataset_coco.json", document)


def _write_nocaps(root: Path) -> None:
    names = ["0013ea2087020901.jpg", "00a0a634ca8cbe3a.jpg", "00d5a5c5a4d5a5a0.jpg", "01a1c0ea0d1f2b3c.jpg"]
    domains = ["in-domain", "near-domain", "out-domain", "near-domain"]
    images = list(zip(range(len(names)), names, people(HELD_OUT), strict=True))
    document = coco_captions(images)
    for entry, domain in zip(document["images"], domains, strict=True):
        stem = Path(entry["file_name"]).stem
        entry |= {"open_images_id": stem, "domain": domain, "date_captured": "2018-11-06 11:04:33"}
        write_image(root / "val" / entry["file_name"], images[entry["id"]][2].pixels)
    write_json(root / "nocaps_val_4500_captions.json", document)
    test = [{key: entry[key] for key in ("id", "open_images_id", "file_name")} for entry in document["images"][:2]]
    for entry in test:
        write_image(root / "test" / entry["file_name"], images[entry["id"]][2].pixels)
    write_json(root / "nocaps_test_image_info.json", {"info": {}, "images": test, "licenses": []})


def _write_flickr30k(root: Path) -> None:
    persons = people(HELD_OUT) + people(TRAIN)
    splits = ["test"] * 3 + ["val"] + ["train"] * 9
    images = [
        (split, f"{1007129816 + n}.jpg", person) for n, (split, person) in enumerate(zip(splits, persons, strict=True))
    ]
    for _, name, person in images:
        write_image(root / "flickr30k-images" / name, person.pixels)
    write_json(root / "dataset_flickr30k.json", _karpathy(images, "flickr30k"))


def _write_drawing(root: Path) -> None:
    write_json(root / "annotations" / "captions_val2014.json", coco_captions(coco_images(root)))


def _write_geneval(root: Path) -> None:
    bench, cow = ({"class": name, "count": 1} for name in ("bench", "cow"))
    two = {"class": "bench", "count": 2}
    above, red, blue = {"position": ["above", 0]}, {"color": "red"}, {"color": "blue"}
    lines = [
        {"tag": "single_object", "include": [bench], "prompt": "a photo of a bench"},
        {"tag": "two_object", "include": [bench, cow], "prompt": "a photo of a bench and a cow"},
        {"tag": "counting", "include": [two], "exclude": [two | {"count": 3}], "prompt": "a photo of two benchs"},
        {"tag": "colors", "include": [cow | red], "prompt": "a photo of a red cow"},
        {"tag": "position", "include": [cow, bench | above], "prompt": "a photo of a bench above a cow"},
        {"tag": "color_attr", "include": [cow | red, bench | blue], "prompt": "a photo of a red cow and a blue bench"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    root.mkdir(parents=True, exist_ok=True)
    (root / "evaluation_metadata.jsonl").write_text(text, encoding="utf-8")


DPG_COLUMNS = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed")
DPG_COLUMNS += ("tuple", "question_natural_language")


def _write_dpg(root: Path) -> None:
    asked = [
        (1, "0", "entity - whole (bales)", "Are there bales?"),
        (2, "1", "attribute - color (bale, red)", "Is a bale red?"),
    ]
    texts = {
        "partiprompts97": "A red bale of hay.",
        "drawtext3": "Two bales of hay, one of them red, in a field.",
    }
    rows = [[*DPG_COLUMNS]]
    for item, text in texts.items():
        (root / "prompts").mkdir(parents=True, exist_ok=True)
        (root / "prompts" / f"{item}.txt").write_text(text, encoding="utf-8")
        rows += [[item, text, "", str(n), parents, "", "", *rest] for n, parents, *rest in asked]
    with (root / "dpg_bench.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


# ---------------------------------------------------------------- stories


def _write_vist(root: Path) -> None:
    """Two stories in each split, about the same photos in val, and in another order in test."""
    persons = people(HELD_OUT) + people(TRAIN)
    for split, first in (("val", 4602435), ("test", 7035207)):
        photos = [(str(first + n), person) for n, person in enumerate(persons[:5] if split == "val" else persons[5:10])]
        annotations = []
        for number, begun in enumerate(("we met", "there was")):
            turn = number if split == "test" else 0
            for order, (photo, person) in enumerate(photos[turn:] + photos[:turn]):
                annotation = {
                    "original_text": f"{begun.capitalize()} a {person.role}.",
                    "album_id": "44277",
                    "photo_flickr_id": photo,
                    "setting": ("first-2-pick-and-tell", "last-3-tell-old")[number],
                    "worker_id": "FJROI8NWDRIPAM1",
                    "story_id": str(first // 100 + number),
                    "tier": "story-in-sequence",
                    "worker_arranged_photo_order": order,
                    "text": f"{begun} a {person.role} .",
                    "storylet_id": str(10 * number + order),
                }
                annotations.append([annotation])
        for photo, person in photos:
            write_image(root / "images" / f"{photo}.jpg", person.pixels)
        images = [{"id": photo, "album_id": "44277", "title": "", "tags": ""} for photo, _ in photos]
        document = {"images": images, "annotations": annotations, "albums": [], "info": {}}
        write_json(root / "sis" / f"{split}.story-in-sequence.json", document)


# ---------------------------------------------------------------- questions about images


def tens(*answers: tuple[str, int]) -> list[dict]:
    """Ten people's answers, each with how many gave it."""
    given = [answer for answer, times in answers for _ in range(times)]
    return [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(given, 1)]


def _vqa(
    root: Path, version: str, split: str, asked: Callable[[Person], list[tuple[str, str, str, list[dict]]]]
) -> None:
    """`asked`: a person -> (question, question_type, answer_type, answers) each."""
    questions, annotations = [], []
    for image, _, person in coco_images(root, split):
        for number, (text, question_type, answer_type, answers) in enumerate(asked(person)):
            key = {"question_id": 1000 * image + number, "image_id": image}
            questions.append(key | {"question": text})
            known = {"question_type": question_type, "answer_type": answer_type, "answers": answers}
            annotations.append(key | known | {"multiple_choice_answer": answers[0]["answer"]})
    header = {"info": {"version": "2.0"}, "license": {}, "data_type": "mscoco", "data_subtype": split}
    write_json(
        root / f"{version}OpenEnded_mscoco_{split}_questions.json",
        header | {"task_type": "Open-Ended", "questions": questions},
    )
    write_json(root / f"{version}mscoco_{split}_annotations.json", header | {"annotations": annotations})


def _write_vqav2(root: Path) -> None:
    def asked(person: Person) -> list[tuple[str, str, str, list[dict]]]:
        return [
            ("What skin tone does the person have?", "what", "other", tens((person.tone, 8), ("brown", 2))),
            (f"Is this a {person.role}?", "is this a", "yes/no", tens(("yes", 10))),
            ("How many people are there?", "how many", "number", tens(("1", 9), ("one", 1))),
        ]

    for split in ("val2014", "train2014"):
        _vqa(root, "v2_", split, asked)
    persons = people(HELD_OUT)
    for split in ("test2015", "test-dev2015"):
        questions = []
        for image, person in zip((1, 14), persons, strict=False):
            write_image(root / "test2015" / f"COCO_test2015_{image:012d}.jpg", person.pixels)
            text = "What skin tone does the person have?"
            questions.append({"image_id": image, "question": text, "question_id": 1000 * image})
        document = {"task_type": "Open-Ended", "data_subtype": split, "questions": questions}
        write_json(root / f"v2_OpenEnded_mscoco_{split}_questions.json", document)


def _write_okvqa(root: Path) -> None:
    def asked(person: Person) -> list[tuple[str, str, str, list[dict]]]:
        answers = tens((person.role, 8), ("person", 2))
        for answer in answers:
            answer["raw_answer"] = answer["answer"]
        return [("What is a person like this called?", "four", "other", answers)]

    for split in ("val2014", "train2014"):
        _vqa(root, "", split, asked)


def _write_vizwiz(root: Path) -> None:
    for split, of in (("val", HELD_OUT), ("train", TRAIN), ("test", HELD_OUT)):
        records = []
        for number, person in enumerate(people(of)):
            name = f"VizWiz_{split}_{number:08d}.jpg"
            write_image(root / split / name, person.pixels)
            record: dict[str, Any] = {"image": name, "question": "What skin tone does this person have?"}
            answers, kind = tens((person.tone, 7), ("unanswerable", 3)), "other"
            if number == 3:  # nothing is written in these images
                record["question"] = "What does the label say?"
                answers, kind = tens(("unanswerable", 9), ("no label", 1)), "unanswerable"
            if split != "test":
                for answer in answers:
                    del answer["answer_id"]
                record |= {"answers": answers, "answer_type": kind, "answerable": int(kind == "other")}
            records.append(record)
        write_json(root / "Annotations" / f"{split}.json", records)


def _write_textvqa(root: Path) -> None:
    for split, first, persons in (("val", 34602, people(HELD_OUT)), ("train", 0, people(TRAIN)), ("test", 39602, None)):
        data = []
        for number, person in enumerate(persons or people(HELD_OUT)):
            image = f"{split[:2]}{number:014x}"
            write_image(root / ("test_images" if split == "test" else "train_images") / f"{image}.jpg", person.pixels)
            entry = {"question": "what is written here?", "image_id": image, "image_classes": ["Person"]}
            entry |= {"image_width": 128, "image_height": 128, "question_id": first + number, "set_name": split}
            if split != "test":
                entry["answers"] = ["nothing"] * 7 + ["Lay's", "lays", "answering does not require reading text"]
            data.append(entry)
        document = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
        write_json(root / f"TextVQA_0.5.1_{split}.json", document)


def _write_gqa(root: Path) -> None:
    def asked(first: int, image: str, person: Person, balanced: int, answers: bool = True) -> dict[str, dict]:
        """Four questions about an image, the last of which balancing leaves out."""
        light = "yes" if person.tone == "light" else "no"
        four = [
            ("Is the skin tone light?", light, "verify", "attr", None, [1, 3]),
            ("What skin tone does the person have?", person.tone, "query", "attr", "tone", [0]),
            ("Who is in the image?", person.role, "query", "cat", "person", []),
            ("Is there a person or a cat?", "person", "choose", "obj", None, [2, 3]),
        ]
        found = {}
        for number, (text, answer, structural, semantic, group, entailed) in enumerate(four[:balanced]):
            entry: dict[str, Any] = {"question": text, "imageId": image, "isBalanced": number < 3}
            if answers:
                entry |= {"answer": answer, "fullAnswer": f"It is {answer}.", "equivalent": [f"{first + number}"]}
                entry |= {"types": {"structural": structural, "semantic": semantic, "detailed": "existAttr"}}
                entry |= {"groups": {"global": group, "local": None}, "entailed": [f"{first + n}" for n in entailed]}
            found[f"{first + number}"] = entry
        return found

    for split, of, balanced in (
        ("testdev_balanced", HELD_OUT, 3),
        ("testdev_all", HELD_OUT, 4),
        ("val_balanced", HELD_OUT, 3),
        ("val_all", HELD_OUT, 4),
        ("train_balanced", TRAIN, 3),
        ("submission_all", HELD_OUT, 4),
    ):
        document: dict[str, dict] = {}
        for number, person in enumerate(people(of)):
            image = f"n16131{number}" if of == HELD_OUT else f"23{number:05d}"
            write_image(root / "images" / f"{image}.jpg", person.pixels)
            first = (201307000 if of == HELD_OUT else 7000000) + 10 * number
            document |= asked(first, image, person, balanced, answers=split != "submission_all")
        write_json(root / f"{split}_questions.json", document)


def _write_pope(root: Path) -> None:
    absent = {
        "random": ("snowboard", "oven", "kite"),
        "popular": ("car", "chair", "cup"),
        "adversarial": ("cat", "tie"),
    }
    for kind, objects in absent.items():
        lines: list[dict[str, Any]] = []
        for _, name, person in coco_images(root):
            for other in objects[:2]:
                for thing, label in ((person.role, "yes"), (other, "no")):
                    text = f"Is there a {thing} in the image?"
                    lines.append({"question_id": len(lines) + 1, "image": name, "text": text, "label": label})
        path = root / f"coco_pope_{kind}.json"  # JSON lines
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# ---------------------------------------------------------------- dialogues


def _write_visdial(root: Path) -> None:
    tones = ["light", "medium-light", "medium", "medium-dark", "dark"]
    asked = ["what skin tone does the person have", "is it a photo", "how many people are there"]
    for split, of in (("val", HELD_OUT), ("train", TRAIN), ("test", HELD_OUT)):
        said = [*tones, "yes", "no", "1", "2", "can't tell"]
        dialogues, dense = [], []
        ids = TRAIN_IDS if split == "train" else (185565, 284024, 574189, 478132)
        for number, (image, person) in enumerate(zip(ids, people(of), strict=True)):
            folder = ("train2014", "val2014")[number % 2] if split == "train" else f"VisualDialog_{split}2018"
            stem = f"COCO_{folder}" if split == "train" else folder
            write_image(root / folder / f"{stem}_{image:012d}.jpg", person.pixels)
            rounds = []
            for question, answer in enumerate((person.tone, "no", "1")):
                options = [(n + image) % len(said) for n in range(len(said))]
                index = said.index(answer)
                where = options.index(index)
                rounds.append({"question": question, "answer": index, "answer_options": options, "gt_index": where})
            if split == "test":  # no more than the dialogue up to its last question
                rounds = rounds[: 1 + number % 3]
                rounds = [{key: r[key] for key in ("question", "answer")} for r in rounds[:-1]] + [
                    {key: rounds[-1][key] for key in ("question", "answer_options")}
                ]
            dialogues.append({"image_id": image, "caption": person.captions[1], "dialog": rounds})
            if split == "val":
                judged = rounds[number % 3]
                relevance = [0.0] * len(said)
                relevance[judged["gt_index"]], relevance[(judged["gt_index"] + 1) % len(said)] = 1.0, 0.4
                dense.append({"image_id": image, "round_id": 1 + number % 3, "gt_relevance": relevance})
        data = {"questions": asked, "answers": said, "dialogs": dialogues}
        write_json(root / f"visdial_1.0_{split}.json", {"version": "1.0", "split": f"{split}2018", "data": data})
        if split == "val":
            write_json(root / "visdial_1.0_val_dense_annotations.json", dense)


# ---------------------------------------------------------------- questions about videos


def _video_questions(first: int, videos: range, persons: tuple[Person, ...]) -> list[dict]:
    records = []
    for video, person in zip(videos, persons, strict=True):
        pairs = [
            ("what skin tone does the person have?", person.tone),
            (f"who is moving, a {person.role} or a cat?", person.role),
            ("is the person moving?", "yes"),
        ]
        for text, answer in pairs:
            records.append({"answer": answer, "id": first + len(records), "question": text, "video_id": video})
    return records


def _write_msvdqa(root: Path) -> None:
    clips = ["-4wsuPCjDBc_5_15", "-7KMZQEsJW4_205_208", "-8y1Q0rA3n8_108_115", "-8y1Q0rA3n8_95_102"]
    clips += [f"-9CUm-2cui8_{start}_{start + 5}" for start in range(39, 84, 5)]
    for clip, person in zip(clips, people(HELD_OUT) + people(TRAIN), strict=True):
        write_moving_image(root / "YouTubeClips" / f"{clip}.avi", person.pixels)
    lines = [f"{clip} vid{number}\n" for number, clip in enumerate(clips, 1)]
    (root / "youtube_mapping.txt").write_text("".join(lines), encoding="utf-8")
    write_json(root / "test_qa.json", _video_questions(36000, range(1, 5), people(HELD_OUT)))
    write_json(root / "val_qa.json", _video_questions(30000, range(1, 3), people(HELD_OUT)[:2]))
    write_json(root / "train_qa.json", _video_questions(0, range(5, 14), people(TRAIN)))


def _write_msrvttqa(root: Path) -> None:
    parts = [
        ("test", 7010, "TestVideo", people(HELD_OUT), 158581),
        ("val", 6513, "TrainValVideo", people(HELD_OUT)[:2], 149075),
        ("train", 0, "TrainValVideo", people(TRAIN), 0),
    ]
    for split, first, folder, persons, question in parts:
        videos = range(first, first + len(persons))
        for video, person in zip(videos, persons, strict=True):
            write_moving_image(root / folder / f"video{video}.mp4", person.pixels)
        records = [record | {"category_id": 14} for record in _video_questions(question, videos, persons)]
        write_json(root / f"{split}_qa.json", records)


NEXT_COLUMNS = ("video", "frame_count", "width", "height", "question", "answer", "qid", "type")


def _write_nextqa(root: Path) -> None:
    videos: dict[str, str] = {}
    second: dict[str, dict[str, str]] = {}
    for split, first, persons in (
        ("test", 4924794333, people(HELD_OUT)),
        ("val", 3233088823, people(HELD_OUT)[:2]),
        ("train", 3606518674, people(TRAIN)),
    ):
        rows = []
        for number, person in enumerate(persons):
            video = str(first + number)
            videos[video] = f"{1000 + number}/{video}"
            write_moving_image(root / "NExTVideo" / f"{videos[video]}.mp4", person.pixels)
            start = (video, 16, 96, 64)
            rows.append((*start, "what is the person s skin tone", person.tone, 0, "DO"))
            rows.append((*start, "who moves in the video", person.role, 1, "DO"))
            rows.append((*start, "how does the person get to the right", "moves", 2, "CH"))
            if split == "test" and number == 0:
                second[video] = {"0": f"{person.tone} skin", "1": "a person", "2": "slide"}
        with (root / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([NEXT_COLUMNS, *rows])
    write_json(root / "map_vid_vidorID.json", videos)
    write_json(root / "add_reference_answer_test.json", second)


# ---------------------------------------------------------------- open questions


def _write_mmvet(root: Path) -> None:
    document = {}
    for number, person in enumerate(people(HELD_OUT)):
        name = f"v1_{number}.png"
        write_image(root / "images" / name, person.pixels)
        question, answer, needed = [
            ("Describe the person.", f"{person.role}<AND>{person.tone} skin tone", ["rec", "gen"]),
            ("What skin tone does the person have?", f"{person.tone}<OR>{person.tone} skin tone", ["rec"]),
        ][number % 2]
        document[f"v1_{number}"] = {
            "imagename": name,
            "question": question,
            "answer": answer,
            "imagesource": "Fluent Emoji",
            "capability": needed,
        }
    write_json(root / "mm-vet.json", document)


WRITERS: dict[str, Callable[[Path], None]] = {
    "coco": _write_coco,
    "nocaps": _write_nocaps,
    "flickr30k": _write_flickr30k,
    "vqav2": _write_vqav2,
    "okvqa": _write_okvqa,
    "vizwiz": _write_vizwiz,
    "visdial": _write_visdial,
    "msvdqa": _write_msvdqa,
    "msrvttqa": _write_msrvttqa,
    "nextqa": _write_nextqa,
    "mmvet": _write_mmvet,
    "pope": _write_pope,
    "gqa": _write_gqa,
    "textvqa": _write_textvqa,
    "mmbench": write_mmbench,
    "mmmu": write_mmmu,
    "seedbench": write_seedbench,
    "coco_drawing": _write_drawing,
    "geneval": _write_geneval,
    "dpg": _write_dpg,
    "vist": _write_vist,
    "vist_drawing": _write_vist,
}
