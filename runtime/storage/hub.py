"""Fetch a model from the Hugging Face hub into its cache: weights, config and tokenizer alone."""

from pathlib import Path

from optim.recipes.errors import MACHINE, USAGE, OptimError
from optim.runtime.storage.companions import COMPANIONS

SMALL = ["*.json", "*.py", *COMPANIONS]
ELSEWHERE = ["original/*", "consolidated*", "onnx/*", "*.onnx", "*.gguf", "runs/*"]
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
        fix = f"accept its licence at https://huggingface.co/{repo}, then `hf auth login`"
        raise OptimError(f"{repo} is gated", fix, USAGE) from None
    except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
        what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "repository"
        fix = "check the spelling; a private one needs `hf auth login`; a local folder must exist"
        raise OptimError(f"the hub has no such {what}: {repo}", fix, USAGE) from None
    except Exception as error:  # every transport has its own exceptions
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OptimError(f"cannot fetch {repo} from the hub: {why}", OFFLINE_FIX, MACHINE) from None
    return folder
