"""Small JSON files of an output, validated by a schema and a format version, so that damage is a one-line error."""

from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipelines.errors import DamagedFileError, RequestError
from pipelines.storage.bulk import read_object

Content = TypeVar("Content", bound="Document")
Value = TypeVar("Value")


class Document(BaseModel):
    """Base class of the schemas. Unknown fields, which a later version may add, are ignored.

    Attributes:
        format: Version of the file format. Files without a version count as version 1.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    newest_format: ClassVar[int] = 1

    format: int = 1


def read_document(uri: str, schema: type[Content], advice: str) -> Content:
    """Read and validate a document.

    Args:
        uri: URI of the file.
        schema: Schema of its content.
        advice: What to do if the file is damaged, as the last clause of the error message.

    Raises:
        FileNotFoundError: The file does not exist.
        DamagedFileError: The file is damaged.
        RequestError: A newer version of ecaray wrote the file.
    """
    return parse_document(uri, read_object(uri), schema, advice)


def parse_document(uri: str, content: bytes, schema: type[Content], advice: str) -> Content:
    """Validate the content of a document. See `read_document` for arguments and errors."""
    version = parse_json(uri, content, Document, advice).format
    if version > schema.newest_format:
        raise RequestError(
            f"{uri} has format {version}, but this version of ecaray reads formats up to {schema.newest_format}: use "
            "the version that wrote it"
        )
    return parse_json(uri, content, schema, advice)


def parse_json(uri: str, content: bytes, schema: type[Value], advice: str) -> Value:
    """Validate JSON that has no format version.

    Args:
        uri: URI of the file.
        content: Content of the file.
        schema: Pydantic model or a type such as `dict[str, str]`.
        advice: What to do if the file is damaged, as the last clause of the error message.

    Raises:
        DamagedFileError: The file is damaged.
    """
    try:
        return TypeAdapter(schema).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        location = ".".join(map(str, first["loc"]))
        reason = f"{location}: {first['msg']}" if location else first["msg"]
        raise DamagedFileError(f"{uri} is damaged ({reason}): {advice}") from None


def to_json(document: Document) -> bytes:
    """Serialize a document to the content of its file."""
    return document.model_dump_json(indent=2).encode()
