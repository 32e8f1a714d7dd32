"""What a run asks of a bucket itself, beyond the files in it."""

from easyrm.errors import InputError, Unavailable, one_line

_SECONDS = 30.0  # of tries, where the storage answers that it cannot answer now


def check_bucket(directory: str) -> None:
    """Ask the bucket of a gs:// `directory` what kind it is, as Orbax does before it restores or removes a checkpoint.

    An account that may write files need not be allowed this, and a run would learn it hours later. Nothing happens for
    other directories. Raises InputError where there is no such bucket or it may not be asked, and Unavailable where
    the storage does not answer.
    """
    if not directory.startswith("gs://"):
        return
    bucket = directory.removeprefix("gs://").partition("/")[0]
    try:
        from google.api_core.exceptions import Forbidden, NotFound, RetryError
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY
    except ImportError as error:
        raise InputError(f"--output_dir={directory}: {one_line(error)}; pip install -e '.[gcs]'") from error
    try:
        storage.Client().get_bucket(bucket, retry=DEFAULT_RETRY.with_timeout(_SECONDS))
    except NotFound as error:
        raise InputError(f"--output_dir={directory}: there is no bucket gs://{bucket}; check the name") from error
    except Forbidden as error:
        raise InputError(
            f"--output_dir={directory}: this account may not ask gs://{bucket} what kind of bucket it is, as Orbax has "
            "to; give it roles/storage.legacyBucketReader there, beside roles/storage.objectUser"
        ) from error
    except RetryError as error:
        raise Unavailable(f"--output_dir={directory}: gs://{bucket} does not answer ({one_line(error)})") from error
    except Exception as error:  # no login, no project
        raise InputError(
            f"--output_dir={directory}: gs://{bucket} cannot be asked ({one_line(error)}); log in with gcloud auth "
            "application-default login, or run where a service account is attached"
        ) from error
