"""The page on which a person tries a model: chat, draw, continue documents, prompt with examples.

It is mounted beside the HTTP API and asks the same engine. Nothing of it comes from elsewhere, and all that people
upload and make lies in one folder.
"""

from __future__ import annotations

import hmac
import html
import os
from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from emu_jax.serve.engine import Engine
from emu_jax.serve.page_guard import Filter
from emu_jax.serve.tabs import chat, document, draw, few_shot
from emu_jax.serve.tabs.samples import write_samples

KEEP = (300, 3600)  # seconds: how often old files are looked for, and how old they become
ASKS_FOR_KEY = "The password is the server's key; any user name does."
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
THEME = gr.themes.Soft(
    primary_hue="indigo",
    secondary_hue="slate",
    neutral_hue="slate",
    radius_size="md",
    font=SYSTEM_FONTS,
    font_mono=MONOSPACE,
).set(  # labels are read, not shouted
    block_title_background_fill="transparent",
    block_title_text_color="*body_text_color",
    block_title_text_weight="550",
    block_title_padding="0",
    block_label_background_fill="*background_fill_primary",
    block_label_text_color="*body_text_color_subdued",
    block_label_text_weight="500",
    block_border_width="1px",
    block_shadow="none",
    button_secondary_background_fill="*background_fill_primary",
    button_secondary_border_color="*border_color_primary",
    button_border_width="1px",
    button_primary_shadow="none",
    button_secondary_shadow="none",
    input_border_width="1px",
    input_border_color="*border_color_primary",
    input_shadow="none",
)
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def build(engine: Engine, name: str) -> gr.Blocks:
    """The page of an engine; its examples' images are written into GRADIO_TEMP_DIR."""
    samples = write_samples()
    with gr.Blocks(title=f"{name} · emu_jax", analytics_enabled=False, delete_cache=KEEP) as page:
        gr.HTML(_header(engine, name), elem_id="top")
        with gr.Tabs(elem_id="tabs"):
            for label, tab in (("Chat", chat), ("Draw", draw), ("Document", document), ("Few-shot", few_shot)):
                with gr.Tab(label):
                    tab.show(engine, name, samples)
    return page.queue(api_open=False, default_concurrency_limit=None)


def mount(app: FastAPI, engine: Engine, name: str, key: str | None, folder: Path) -> FastAPI:
    """Adds the page at / to an application.

    Args:
      key: the password that people are asked for, with any user name; None: nobody is asked.
      folder: where all files of the page lie; whoever made it removes it at the end.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder.resolve())  # gradio reads these when it needs them
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"

    def allowed(user: str, password: str) -> bool:
        return key is not None and hmac.compare_digest(password.encode(), key.encode())

    app = gr.mount_gradio_app(
        app,
        build(engine, name),
        path="/",
        auth=None if key is None else allowed,
        auth_message=None if key is None else ASKS_FOR_KEY,
        theme=THEME,
        css=CSS,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=engine.limits.upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        blocked_paths=[],
    )
    mounted = app.router.routes[-1]
    mounted.app = Filter(mounted.app)
    return app


def _header(engine: Engine, name: str) -> str:
    config = engine.plain.config
    facts = [
        "chats" if engine.chats else "does not chat",
        "draws" if engine.draws else "does not draw",
        f"{config.vision.image_size} px images",
        f"context {config.llama.context}",
    ]
    pills = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
    return f'<header><h1>{html.escape(name)}</h1><div class="facts">{pills}</div></header>'
