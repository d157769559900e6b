"""Uploads a complete folder to the Hugging Face hub, where that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_detour.checkpoint.store import LISTING
from megatron_detour.errors import DetourError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_repository(repository: str) -> None:
    """Raises DetourError for what cannot be a repository's name: better told before the export than after."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise DetourError(f"--push-to-hub {repository}: not the name of a repository; give OWNER/NAME") from None


def push(folder: Path, repository: str, private: bool, api: HfApi | None = None) -> str:
    """Uploads the folder's files; returns the address. Raises DetourError, the folder staying as it is."""
    from huggingface_hub import HfApi

    api = api or HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=f"Upload {folder.name}",
            ignore_patterns=[LISTING],  # sizes and hashes of this folder; the hub keeps its own
        )
    except Exception as error:  # of the hub, its client and the network alike
        cause = " ".join(str(error).split()) or type(error).__name__
        raise DetourError(
            f"{folder} is complete, but was not uploaded to {repository}: {cause}; once that is mended, "
            f"hf upload {repository} {folder} --exclude {LISTING} does the rest"
        ) from None
    return str(made)
