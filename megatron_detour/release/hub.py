"""Upload of a finished folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_detour.checkpoint.store import LISTING
from megatron_detour.errors import DetourError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_repository(repository: str) -> None:
    """Raise DetourError for an invalid repository id, before the export rather than after it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise DetourError(f"--push-to-hub {repository}: not a valid repository id; use OWNER/NAME") from None


def push(folder: Path, repository: str, private: bool, api: HfApi | None = None) -> str:
    """Upload the folder's files and return the URL. Raises DetourError, and leaves the folder as it is."""
    from huggingface_hub import HfApi

    api = api or HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=f"Upload {folder.name}",
            ignore_patterns=[LISTING],  # sizes and hashes; the hub has its own
        )
    except Exception as error:  # from the hub, its client or the network
        cause = " ".join(str(error).split()) or type(error).__name__
        raise DetourError(
            f"{folder} is complete, but was not uploaded to {repository}: {cause}; once this is fixed, run "
            f"hf upload {repository} {folder} --exclude {LISTING}"
        ) from None
    return str(made)
