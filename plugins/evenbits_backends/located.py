"""Where a published checkpoint lies: a folder, or a repository of the hub at a commit. Imports no torch.

Of a repository that is not in the hub's cache config and headers are read over the network, a few kilobytes; its
weights are fetched when it is evaluated.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from evenbits.errors import EvenbitsError, TrialFailed
from evenbits.footprint import shown_bytes
from evenbits.sources import HUB_FILES, DigestCache
from evenbits_backends.reading import OLDER_CONFIGS, CheckpointFolder, CheckpointHeaders, Entry

_digests = DigestCache(None)  # of this process: a suite is checked, planned and planned again


def content_of(folder: Path) -> str:
    """sha256 over names and contents of a checkpoint's files. Raises TrialFailed for a folder that is none."""
    return _digests.folder(CheckpointFolder(folder).path)


def snapshot(repository: str, revision: str, *, download: bool = False) -> Path | None:
    """Folder of a repository at a commit; None where it is not, or not wholly, in the cache and is not to be fetched.

    Raises TrialFailed where it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES, local_files_only=not download)
        )
    except LocalEntryNotFoundError:
        if not download:
            return None
        raise TrialFailed(_unreachable(repository, revision)) from None
    except (HfHubHTTPError, RepositoryNotFoundError, OSError, ValueError) as error:
        raise TrialFailed(f"checkpoint {repository} at {revision}: {' '.join(str(error).split())}") from None
    if download:
        return folder
    try:
        CheckpointFolder(folder)  # a download that broke off leaves a snapshot too
    except EvenbitsError:
        return None
    return folder


@lru_cache(maxsize=32)
def remote_headers(repository: str, revision: str) -> CheckpointHeaders:
    """Config and headers of a repository that is not here. Raises TrialFailed where the hub cannot be asked."""
    import json

    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
    )

    api = HfApi()

    def small(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Path(api.hf_hub_download(repository, name, revision=revision)).read_text())
        return found

    named = f"checkpoint {repository} at {revision}"
    try:
        config = small("config.json")
        older: dict[str, Any] | None = None
        for name in () if "quantization_config" in config else OLDER_CONFIGS:
            try:
                older = small(name)
                break
            except EntryNotFoundError:
                continue
        files = api.get_safetensors_metadata(repository, revision=revision).files_metadata
    except NotASafetensorsRepoError:
        raise TrialFailed(
            f"{named}: no model.safetensors and no index of its parts; where its weights are safetensors of another "
            "name, fetch it and give the folder's path; what is pickled has to be converted"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise TrialFailed(_unreachable(repository, revision)) from None
    except Exception as error:  # the hub's library takes one HTTP library or another, each with errors of its own
        raise TrialFailed(f"{named}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    entries = {
        name: Entry(str(tensor.dtype), tuple(tensor.shape), tensor.data_offsets[1] - tensor.data_offsets[0])
        for file in files.values()
        for name, tensor in file.tensors.items()
    }
    size = shown_bytes(sum(entry.nbytes for entry in entries.values()))
    return CheckpointHeaders(f"{named} ({size}, not fetched yet)", config, entries, older)


def _unreachable(repository: str, revision: str) -> str:
    return (
        f"checkpoint {repository} at {revision} is not in the local cache, and the hub cannot be reached: nothing is "
        "known of it; fetch it where there is a network, or give the path of a folder"
    )
