"""What boto's exceptions mean here."""

from __future__ import annotations

from boto3.exceptions import Boto3Error, S3UploadFailedError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from s3transfer.exceptions import S3DownloadFailedError, S3ValidationError
from urllib3.exceptions import HTTPError

from .errors import (
    Conflict,
    NotFound,
    PreconditionFailed,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)

S3_ERRORS = (
    BotoCoreError,
    ClientError,
    Boto3Error,
    HTTPError,
    S3DownloadFailedError,
    S3ValidationError,
)
_DENIED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "RequestTimeTooSkewed",
}


def translate(error: Exception, action: str, where: str, server: str, bucket: str) -> StoreError:
    """The error to raise instead.

    Args:
        action: what was tried, as in "cannot read".
        where: URL of the object or prefix.
        server: the endpoint, or "AWS".
    """
    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, ClientError):
        error = error.__context__  # of which boto3 keeps the text alone
    if isinstance(error, S3DownloadFailedError):  # the parts were of two objects
        return PreconditionFailed(f"{where} was changed by somebody else")
    if isinstance(error, ClientError):
        return _from_answer(error, action, where, server, bucket)
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return StoreDenied(
            f"no credentials for the object store at {server}: {error}. Set the store's access "
            "key and secret key"
        )
    return StoreUnavailable(
        f"cannot {action} {where}: the object store at {server} can't be reached ({error}). Check "
        "that it runs and that the endpoint is right"
    )


def status_of(error: ClientError) -> int:
    """The answer's HTTP status."""
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _from_answer(
    error: ClientError, action: str, where: str, server: str, bucket: str
) -> StoreError:
    details = error.response.get("Error", {})
    code, status = details.get("Code", ""), status_of(error)
    if code == "NoSuchBucket":
        return StoreUnavailable(
            f"the object store at {server} has no bucket {bucket!r}: create it, or give another "
            "store URL"
        )
    if status == 404:
        return NotFound(f"there is no object {where}")
    if status == 412:
        return PreconditionFailed(f"{where} was changed by somebody else")
    if status == 409:
        return Conflict(f"{where} is being changed by somebody else")
    if status in (401, 403) or code in _DENIED:
        return StoreDenied(
            f"the object store at {server} doesn't allow to {action} {where} ({code or status}). "
            "Check the store's access key, secret key and policy"
        )
    return StoreUnavailable(
        f"cannot {action} {where}: the object store at {server} answered {status} {code} "
        f"({details.get('Message', 'no message')})"
    )
