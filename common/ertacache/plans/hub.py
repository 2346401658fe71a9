"""Plans in folders and on the Hub: `save_pretrained`, `from_pretrained` and `push_to_hub`, with a card and a picture.

A folder or repository holds the plan's two files, README.md (the card) and schedule.png. The names and arguments are
those of huggingface_hub's ModelHubMixin, which itself sets attributes on what it makes, and a plan is frozen.
"""

import os
import tempfile
from pathlib import Path

from ertacache.plans.names import HUB_ID
from ertacache.utils.errors import UserError, reason_of
from ertacache.utils.files import unwritable, write_atomically

FILES = ("plan.json", "plan.safetensors")  # of a plan in a folder or on the Hub
CARD = "README.md"


class HubMixin:
    """What every plan inherits. license: of the plan, for the card, for example "apache-2.0".

    results: a finished Markdown table of measured quality for the card, for example
    `ertacache.evaluation.report.card_table("rows.json")`.
    """

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        license: str | None = None,
        results: str | None = None,
        **push_to_hub_kwargs,
    ) -> str | None:
        """Write the folder, whole or not at all, over a plan that is there; then push it, when asked.

        repo_id: the card names it, by default the folder's name. push_to_hub_kwargs: those of `push_to_hub`. Returns
        the commit's address when it is pushed.
        """
        folder = Path(save_directory).expanduser()
        name = repo_id or folder.resolve().name
        if push_to_hub_kwargs and not push_to_hub:
            raise UserError(f"{', '.join(push_to_hub_kwargs)} without push_to_hub=True: add it, or leave them out")
        _write_folder(folder, self, str(self.generate_model_card(repo_id=name, license=license, results=results)))
        return self.push_to_hub(name, license=license, results=results, **push_to_hub_kwargs) if push_to_hub else None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ):
        """A plan of this kind (`Plan.from_pretrained`: of any) from a folder, or from the Hub by its id, OWNER/NAME.

        The rest is for the Hub: revision (a branch, tag or commit), token (by default that of `hf auth login`),
        cache_dir, force_download, and local_files_only, which reads what was downloaded before.
        """
        name, folder = pretrained_model_name_or_path, Path(pretrained_model_name_or_path).expanduser()
        if not folder.is_dir():
            if folder.exists():
                raise UserError(f"{name} is a file: give its folder, or read it with {cls.__name__}.load")
            if not (isinstance(name, str) and HUB_ID.fullmatch(name)):
                raise UserError(f"{str(name)!r} is neither a folder nor a Hub id: check the path, or give OWNER/NAME")
            options = {"force_download": force_download, "token": token, "cache_dir": cache_dir}
            folder = _download(name, **options, local_files_only=local_files_only, revision=revision)
        return cls.load(folder / FILES[0])

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push a plan with ertacache",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
        license: str | None = None,
        results: str | None = None,
    ) -> str:
        """Put the plan, its card and its picture into a repository, in one commit. Returns the commit's address.

        A repository that is not there is made: public but with private=True. branch: one that exists, by default
        main; create_pr: a pull request in place of a commit. *_patterns: names of files, as `HfApi.upload_folder`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        try:
            repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        except Exception as error:
            raise _failure(f"cannot push to {repo_id}", error) from error
        options = {"commit_message": commit_message, "revision": branch, "create_pr": create_pr}
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        patterns |= {"delete_patterns": delete_patterns}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id=repo_id, license=license, results=results)
            try:
                return api.upload_folder(repo_id=repo_id, folder_path=folder, **options, **patterns)
            except Exception as error:
                raise _failure(f"cannot push to {repo_id}", error) from error

    def generate_model_card(self, *, repo_id: str, license: str | None = None, results: str | None = None):
        """The card, a huggingface_hub ModelCard. repo_id: where its snippet finds the plan, a Hub id or a folder."""
        from ertacache.plans.card import model_card

        return model_card(self, repo_id, license, results)


def _write_folder(folder: Path, plan, card: str) -> None:
    """All four files, first under a temporary name in the same place."""
    from ertacache.plans.card import PICTURE, picture, png

    try:
        old = folder / CARD
        if old.exists() and "\nlibrary_name: ertacache\n" not in old.read_text("utf-8", errors="replace"):
            raise UserError(f"{old} is not the card of a plan: choose another folder, or move it away")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder if folder.is_dir() else folder.parent, prefix=".plan-") as parent:
            staged = Path(parent) / "plan"
            plan.save(staged / FILES[0])
            write_atomically(staged / PICTURE, png(picture(plan)))
            write_atomically(staged / CARD, card.encode())
            if not folder.is_dir():
                os.rename(staged, folder)
                return
            for name in (*FILES, PICTURE, CARD):
                os.replace(staged / name, folder / name)
    except OSError as error:
        raise unwritable(folder, error) from error


def _download(repo_id: str, **options) -> Path:
    """The folder in the cache that holds a repository's plan."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=list(FILES), library_name="ertacache", **options))
    except Exception as error:
        raise _failure(f"no plan at {repo_id}", error) from error
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"no plan at {repo_id}: the repository has no {' and no '.join(missing)}, check the id")
    return folder


def _failure(what: str, error: Exception) -> UserError:
    """A line on what went wrong on the way to the Hub: its errors, the network's and the disk's are of many kinds."""
    from huggingface_hub import errors

    online = "check the network, local_files_only and HF_HUB_OFFLINE"
    login = "run hf auth login or give token"
    known = (
        (errors.HFValidationError, "this is not a Hub id, give OWNER/NAME"),
        (errors.LocalTokenNotFoundError, f"you are not logged in, {login}"),
        (errors.GatedRepoError, f"it is gated, ask for access on its page, then {login}"),
        (errors.RepositoryNotFoundError, f"it is not there, or private: check the id, then {login}"),
        (errors.RevisionNotFoundError, "it has no such revision or branch, check the name"),
        (errors.LocalEntryNotFoundError, f"not in the cache, nor is the Hub in reach: {online}"),
    )
    for kind, remedy in known:
        if isinstance(error, kind):
            return UserError(f"{what}: {remedy}")
    return UserError(f"{what} ({reason_of(error)}): check the id, network and hf auth login")
