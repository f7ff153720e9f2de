"""Emu as a model of lmms-eval, in its two kinds: tasks hand "chat" models messages, "simple" ones a text and images.

    requests ─ read ahead by threads ─ prompts ─ batches of one kind ─ Emu ─ answers, in the requests' order

lmms-eval starts N processes, as `accelerate launch` or `torchrun` does, gives each its share of the questions, and
gathers the answers with torch.distributed. Each process is a JAX program of its own, with its own copy of the model.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from emu_jax.data.padding import pad_to
from emu_jax.errors import UserError, nearest
from emu_jax.evaluate.lmms.requests import (
    Settings,
    Turn,
    prompt,
    read_messages,
    read_settings,
    read_turns,
    read_visuals,
)
from emu_jax.evaluate.prompts import Part
from emu_jax.evaluate.read_ahead import read_ahead
from emu_jax.generate.candidates import RULES
from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import LENGTH_BUCKET, spell

AHEAD = 2  # batches of requests whose images are read before they are needed
ARGUMENTS = ("model", "tokenizer", "vision_head_dim", "tuned", "weights", "mesh", "frames", "begins", "rule")

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A prompt, and the places of its requests among all: one, or one for each of the candidates.

    Attributes:
      where: names the prompt in errors.
    """

    parts: tuple[Part, ...]
    where: str
    places: tuple[int, ...]
    candidates: tuple[str, ...] = ()
    settings: Settings | None = None


class SimpleEmu(lmms):
    """The simple kind, for all tasks: those that score answers (`multiple_choice`) have no other."""

    is_simple = True

    def __init__(
        self,
        model: str = "",
        tokenizer: str | None = None,
        vision_head_dim: int | None = None,
        tuned: bool = False,
        weights: str = "auto",
        mesh: str = "",
        frames: int = 8,
        begins: str = "",
        rule: str = "tokens",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        """Loads the model.

        Args:
          model, tokenizer, vision_head_dim, tuned, weights: as in `Emu.load`.
          mesh: axes of a mesh of this process's devices, e.g. "data=4 tensor=2".
          frames: images that are shown of a video.
          begins: words that begin each answer of a model that chats, such as the reference's "the answer is:".
          rule: one of `candidates.RULES`, by which `multiple_choice` compares answers. Built-in models of lmms-eval
            compare means over an answer's tokens.
          batch_size: prompts at a time.

        Raises:
          UserError: an argument that is missing, unknown or cannot work, or there is no such model.
        """
        super().__init__()
        for name in unknown:
            raise UserError(f"model_args {name} is unknown; did you mean {nearest(name, ARGUMENTS)}?")
        if not model:
            raise UserError("model_args model is missing; name a work directory, a checkpoint or emu-mini")
        if device is not None or max_batch_size is not None:
            name = "device" if device is not None else "max_batch_size"
            raise UserError(f"--{name} means nothing here; leave it out: JAX_PLATFORMS chooses devices")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: expected a whole number of 1 or more")
        if not isinstance(frames, int) or frames < 1:
            raise UserError(f"model_args frames={frames}: expected 1 or more images of a video")
        if rule not in RULES:
            raise UserError(f"model_args rule={rule}: expected one of {', '.join(RULES)}")
        self.accelerator = Accelerator()  # for lmms-eval, which gathers by it; JAX does not use it
        self.device = self.accelerator.device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            _take_one_gpu(self.accelerator.local_process_index)
        self.batch_size, self.frames, self.begins, self.rule = int(batch_size), frames, begins, rule
        self.emu = Emu.load(
            str(model),
            tokenizer=tokenizer,
            vision_head_dim=vision_head_dim,
            tuned=tuned,
            weights=weights,
            mesh=_read_mesh(mesh),
        )
        self._batches = 0  # run so far: each samples with another seed

    # ------------------------------------------------------------ what lmms-eval calls

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in the requests' order."""
        answers = [""] * len(requests)

        def read(place: int) -> _Asked:
            turns, given, where = self._question(requests[place].args)
            return self._read(turns, where, (place,), settings=read_settings(given, where))

        # Long texts first: what does not fit the memory fails at once.
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place].args[0]))
        for (settings, new_tokens), batch in self._run(read, order, self._length):
            prompts = [asked.parts for asked in pad_to(batch, self.batch_size)]
            seed = settings.seed + self._batches * self.world_size + self.rank
            self._batches += 1
            options = dict(settings.decoding)
            results = self.emu.generate_text(prompts, max_new_tokens=new_tokens, seed=seed, **options)
            for asked, result in zip(batch, results, strict=False):  # the rest is padding
                answers[asked.places[0]] = settings.cut(result.text)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each request (how unlikely its answer is, whether greedy decoding begins with it).

        As lmms-eval's own models do, and as its `multiple_choice` expects, this returns losses: the lowest is the best.
        A plain pair would be turned into a text (`unwrap_generation_output`, 0.7.3), which no metric can read.
        """
        results: list[Any] = [None] * len(requests)
        together: dict[Hashable, list[int]] = collections.defaultdict(list)  # answers to one question are one prompt's
        for place, request in enumerate(requests):
            if len(request.args) != 6:
                raise UserError(
                    f"task {request.task_name}: acc_mutual_info compares log-likelihoods, but acc compares losses, "
                    "which emu_jax returns; expected acc, acc_norm or exact_match"
                )
            context, _, _, *document = request.args
            together[(context, *document)].append(place)

        def read(places: list[int]) -> _Asked:
            context, _, doc_to_visual, *document = requests[places[0]].args
            doc, where = self._document(*document)
            turns = read_visuals(context, doc_to_visual(doc) if doc_to_visual else None, self.frames, where)
            targets = [requests[place].args[1] for place in places]
            # Tokens begin with a space of their own.
            texts = [(target(doc) if callable(target) else target).strip() for target in targets]
            return self._read(turns, where, tuple(places), candidates=tuple(texts))

        for _, batch in self._run(read, list(together.values()), lambda asked: ()):
            filled = pad_to(batch, self.batch_size)
            prompts, candidates = [asked.parts for asked in filled], [asked.candidates for asked in filled]
            scored = self.emu.score_candidate_lists(prompts, candidates)
            for asked, scores in zip(batch, scored, strict=False):  # the rest is padding
                for place, loss, greedy in zip(asked.places, scores.by(self.rule), scores.greedy, strict=True):
                    results[place] = GenerationResult((float(loss), bool(greedy)))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise UserError(f"task {requests[0].task_name}: emu_jax does not support generate_until_multi_round")

    # ------------------------------------------------------------ from requests to batches

    def _document(self, doc_id: int, task: str, split: str) -> tuple[Any, str]:
        """A task's question, and its name in errors."""
        return self.task_dict[task][split][doc_id], f"task {task}, question {doc_id}"

    def _question(self, arguments: tuple) -> tuple[list[Turn], dict[str, Any], str]:
        """What is said and shown, generation_kwargs, and the question's name in errors."""
        context, given, doc_to_visual, *document = arguments
        doc, where = self._document(*document)
        return read_visuals(context, doc_to_visual(doc) if doc_to_visual else None, self.frames, where), given, where

    def _read(self, turns: Sequence[Turn], where: str, places: tuple[int, ...], **more: Any) -> _Asked:
        read, has_video = read_turns(turns, self.emu.config.vision.image_size, where)
        chat = self.emu.tokenizer.instruct
        return _Asked(prompt(read, has_video=has_video, chat=chat, begins=self.begins), where, places, **more)

    def _length(self, asked: _Asked) -> tuple[Settings, int]:
        """The settings, and the maximum number of new tokens: what was asked for, or what fits the context.

        An answer does not depend on the others of its batch: those of one number share batches.
        """
        assert asked.settings is not None
        length = len(self.emu.tokenizer.encode_parts(spell(asked.parts, self.emu.config.causal.queries)))
        context = self.emu.config.llama.context
        padded = -(-length // LENGTH_BUCKET) * LENGTH_BUCKET
        fits = context - (padded if padded < context else length)
        if fits < 1:
            raise UserError(
                f"{asked.where}: the prompt has {length} tokens, and the model takes {context}; expected room for an "
                "answer: show fewer images (frames=…) or a shorter text"
            )
        return asked.settings, min(asked.settings.max_new_tokens, fits)

    def _run(
        self, read: Callable[[Item], _Asked], items: Sequence[Item], kind: Callable[[_Asked], Any]
    ) -> Iterator[tuple[Any, list[_Asked]]]:
        """Batches of prompts of one kind; the last of a kind may be shorter."""
        waiting: dict[Any, list[_Asked]] = collections.defaultdict(list)
        with tqdm(total=len(items), desc="emu_jax", unit="question", disable=self.rank != 0) as bar:
            for asked in read_ahead(read, items, AHEAD * self.batch_size):
                of = kind(asked)
                waiting[of].append(asked)
                if len(waiting[of]) == self.batch_size:
                    yield of, waiting.pop(of)
                    bar.update(self.batch_size)
            for of, batch in waiting.items():
                yield of, batch
                bar.update(len(batch))


class ChatEmu(SimpleEmu):
    """The chat kind: system messages, and images between texts, are where the task has them."""

    is_simple = False

    def _question(self, arguments: tuple) -> tuple[list[Turn], dict[str, Any], str]:
        _, doc_to_messages, given, *document = arguments
        doc, where = self._document(*document)
        return read_messages(doc_to_messages(doc), self.frames, where), given, where


def _read_mesh(text: str) -> dict[str, int] | None:
    """ "data=4 tensor=2" -> {"data": 4, "tensor": 2}; None for ""."""
    sizes = dict(word.partition("=")[::2] for word in str(text).split())
    if not all(size.isdigit() for size in sizes.values()):
        raise UserError(f'model_args mesh={text}: expected axes and their sizes, as in "mesh=data=4 tensor=2"')
    return {axis: int(size) for axis, size in sizes.items()} or None


def _take_one_gpu(number: int) -> None:
    """Shows JAX one of the host's GPUs: otherwise each of its processes would take all of them.

    A launcher that has already given each process its own lists one in CUDA_VISIBLE_DEVICES.
    """
    if "," in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        for vendor in ("cuda", "rocm"):
            jax.config.update(f"jax_{vendor}_visible_devices", str(number))
