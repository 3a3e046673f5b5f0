"""The Hugging Face hub, asked once whether it is there."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
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
