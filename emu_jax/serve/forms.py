"""Forms (multipart/form-data) of OpenAI's clients that send image files -> the JSON fields of the same request.

Nothing is written to disk: the guard has bounded and read the body, and files stay in memory.
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from emu_jax.serve.limits import LimitError, Limits
from emu_jax.serve.openai_json import refuse
from emu_jax.serve.parts import FileField, ImageField

FILES = ("image", "image[]", "images", "images[]")  # names under which clients send images
MAX_FIELDS = 100


class _Parser(MultiPartParser):
    def __init__(self, request: Request, limits: Limits):
        # One file more than allowed, so that the error is the usual one of too many images.
        super().__init__(
            request.headers,
            request.stream(),
            max_files=limits.images + 1,
            max_fields=MAX_FIELDS,
            max_part_size=limits.body_bytes,
        )
        self.spool_max_size = limits.body_bytes + 1  # never on disk


async def read_form(request: Request, limits: Limits) -> tuple[dict[str, Any], list[FileField | ImageField]]:
    """The form's fields, all of them texts, and its images: files, or data URLs.

    Raises:
      LimitError: the body is no form, a field is given twice, or is a file where a text belongs.
    """
    try:
        form = await _Parser(request, limits).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise LimitError("body", f"the body is not multipart/form-data ({error})") from error
    fields: dict[str, Any] = {}
    images: list[FileField | ImageField] = []
    try:
        for name, value in form.multi_items():
            if name in FILES:
                where = f"{name.removesuffix('[]')}[{len(images)}]"
                if isinstance(value, UploadFile):
                    images.append(FileField(await value.read(), where))
                else:
                    images.append(ImageField(value, where))
            elif isinstance(value, UploadFile):
                raise LimitError(name[:100], f"{name[:100]} is a file, and is not supported here; leave it out")
            elif name in fields:
                raise refuse(name[:100], value, "to be given once")
            elif value:  # a form's way to leave a field out
                fields[name] = value
    finally:
        await form.close()
    return fields, images
