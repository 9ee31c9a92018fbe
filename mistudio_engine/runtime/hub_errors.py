"""Our errors for what huggingface_hub raises.

Each says which repository and what to set; none says anything of the request: its headers carry a token, and a signed
address is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mistudio_engine.api.errors import BadInput, DiskFull, MistudioError, NotFound, Unreachable
from mistudio_engine.runtime.files import free_bytes, is_disk_full

__all__ = ["typed_errors"]


@contextmanager
def typed_errors(endpoint: str, repo_id: str, revision: str | None, home: Path) -> Iterator[None]:
    """Raises ours in place of theirs while the block runs; `home` is where it writes to."""
    where = f"on {endpoint.partition('://')[2]}"
    try:
        yield
    except GatedRepoError:
        raise BadInput(
            f"{repo_id} is gated {where}.",
            why="Its files are given only to accounts that have accepted its terms.",
            fix=f"Accept them at {endpoint}/{repo_id}, set HF_TOKEN to a token of that account (or run "
            "`hf auth login`), and start the engine again.",
        ) from None
    except DisabledRepoError:
        raise BadInput(f"{repo_id} was disabled {where}.", fix="Choose another repository.") from None
    except RevisionNotFoundError:
        raise NotFound(
            f"{repo_id} has no revision {revision!r} {where}.",
            fix="Give a branch, tag or commit that it has, or none.",
        ) from None
    except RepositoryNotFoundError:
        raise _no_repository(repo_id, where) from None
    except EntryNotFoundError:
        raise NotFound(f"A file that {repo_id} lists is not there {where}.", fix="Try again later.") from None
    except HFValidationError:
        raise BadInput(f"{repo_id!r} cannot be the id of a repository.", fix="Give owner/name.") from None
    except HfHubHTTPError as error:
        asked_as_nobody = "authorization" not in error.response.request.headers
        raise _of_status(error.response.status_code, repo_id, where, asked_as_nobody) from None
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        raise Unreachable(
            f"The hub could not be reached for {repo_id}.",
            why=f"{endpoint}: {type(error).__name__}.",
            fix="Check the connection (HF_ENDPOINT and HTTPS_PROXY if you need them), then retry.",
        ) from None
    except OSError as error:
        if is_disk_full(error):
            free = free_bytes(home)
            raise DiskFull.of(f"Downloading {repo_id}", free + 1, free) from None
        if "Consistency check failed" in str(error):  # huggingface_hub's words for fewer bytes than announced
            raise Unreachable(
                f"A file of {repo_id} did not arrive whole.", fix="Retry: it goes on from there."
            ) from None
        raise


def _no_repository(repo_id: str, where: str) -> NotFound:
    return NotFound(
        f"There is no repository {repo_id!r} {where}, or it is private.",
        fix="Check the id, owner/name. For a private one set HF_TOKEN and start the engine again.",
    )


def _of_status(status: int, repo_id: str, where: str, asked_as_nobody: bool) -> MistudioError:
    if status == 404 or (status == 401 and asked_as_nobody):  # the hub does not tell strangers which of the two it is
        return _no_repository(repo_id, where)
    if status in (401, 403):
        return BadInput(
            f"Access to {repo_id} was refused {where} with status {status}.",
            fix="Check that HF_TOKEN is valid and may read this repository.",
        )
    return Unreachable(f"The hub answered {status} for {repo_id} {where}.", fix="Retry in a while.")
