"""The Hugging Face hub: one question before a download says whether it may be had, and each failure is one line of ours.

huggingface_hub repeats what fails by itself (six times in 23 s for 429 and 5xx, six times for a broken connection). Whole files
are kept and not fetched again; its version 2 keeps no part of a file.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants, errors, repo_info, try_to_load_from_cache
from huggingface_hub.utils import get_session, hf_raise_for_status

from modern_llm.config import UserError
from modern_llm.config.base import one_line

try:
    import httpx2 as httpx  # of huggingface_hub 2
except ImportError:
    import httpx

HTTPError = httpx.HTTPError
"""Of an answer, and of a connection that broke."""
LONGEST_WAIT = 60
"""Seconds that the hub may ask to wait before a question is repeated; longer, and the run ends with what it asked for."""
SLOWEST = 1024
"""Bytes a second that a download needs: below, a byte now and then would keep a run waiting for days."""
KEPT = "run the same command again: files that came whole are kept"


@contextmanager
def hub(name: str, where: str, kind: str = "model") -> Iterator[str | None]:
    """Inside, a repository is looked up as always; where the hub does not give it, in the local cache alone.

    Args:
        name: of the repository.
        where: begins the message of an error.
        kind: `model` or `dataset`.

    Yields:
        The newest commit; None where the hub does not give it.

    Raises:
        UserError: the block failed for what the hub answered, or did not: with the reason and what to do.
    """
    was_offline = constants.HF_HUB_OFFLINE
    refusal, commit = (None, None) if was_offline else _asked(name, kind)
    constants.HF_HUB_OFFLINE = was_offline or refusal is not None
    try:
        yield commit
    except Exception as error:
        failure = _failure(error)
        if failure is None or isinstance(error, UserError):
            raise
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        offline = "not in the local cache, and HF_HUB_OFFLINE=1 keeps it from the hub: unset it where there is a network"
        raise UserError(f"{where}: {offline if was_offline else _reason(refusal or failure, page)}") from None
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _asked(name: str, kind: str) -> tuple[Exception | None, str | None]:
    """Ask the hub for a repository: why it does not give it, and its newest commit."""
    client = get_session()
    hooks = client.event_hooks
    if _limit_wait not in hooks["response"]:
        client.event_hooks = {"request": [*hooks["request"], _limit_silence], "response": [*hooks["response"], _limit_wait]}
    try:
        return None, repo_info(name, repo_type=kind, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    except errors.HFValidationError:  # no name of a repository: what is asked next says so
        return None, None
    except (HTTPError, OSError) as error:
        return error, None


def _limit_silence(request: Any) -> None:
    """Give a question without a limit that of downloads: huggingface_hub lists files with none."""
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {part: limits[part] or constants.HF_HUB_DOWNLOAD_TIMEOUT for part in limits}


def _limit_wait(response: Any) -> None:
    """End a question that is to be repeated much later, and a download that is too slow."""
    if response.status_code in (429, 503) and _seconds_to_wait(response) > LONGEST_WAIT:
        hf_raise_for_status(response)
    response.stream = _Hurried(response.stream)


def _seconds_to_wait(response: Any) -> int:
    asked = f"t={response.headers.get('Retry-After')};{response.headers.get('RateLimit')}"
    return int((re.findall(r"\bt=(\d+)", asked) or ["0"])[0])


class _Hurried(httpx.SyncByteStream):  # type: ignore[misc] - of whichever module is there
    """A body that must come at `SLOWEST`; only time that is spent waiting for it counts."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
        waited, received, began = 0.0, 0, time.monotonic()
        for part in self.stream:
            waited, received = waited + time.monotonic() - began, received + len(part)
            if waited > constants.HF_HUB_DOWNLOAD_TIMEOUT:
                if received < waited * SLOWEST:
                    raise TimeoutError(f"{received} bytes in {waited:.0f} s")
                waited, received = 0.0, 0
            yield part
            began = time.monotonic()

    def close(self) -> None:
        self.stream.close()


def _failure(error: BaseException | None) -> BaseException | None:
    """What the hub or the way to it has to do with an error: of its causes, which libraries wrap, the first of that kind."""
    kinds = (HTTPError, ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)
    while error is not None:
        is_short = "Consistency check failed" in str(error)  # of huggingface_hub, an OSError like any other
        if (isinstance(error, kinds) or is_short) and not isinstance(error, errors.RemoteEntryNotFoundError):
            return error.__cause__ if isinstance(error.__cause__, HTTPError) else error
        error = error.__cause__ or error.__context__
    return None


def _reason(error: BaseException, page: str) -> str:
    """Why the hub does not give a repository, and what to do."""
    response: Any = getattr(error, "response", None)
    status = response.status_code if response is not None else 0
    if isinstance(error, errors.GatedRepoError):
        return f"gated: accept its terms on {page}, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such path, and {page} does not exist or is private: check the spelling, or set HF_TOKEN to a token for it"
    if status in (401, 403):
        return f"the hub refuses the token ({status}): set HF_TOKEN to a valid one that may read {page}, or unset it"
    if status == 429:
        return f"too many requests to the hub (429): wait {_seconds_to_wait(response) or 'some hundred'} s and {KEPT}"
    if status:
        return f"the hub fails ({status}): wait and {KEPT}"
    reason = one_line(f"{type(error).__name__}: {error}", 150)
    nowhere = f"no such path, not in the local cache, and {page} gives no answer or too little ({reason})"
    return f"{nowhere}: check the network and {KEPT}"


def commit_of(model: str, where: str) -> str:
    """The commit of a hub model that would be loaded: the hub's newest, or that of the local cache where it does not answer.

    Raises:
        UserError: neither has it.
    """
    with hub(model, where) as commit:
        cached = commit or try_to_load_from_cache(model, "config.json") or try_to_load_from_cache(model, "adapter_config.json")
        if not isinstance(cached, str):
            raise errors.LocalEntryNotFoundError(model)
    return commit or cached.split("/snapshots/")[1].split("/")[0]
