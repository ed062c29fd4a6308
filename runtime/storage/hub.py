"""Models of the Hugging Face hub: fetched into its cache, listed and removed; artifacts sent to it.

Weights, configuration and tokenizer alone are fetched. HF_ENDPOINT names another hub, HF_TOKEN
opens private and gated models, HF_HOME moves the cache.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optim.recipes.errors import MACHINE, USAGE, OptimError
from optim.runtime.storage.companions import COMPANIONS
from optim.runtime.system.output import MANIFEST

SMALL = ["*.json", "*.py", "README.md", *COMPANIONS]
ELSEWHERE = ["original/*", "consolidated*", "onnx/*", "*.onnx", "*.gguf", "runs/*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LOGIN = "set HF_TOKEN, or `hf auth login`"
OFFLINE_FIX = (
    "give a local folder or `demo`; or fill the hub's cache on a machine that reaches it, "
    "copy it here and set HF_HUB_OFFLINE=1"
)


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=ELSEWHERE
        )
    )


def fetch(repo: str, revision: str | None = None) -> Path:
    """Folder with the files of the hub repository `repo`.

    Raises OptimError: 2 if there is no such repository or it is gated, 4 if no hub answers.
    """
    from huggingface_hub import errors

    try:
        folder = _snapshot(repo, revision, [*SMALL, "*.safetensors"])
        if not any(folder.glob("*.safetensors")):
            folder = _snapshot(repo, revision, [*SMALL, "pytorch_model*.bin"])
    except errors.GatedRepoError:
        fix = f"accept its licence at https://huggingface.co/{repo}, then {LOGIN}"
        raise OptimError(f"{repo} is gated", fix, USAGE) from None
    except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
        what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "repository"
        fix = f"check the spelling; for a private one {LOGIN}; a local folder must exist"
        raise OptimError(f"the hub has no such {what}: {repo}", fix, USAGE) from None
    except Exception as error:  # every transport has its own exceptions
        why = _first_line(error)
        raise OptimError(f"cannot fetch {repo} from the hub: {why}", OFFLINE_FIX, MACHINE) from None
    return folder


def pushed_files(place: Path) -> list[Path]:
    """The files of an artifact's folder, or a GGUF file; none of anything else."""
    if place.is_file() and place.suffix == ".gguf":
        return [place]
    if not (place / MANIFEST).is_file():
        return []
    return sorted(path for path in place.rglob("*") if path.is_file())


def push(place: Path, repo: str) -> str:
    """Send an artifact's folder, or a GGUF file, as one commit; returns its address.

    A repository that is not there yet is made, private. Raises OptimError: 2 where the hub refuses
    it, 4 if no hub answers.
    """
    from huggingface_hub import HfApi, errors

    hub, message = HfApi(), f"{place.name}, made by optim"
    try:
        hub.create_repo(repo, private=True, exist_ok=True)
        if place.is_file():
            made = hub.upload_file(
                path_or_fileobj=place,
                path_in_repo=place.name,
                repo_id=repo,
                commit_message=message,
            )
        else:
            made = hub.upload_folder(repo_id=repo, folder_path=place, commit_message=message)
    except errors.HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403, 404)
        fix = f"{LOGIN}, with a token that may write" if refused else "try again: `optim push`"
        code = USAGE if refused else MACHINE
        raise OptimError(f"the hub does not take {repo}: {_first_line(error)}", fix, code) from None
    except Exception as error:  # every transport has its own exceptions
        fix = f"what was made is at {place}: `optim push` sends it later"
        why = _first_line(error)
        raise OptimError(f"cannot send {repo} to the hub: {why}", fix, MACHINE) from None
    return str(made.commit_url)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@dataclass(frozen=True, slots=True)
class Cached:
    """A model of the hub's cache: its id, the revisions that are there, its bytes."""

    name: str
    revisions: tuple[str, ...]
    nbytes: int
    folder: Path


def cached() -> list[Cached]:
    """Every model in the hub's cache, by name."""
    found = [repo for repo in _repos(_scan()) if repo.size_on_disk]
    return sorted(
        (
            Cached(
                repo.repo_id, tuple(map(_names, repo.revisions)), repo.size_on_disk, repo.repo_path
            )
            for repo in found
        ),
        key=lambda model: model.name,
    )


def remove(repo: str, revision: str | None = None) -> int:
    """Remove a model, or one revision of it, from the cache; returns the bytes that are free now.

    Raises OptimError (2) if it is not there, (4) if it cannot be removed.
    """
    scan = _scan()
    held = [r for one in _repos(scan) if one.repo_id == repo for r in one.revisions]
    gone = [r for r in held if revision is None or revision in _names(r).split()]
    if not gone:
        what = repo if revision is None else f"{repo}@{revision}"
        raise OptimError(f"{what} is not in the cache", "`optim list` shows what is", USAGE)
    plan = scan.delete_revisions(*(r.commit_hash for r in gone))
    try:
        plan.execute()
    except OSError as error:
        raise OptimError(f"cannot remove {repo}: {error}", code=MACHINE) from None
    return int(plan.expected_freed_size)


def _scan() -> Any:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None


def _repos(scan: Any) -> list[Any]:
    return [] if scan is None else [repo for repo in scan.repos if repo.repo_type == "model"]


def _names(revision: Any) -> str:
    """A revision by its names and the first of its hash: `main 1a2b3c4d`."""
    return " ".join([*sorted(revision.refs), revision.commit_hash[:8]])
