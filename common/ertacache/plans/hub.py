"""Plans in folders and on the Hub: `save_pretrained`, `from_pretrained` and `push_to_hub`, with a card and an image.

A folder or repository holds the plan's two files, README.md (the card) and schedule.png; that of a set of plans two
more files for each further plan. Names and arguments are those
of huggingface_hub's ModelHubMixin. That class itself is no base of a plan, because it sets attributes on its instances,
and a plan is frozen.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ertacache.plans.names import HUB_ID, HUB_PREFIX
from ertacache.utils.errors import UserError, reason_of
from ertacache.utils.files import path_of, unwritable, write_atomically

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from ertacache.plans.plan import Plan

FILES = ("plan.json", "plan.safetensors")  # of a plan in a folder or on the Hub
OTHERS = ("plan-*.json", "plan-*.safetensors")  # of a set's further plans
CARD = "README.md"


class HubMixin:
    """Saving, loading and sharing of plans, in every class of plan and in sets of them.

    Arguments that several methods share: `license` is the plan's, for the card, for example "apache-2.0"; `results` is
    a finished Markdown table of measured quality for the card, for example
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
        """Write a folder with the plan, its card and its image, whole or not at all; replaces an earlier plan in it.

        Args:
            save_directory: The folder; created where it does not exist.
            repo_id: Repository that the card names; by default the folder's name.
            push_to_hub: Whether to push the plan to `repo_id` afterwards.
            license: Of the plan, for the card.
            results: Markdown table of measured quality, for the card.
            **push_to_hub_kwargs: Arguments of `push_to_hub`.

        Returns:
            URL of the commit when pushed, else None.

        Raises:
            UserError: The folder cannot be written or holds another README.md, or the push fails.

        Example:
            >>> plan.save_pretrained("flux-2x")
        """
        folder = path_of(save_directory, "save_directory").expanduser()
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
    ) -> "Plan":
        """Read a plan of this kind (`Plan.from_pretrained`: of any kind) from a folder or from the Hub.

        All arguments but the first are for the Hub.

        Args:
            pretrained_model_name_or_path: A folder, or a Hub id, OWNER/NAME.
            force_download: Whether to download again what is in the cache.
            token: Hub token; by default that of `hf auth login`.
            cache_dir: Folder of the download cache.
            local_files_only: Whether to read earlier downloads only.
            revision: Branch, tag or commit.

        Raises:
            UserError: No such folder or repository, or the download fails.
            PlanError: A damaged plan, or one of the other kind.

        Example:
            >>> plan = Plan.from_pretrained("OWNER/flux-2x")
        """
        name = pretrained_model_name_or_path
        folder = path_of(name, "pretrained_model_name_or_path").expanduser()
        if not folder.is_dir():
            if folder.exists():
                raise UserError(f"{name} is a file: give its folder, or read it with {cls.__name__}.load")
            name = str(name).removeprefix(HUB_PREFIX) if isinstance(name, str) else name
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
        """Upload the plan, its card and its image to a Hub repository, in one commit.

        Args:
            repo_id: OWNER/NAME, or NAME for one's own account; created where it does not exist.
            commit_message: First line of the commit.
            private: Whether a new repository is private; by default it is public.
            token: Hub token; by default that of `hf auth login`.
            branch: An existing branch; by default main.
            create_pr: Whether to open a pull request instead of committing.
            allow_patterns, ignore_patterns, delete_patterns: File names, as in `HfApi.upload_folder`.
            license: Of the plan, for the card.
            results: Markdown table of measured quality, for the card.

        Returns:
            URL of the commit.

        Raises:
            UserError: The Hub or the network refuses.
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

    def generate_model_card(
        self, *, repo_id: str, license: str | None = None, results: str | None = None
    ) -> "ModelCard":
        """Return the plan's card, a huggingface_hub ModelCard.

        Args:
            repo_id: The plan's source in the card's snippet, a Hub id or a folder.
            license: Of the plan.
            results: Markdown table of measured quality.
        """
        from ertacache.plans.card import model_card

        plan, *others = self.members
        return model_card(plan, repo_id, license, results, others)

    @property
    def members(self) -> list["Plan"]:
        """The plan, or those of a set."""
        return [self]


def _write_folder(folder: Path, plan, card: str) -> None:
    """Write all files, first under a temporary name on the same file system; those of an earlier plan go."""
    from ertacache.plans.card import SCHEDULE_IMAGE, png, schedule_image

    try:
        existing_card = folder / CARD
        if existing_card.exists():
            text = existing_card.read_text("utf-8", errors="replace")
            if "\nlibrary_name: ertacache\n" not in text:
                raise UserError(f"{existing_card} is not the card of a plan: choose another folder, or move it away")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder if folder.is_dir() else folder.parent, prefix=".plan-") as parent:
            staged = Path(parent) / "plan"
            plan.save(staged / FILES[0])
            write_atomically(staged / SCHEDULE_IMAGE, png(schedule_image(plan.members[0])))
            write_atomically(staged / CARD, card.encode())
            if not folder.is_dir():
                os.rename(staged, folder)
                return
            written = {path.name for path in staged.iterdir()}
            for name in written:
                os.replace(staged / name, folder / name)
            for path in (path for pattern in OTHERS for path in folder.glob(pattern)):
                if path.name not in written:
                    path.unlink()
    except OSError as error:
        raise unwritable(folder, error) from error


def _download(repo_id: str, **options) -> Path:
    """Download a repository's plan and return its folder in the cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=[*FILES, *OTHERS], library_name="ertacache", **options))
    except Exception as error:
        raise _failure(f"no plan at {repo_id}", error) from error
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"no plan at {repo_id}: the repository has no {' and no '.join(missing)}, check the id")
    return folder


def _failure(what: str, error: Exception) -> UserError:
    """Return a one-line error for a failed transfer; the Hub, the network and the disk raise many types."""
    from huggingface_hub import errors

    online = "check the network, local_files_only and HF_HUB_OFFLINE"
    login = "run hf auth login or give token"
    remedies = (
        (errors.HFValidationError, "this is not a Hub id, give OWNER/NAME"),
        (errors.LocalTokenNotFoundError, f"you are not logged in, {login}"),
        (errors.GatedRepoError, f"it is gated, ask for access on its page, then {login}"),
        (errors.RepositoryNotFoundError, f"it is not there, or private: check the id, then {login}"),
        (errors.RevisionNotFoundError, "it has no such revision or branch, check the name"),
        (errors.LocalEntryNotFoundError, f"not in the cache, nor is the Hub in reach: {online}"),
    )
    for error_type, remedy in remedies:
        if isinstance(error, error_type):
            return UserError(f"{what}: {remedy}")
    return UserError(f"{what} ({reason_of(error)}): check the id, network and hf auth login")
