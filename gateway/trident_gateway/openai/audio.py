"""POST /v1/audio/transcriptions and /v1/audio/translations: a form with a file, as OpenAI's clients send it."""

from __future__ import annotations

import math
import zlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import JSONResponse, PlainTextResponse, Response

from trident_client import AsyncClient, Segment, Transcription, TranscriptionChunk, TranscriptionOptions
from trident_gateway import bodies, calls
from trident_gateway.bodies import Body, Neutral
from trident_gateway.catalog import SPEECH
from trident_gateway.errors import ApiError, invalid
from trident_gateway.gateway import exchange_of, gateway_of
from trident_gateway.openai.sampling import Json, event

router = APIRouter()
_MOST_FIELDS = 64
_NAMES = {"audio": "file"}  # the server's, and the caller's


class AudioForm(Body):
    """The fields of a form beside its file."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    language: Annotated[str, Field(max_length=64)] | None = None
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=False)] | None = None
    timestamp_granularities: list[Literal["segment"]] | None = None
    stream: Annotated[bool, Field(strict=False)] = False
    # What the models here don't do: only the value that asks for nothing is taken.
    prompt: Literal[""] = ""
    # Of no consequence for the answer.
    user: Neutral = None


@router.post("/v1/audio/transcriptions")
async def transcribe(request: Request) -> Response:
    """What is said in a recording, in its language."""
    return await _answered(request, "transcribe")


@router.post("/v1/audio/translations")
async def translate(request: Request) -> Response:
    """What is said in a recording, in English."""
    return await _answered(request, "translate")


async def _answered(request: Request, task: Literal["transcribe", "translate"]) -> Response:
    exchange = exchange_of(request)
    exchange.names = dict(_NAMES)
    form, content = await _read(request)
    model = await gateway_of(request).model(form.model, SPEECH)
    timed = form.response_format in ("verbose_json", "srt", "vtt")
    asked: TranscriptionOptions = {
        "language": form.language or None,
        "task": task,
        "timestamps": timed or None,
        "temperature": form.temperature or None,
    }
    if form.stream:
        if form.response_format != "json":
            raise invalid(f"stream has response_format json, found {form.response_format}", "response_format")
        exchange.stream = True
        chunks = await calls.parts(
            request, model, lambda client: client.stream_transcription(content, model=model.name, **asked)
        )
        return calls.Stream(_events(request, chunks))

    async def ask(client: AsyncClient) -> Transcription:
        return await client.transcribe(content, model=model.name, **asked)

    found = await calls.whole(request, model, ask)
    exchange.tokens(0, found.num_output_tokens)
    if form.response_format == "text":
        return PlainTextResponse(found.text + "\n")
    if form.response_format == "srt":
        return PlainTextResponse(as_srt(found.segments), media_type="application/x-subrip")
    if form.response_format == "vtt":
        return PlainTextResponse(as_vtt(found.segments), media_type="text/vtt")
    used = _usage(found)
    if form.response_format == "json":
        return JSONResponse({"text": found.text, "usage": used})
    segments = [_described(number, segment, form.temperature or 0.0) for number, segment in enumerate(found.segments)]
    whole = {"task": task, "language": found.language, "duration": found.duration, "text": found.text}
    return JSONResponse({**whole, "segments": segments, "usage": used})


async def _events(request: Request, chunks: AsyncGenerator[TranscriptionChunk, None]) -> AsyncGenerator[bytes, None]:
    """The text as server-sent events, as it comes and then all of it."""
    said, count = [], 0
    used: Json = {}
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                count, used = chunk.num_output_tokens, _usage(chunk)
                if chunk.finish_reason == "cancelled":
                    raise ApiError(503, "the server gave the request up: try again", code="cancelled")
                if chunk.text:
                    said.append(chunk.text)
                    yield event({"type": "transcript.text.delta", "delta": chunk.text})
        except ApiError as error:
            exchange_of(request).status = error.status
            yield event(error.openai())
            return
        finally:
            exchange_of(request).tokens(0, count)
    yield event({"type": "transcript.text.done", "text": "".join(said), "usage": used})


def _usage(chunk: TranscriptionChunk) -> Json:
    """What of the recording was used, as OpenAI counts it for models of its class: seconds, each begun one whole."""
    return {"type": "duration", "seconds": math.ceil(chunk.duration)}


async def _read(request: Request) -> tuple[AudioForm, bytes]:
    """The form and its file.

    Raises:
        ApiError: it is no form, lacks its file, or has a field that is not known or not taken.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        found = f"found {media_type[:80]!r}" if media_type else "found none"
        raise ApiError(415, f"the Content-Type must be multipart/form-data, {found}", code="unsupported_media_type")
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=_MOST_FIELDS)
    # In memory, whose limit is the body's: the file system may be read-only.
    parser.spool_max_size = gateway_of(request).settings.max_audio_bytes
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError, ValueError) as error:
        said = error.message if isinstance(error, MultiPartException) else "its boundary or a header can't be read"
        raise invalid(f"the body is no form: {said}", code="invalid_form") from None
    try:
        file = form.get("file")
        if isinstance(file, str):
            raise invalid("file is a text, no file: send a recording, with curl by -F file=@recording.wav", "file")
        if not isinstance(file, UploadFile):
            raise invalid("file is missing: send a recording in the form's field file", "file")
        content = await file.read()
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            if name == "file":
                continue
            if not isinstance(value, str):
                raise invalid(f"{name[:80]} must be a text, found a file", name[:80])
            if name.endswith("[]"):
                fields.setdefault(name[:-2], []).append(value)
            else:
                fields[name] = value
    finally:
        await form.close()
    try:
        return AudioForm.model_validate(fields), content
    except ValidationError as error:
        raise bodies.refusal(error, AudioForm) from None


def _described(number: int, segment: Segment, temperature: float) -> Json:
    text = segment.text.encode()
    return {
        "id": number,
        "seek": 0,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": temperature,
        "avg_logprob": segment.log_prob,
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "no_speech_prob": segment.no_speech,
    }


def as_srt(segments: Sequence[Segment]) -> str:
    """Subtitles in the format of SubRip."""
    blocks = [
        f"{number}\n{_clock(each.start, ',')} --> {_clock(each.end, ',')}\n{_line(each)}\n"
        for number, each in enumerate(segments, 1)
    ]
    return "\n".join(blocks)


def as_vtt(segments: Sequence[Segment]) -> str:
    """Subtitles in the format WebVTT."""
    blocks = [f"{_clock(each.start, '.')} --> {_clock(each.end, '.')}\n{_line(each)}\n" for each in segments]
    return "\n".join(["WEBVTT\n", *blocks])


def _line(segment: Segment) -> str:
    # An arrow would begin another cue.
    return " ".join(segment.text.split()).replace("-->", "->")


def _clock(seconds: float, point: str) -> str:
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"
