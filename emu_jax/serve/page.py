"""The web page for trying a model: chat, draw, continue documents, few-shot prompts.

It is mounted beside the HTTP API and uses the same engine. It loads nothing from other sites, and stores all uploads
and results in one folder.
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

CLEAN_UP = (300, 3600)  # seconds between searches for old files, and their maximum age
LOGIN_MESSAGE = "The password is the server's key; the user name can be anything."
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
THEME = gr.themes.Soft(
    primary_hue="indigo",
    secondary_hue="slate",
    neutral_hue="slate",
    radius_size="md",
    font=SYSTEM_FONTS,
    font_mono=MONOSPACE,
).set(  # quiet labels
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
    """Builds the page of an engine, and writes its example images into GRADIO_TEMP_DIR."""
    samples = write_samples()
    with gr.Blocks(title=f"{name} · emu_jax", analytics_enabled=False, delete_cache=CLEAN_UP) as page:
        gr.HTML(_header(engine, name), elem_id="top")
        with gr.Tabs(elem_id="tabs"):
            for label, tab in (("Chat", chat), ("Draw", draw), ("Document", document), ("Few-shot", few_shot)):
                with gr.Tab(label):
                    tab.show(engine, name, samples)
    return page.queue(api_open=False, default_concurrency_limit=None)


def mount(app: FastAPI, engine: Engine, name: str, key: str | None, folder: Path) -> FastAPI:
    """Adds the page at / to an application.

    Args:
      key: the login's password, with any user name; None: no login.
      folder: for all files of the page; the caller removes it at the end.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder.resolve())  # gradio reads these variables late
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"

    def allowed(user: str, password: str) -> bool:
        return key is not None and hmac.compare_digest(password.encode(), key.encode())

    app = gr.mount_gradio_app(
        app,
        build(engine, name),
        path="/",
        auth=None if key is None else allowed,
        auth_message=None if key is None else LOGIN_MESSAGE,
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
