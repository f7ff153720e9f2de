"""`emu-jax chat`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from emu_jax.cli.options import add_decoding, add_model, decoding, path, use_users_cache
from emu_jax.errors import UserError

ABOUT = "Chat with an instruction-tuned model about images and videos; answers are streamed."
EXAMPLE = "emu-jax chat --model weights/emu-instruct --image cat.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "--checkpoint")
    parser.add_argument("--image", nargs="+", type=path, default=[], help="images to show with the first message")
    parser.add_argument("--video", nargs="+", type=path, default=[], help="videos to show with the first message")
    parser.add_argument(
        "--system", help="system message, '' for none (default: the paper's if the first message shows something)"
    )
    parser.add_argument(
        "--message",
        nargs="+",
        action="extend",
        help="one message for each turn, or commands such as '/image b.png' (default: lines of standard input)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help="longest answer (default: the rest of the context, at most 256)"
    )
    parser.add_argument(
        "--drawings", type=path, default=path("."), help="folder of the images that answers draw (default: this one)"
    )
    add_decoding(parser, beams_help="beam search with this many beams; beams do not stream")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.generate.console import Console, converse, converse_at_terminal
    from emu_jax.generate.model import Emu
    from emu_jax.generate.text import check_decoding

    settings = decoding(options) | {"max_new_tokens": options.max_new_tokens, "seed": options.seed}
    tokens = 1 if options.max_new_tokens is None else options.max_new_tokens
    check_decoding(options.num_beams, tokens, options.temperature, options.top_p)
    use_users_cache()
    emu = Emu.load(
        options.model,
        tokenizer=options.tokenizer,
        tuned=True,
        vision_head_dim=options.vision_head_dim,
        weights=options.weights,
    )
    console = Console(emu.chat(options.system), sys.stdout, settings, options.drawings if emu.decoder else None)
    for video, files in ((False, options.image), (True, options.video)):
        for file in files:
            console.show(file, video=video)
    if options.message is None and sys.stdin.isatty():
        converse_at_terminal(console)
        return 0
    try:
        converse(console, sys.stdin if options.message is None else options.message)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 ({error.reason}); expected one message on each line") from error
    return 0
