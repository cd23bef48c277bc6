"""The small JSON files of an output: read with a schema and a format version, so that damage is one clear line."""

from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipelines.errors import DamagedFileError, RequestError
from pipelines.storage.bulk import read_object

Content = TypeVar("Content", bound="Document")
Value = TypeVar("Value")


class Document(BaseModel):
    """Base of the schemas. Fields that a later version may add are ignored.

    Attributes:
        format: version of the file's format. Files written before there was one count as version 1.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    newest_format: ClassVar[int] = 1

    format: int = 1


def read_document(uri: str, schema: type[Content], advice: str) -> Content:
    """Read and validate one document.

    Args:
        uri: of the file.
        schema: what it holds.
        advice: what to do where the file is damaged, as the end of a sentence.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is damaged.
        RequestError: a newer version of ecaray wrote it.
    """
    return parse_document(uri, read_object(uri), schema, advice)


def parse_document(uri: str, content: bytes, schema: type[Content], advice: str) -> Content:
    """Validate the content of a document; arguments and errors as for `read_document`."""
    version = parse_json(uri, content, Document, advice).format
    if version > schema.newest_format:
        raise RequestError(
            f"{uri} has format {version}, and this version of ecaray reads formats up to {schema.newest_format}: use "
            "the version that wrote it"
        )
    return parse_json(uri, content, schema, advice)


def parse_json(uri: str, content: bytes, schema: type[Value], advice: str) -> Value:
    """Validate JSON that has no format version.

    Args:
        uri: of the file.
        content: of the file.
        schema: a model or a type, such as `dict[str, str]`.
        advice: what to do where the file is damaged, as the end of a sentence.

    Raises:
        DamagedFileError: the file is damaged.
    """
    try:
        return TypeAdapter(schema).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise DamagedFileError(f"{uri} is damaged ({reason}): {advice}") from None


def to_json(document: Document) -> bytes:
    """Return the content of a document's file."""
    return document.model_dump_json(indent=2).encode()
