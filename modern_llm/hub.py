"""The Hugging Face hub, asked once whether it is there."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, model_info, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import get_session

SECONDS_TO_ANSWER = 5.0


@contextmanager
def hub() -> Iterator[None]:
    """Inside, names are looked up as always; where the hub does not answer, in the local cache alone (`HF_HUB_OFFLINE=1`).

    huggingface_hub 2.x repeats each question for 24 s where there is no network.
    """
    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or not _answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_ANSWER)
    except Exception:  # whatever the client of this version of huggingface_hub raises: no name, no route, no proxy, too slow
        return False
    return True


def commit_of(model: str) -> str | None:
    """The commit of a hub model that would be loaded: the hub's newest, or that of the local cache where it does not answer."""
    with hub():
        if not constants.HF_HUB_OFFLINE:
            try:
                return model_info(model).sha
            except (HfHubHTTPError, HFValidationError, OSError):  # renamed, private, or gone: the cache may still have it
                pass
        try:
            cached = try_to_load_from_cache(model, "config.json")
        except HFValidationError:
            return None
    return cached.split("/snapshots/")[1].split("/")[0] if isinstance(cached, str) else None
