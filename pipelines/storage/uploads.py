"""Multipart uploads that dead runs left unfinished: invisible in listings, and billed until they are aborted."""

import logging

from pipelines.storage import uris
from pipelines.storage.filesystem import open_filesystem

log = logging.getLogger(__name__)


def abort_unfinished_uploads(folder_uri: str) -> int:
    """Abort the multipart uploads below a folder on S3; elsewhere there are none.

    An upload of a process that still lives fails when it ends: call this only with the lease on the folder. A store
    that refuses (`s3:ListBucketMultipartUploads`, `s3:AbortMultipartUpload`) costs one log line, and stops nothing.

    Returns:
        How many were aborted.
    """
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
    except Exception as error:  # whatever a store without this call answers
        log.warning("unfinished uploads below %s could not be aborted: %s", folder_uri, error)
    if num_aborted:
        log.info("aborted %d unfinished uploads of earlier runs below %s", num_aborted, folder_uri)
    return num_aborted
