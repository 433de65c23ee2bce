"""Find a model's folder and pin what is in it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from evenbits.errors import SuiteError
from evenbits.files import NOT_WEIGHTS, write_atomically
from evenbits.plugins import Registry
from evenbits.suite_spec import ModelSpec

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """name: as tables show it; revision: "sha256:..." of the files, or the hub's commit.

    folder: where its files lie or, where they are not `present`, where the hub's cache will keep them.
    """

    name: str
    folder: Path
    revision: str
    trust_remote_code: bool = False
    present: bool = True


class DigestCache:
    """sha256 of files, kept by path, size, times and inode, so that a large model is read once."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, list[object]] = {}
        if path is not None and path.is_file():
            try:
                known = json.loads(path.read_text())
            except ValueError:
                known = None
            if isinstance(known, dict):  # only a cache: what is unreadable is computed again
                self._known = known

    def file(self, path: Path) -> str:
        stat = path.stat()
        # the change time cannot be set back, as the modification time is by rsync and tar
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(str(path.resolve()))
        if known is not None and known[:-1] == stamp:
            return str(known[-1])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[str(path.resolve())] = [*stamp, digest]
        return digest

    def folder(self, folder: Path) -> str:
        """Over names and contents of everything that a model is loaded from."""
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.endswith(NOT_WEIGHTS):
                digest.update(f"{path.name}\0{self.file(path)}\0".encode())
        return f"sha256:{digest.hexdigest()[:16]}"

    def save(self) -> None:
        if self._path is not None:
            write_atomically(self._path, json.dumps(self._known).encode())


def _from_hub(spec: ModelSpec, download: bool) -> tuple[Path, bool]:
    """The folder, and whether the files are in it, which without `download` may be not for a model with an outline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    assert spec.id is not None
    try:
        folder = Path(
            snapshot_download(spec.id, revision=spec.revision, allow_patterns=HUB_FILES, local_files_only=not download)
        )
    except LocalEntryNotFoundError:
        if spec.outline is not None and not download:
            return _cached_folder(spec.id, str(spec.revision)), False
        advice = "the hub cannot be reached" if download else "`evenbits run` downloads it"
        raise SuiteError(f"model {spec.id} at {spec.revision} is not in the local cache; {advice}") from None
    except (HfHubHTTPError, RepositoryNotFoundError, OSError, ValueError) as error:
        raise SuiteError(f"model {spec.id} at {spec.revision}: {' '.join(str(error).split())}") from None
    # a tokenizer or a download that broke off leave a snapshot too
    return folder, download or spec.outline is None or _is_whole(folder)


def _cached_folder(repository: str, revision: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=repository, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / name / "snapshots" / revision


def _is_whole(folder: Path) -> bool:
    """Whether config and every weight file that the index names are in a snapshot."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        try:
            files = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return True  # damaged, not absent: reading it says how
    return (folder / "config.json").is_file() and all((folder / file).is_file() for file in files)


def find_model(spec: ModelSpec, registry: Registry, digests: DigestCache, *, download: bool = False) -> ModelSource:
    """Raises SuiteError for an unknown name, a missing folder, or a hub model that is not at hand."""
    if spec.id is not None:
        folder, present = _from_hub(spec, download)
        return ModelSource(spec.name or spec.id, folder, str(spec.revision), spec.trust_remote_code, present)
    named = None if spec.path is not None else registry.find("models", str(spec.name), "model")
    folder = Path(str(spec.path) if named is None else named.value)
    if not folder.is_dir():
        raise SuiteError(
            f"model folder {folder} does not exist (looked from {Path.cwd()}); "
            "give a folder with config.json and *.safetensors"
        )
    return ModelSource(spec.name or folder.resolve().name, folder, digests.folder(folder), spec.trust_remote_code)
