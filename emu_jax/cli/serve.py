"""`emu-jax serve`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emu_jax.cli.options import (
    add_compilation_cache,
    add_mesh,
    add_weights,
    mesh,
    model,
    path,
    use_compilation_cache,
    use_users_cache,
)
from emu_jax.errors import UserError

ABOUT = "Serve a model to browsers (a page) and to programs (an HTTP API for OpenAI's clients)."
EXAMPLE = "emu-jax serve --checkpoint runs/quickstart --port 7860"
LIMITS = (
    *("text_slots", "drawing_slots", "waiting", "seconds", "new_tokens", "steps"),
    *("upload_seconds", "head_seconds", "answer_seconds", "half_closed_seconds", "connections"),
    *("decoders", "decode_seconds"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        "--model",
        type=model,
        help="work directory, checkpoint or published files (default: emu-mini, the model in the box)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but this machine's own needs EMU_JAX_API_KEY"
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any free port")
    parser.add_argument("--name", help="name of the model in the API (default: the folder's)")
    parser.add_argument("--tokenizer", type=path, help="SentencePiece .model, needed by published files")
    add_weights(parser)
    parser.add_argument("--decoder", type=model, help="folder with unet and vae (default: the model's own)")
    parser.add_argument(
        "--no-safety-checker", dest="safety_checker", action="store_false", help="do not use the safety checker"
    )
    parser.add_argument("--no-page", dest="page", action="store_false", help="serve the API without the page")
    add_mesh(parser, "data=1 tensor=8")
    parser.add_argument("--text-slots", type=int, default=16, help="texts that are generated at the same time")
    parser.add_argument("--drawing-slots", type=int, default=4, help="images that are drawn at the same time")
    parser.add_argument("--waiting", type=int, default=128, help="requests that may wait; more are answered with 429")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of a request, with its wait")
    parser.add_argument("--new-tokens", type=int, default=1024, help="most tokens of a text")
    parser.add_argument("--steps", type=int, default=200, help="most sampling steps")
    parser.add_argument(
        "--body-seconds",
        type=float,
        help="longest pause within an upload (default: 0.9 on this machine's own address, otherwise 10)",
    )
    parser.add_argument("--upload-seconds", type=float, default=120.0, help="time limit of an upload")
    parser.add_argument("--head-seconds", type=float, default=10.0, help="time limit of a request's headers")
    parser.add_argument(
        "--answer-seconds", type=float, default=30.0, help="time in which a client has to read some of its answer"
    )
    parser.add_argument(
        "--half-closed-seconds",
        type=float,
        default=5.0,
        help="time in which the answer begins for a client that has stopped sending, as one that has left",
    )
    parser.add_argument("--connections", type=int, default=512, help="most connections that are open")
    parser.add_argument("--decoders", type=int, default=2, help="processes that decode images")
    parser.add_argument("--decode-seconds", type=float, default=30.0, help="time to decode a request's images")
    parser.add_argument(
        "--decode-megabytes", type=int, default=2048, help="memory of a process that decodes images (on Linux)"
    )
    add_compilation_cache(parser)


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import logging
    import os

    try:
        from emu_jax.serve import server
        from emu_jax.serve.limits import MEGA, Limits
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}, which is missing; pip install 'emu-jax[serve]'") from error
    limits = {name: getattr(options, name) for name in LIMITS}
    limits["body_seconds"] = server.body_seconds(options.host) if options.body_seconds is None else options.body_seconds
    limits["decode_bytes"] = options.decode_megabytes * MEGA
    fields = ("checkpoint", "host", "port", "name", "tokenizer", "decoder", "safety_checker", "page", "weights")
    settings = server.Options(
        **{name: getattr(options, name) for name in fields},
        key=os.environ.get(server.KEY_VARIABLE) or None,
        mesh=mesh(options.mesh),
        limits=Limits(**limits),
    )
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("emu_jax").setLevel(logging.INFO)
    if options.compilation_cache is None:
        use_users_cache()
    use_compilation_cache(options.compilation_cache)
    print(
        f"serving {settings.folder} as {settings.model_name}; the first requests wait for programs to compile",
        flush=True,
    )
    server.serve(settings, lambda address: print(f"{address} (API: {address}/v1); Ctrl-C stops", flush=True))
    return 0
