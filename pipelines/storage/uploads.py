"""Cleanup of what dead runs left unfinished.

On S3 these are multipart uploads, which listings hide and which are billed until aborted. In a local folder they are
hidden files that were never renamed.
"""

import logging

from pipelines.storage import uris
from pipelines.storage.filesystem import ASIDE_NAME, list_names, open_filesystem, remove

log = logging.getLogger(__name__)


def abort_unfinished_uploads(folder_uri: str) -> int:
    """Abort the unfinished multipart uploads below a folder on S3, or remove the unfinished files of a local folder.

    Call this only while holding the lease on the folder: the uploads of a live process would fail. A store that denies
    the calls (`s3:ListBucketMultipartUploads`, `s3:AbortMultipartUpload`) causes a warning, not an error.

    Returns:
        Number of uploads aborted or files removed.
    """
    if uris.is_local(folder_uri):
        return _remove_unfinished_files(folder_uri)
    if uris.protocol_of(folder_uri) != "s3":
        return 0
    bucket, prefix = uris.split_bucket(folder_uri)
    filesystem, _ = open_filesystem(folder_uri, is_written=True)
    num_aborted = 0
    marks: dict[str, str] = {}
    try:
        while True:
            page = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **marks)
            for upload in page.get("Uploads", []):
                filesystem.call_s3(
                    "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
                num_aborted += 1
            if not page.get("IsTruncated"):
                break
            marks = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
    except Exception as error:  # stores without this API fail in unpredictable ways
        log.warning("unfinished multipart uploads below %s could not be aborted: %s", folder_uri, error)
    if num_aborted:
        log.info("aborted %d unfinished multipart uploads of earlier runs below %s", num_aborted, folder_uri)
    return num_aborted


def _remove_unfinished_files(folder: str) -> int:
    names = [name for name in list_names(folder) if ASIDE_NAME.fullmatch(name)]
    for name in names:
        remove(uris.join(folder, name))
    if names:
        log.info("removed %d unfinished files of earlier runs from %s", len(names), folder)
    return len(names)
