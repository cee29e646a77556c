"""Either side is killed before or after each frame: one of them accepts at every moment."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio

from tests._helpers.waiting import until
from tests.handover.server import Config
from tests.handover.services import CLIENTS, clients, service
from trio_unixconn import EndOfStreamError, UpgradeFailedError
from trio_unixconn.handover import _protocol as of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.handover.services import Service

pytestmark = [pytest.mark.slow, pytest.mark.once]

# The frames that the generation that runs sends and receives, in their order.
GIVER_SENDS = ["OFFER", "LISTENERS", "COMMIT", "RELEASED"]
TAKER_SENDS = ["HELLO", "TAKEN", "PREPARED", "SERVING"]

# Of clients whose requests a process was handling when it was killed.
MOST_LOST = 2 * CLIENTS


def points(sent: list[str], received: list[str]) -> list[tuple[str, str, str]]:
    return [
        *(("before", "send", name) for name in sent),
        *(("after", "send", name) for name in sent),
        *(("after", "receive", name) for name in received),
    ]


@pytest.mark.parametrize(("when", "operation", "name"), points(TAKER_SENDS, GIVER_SENDS[:3]))
async def test_upgrade_when_successor_is_killed(
    tmp_path: Path, when: str, operation: str, name: str
) -> None:
    """If the successor is killed before it was released, the generation before serves on."""
    successor = {
        "directory": str(tmp_path),
        "fault": [when, operation, getattr(of, name)],
    }
    # The probation is long enough that a successor which was killed after SERVING is noticed.
    async with (
        service(tmp_path, successor=successor, probation=30) as found,
        clients(found) as load,
    ):
        for _ in range(2):
            with pytest.raises(UpgradeFailedError, match="SIGKILL"):
                await found.upgrade()
            await load.answered_by(1)
        assert load.outcomes["refused"] == 0
        lost = load.outcomes["reset"] + load.outcomes["empty"]
        # Only a successor that was told COMMIT accepts.
        assert lost <= (2 * MOST_LOST if name in ("SERVING", "COMMIT") else 0)


@pytest.mark.parametrize(
    ("when", "operation", "name"),
    [
        each
        for each in points(GIVER_SENDS, TAKER_SENDS)
        # With less, the successor has no listeners.
        if each not in (("before", "send", "OFFER"), ("after", "receive", "HELLO"))
    ],
)
async def test_upgrade_when_the_one_before_is_killed(
    tmp_path: Path, when: str, operation: str, name: str
) -> None:
    """If the generation before is killed, the successor serves with what it has taken."""
    fault = [when, operation, getattr(of, name)]
    async with service(tmp_path, fault=fault) as found, clients(found) as load:
        with suppress(EndOfStreamError, trio.BrokenResourceError):
            await found.upgrade()
        await load.answered_by(2)
        await found.noted("confirmed 2")
        lost = load.outcomes["reset"] + load.outcomes["empty"]
        assert lost <= MOST_LOST
        if (name, when) != ("OFFER", "after") and name != "LISTENERS":
            # It had the listeners, in whose queues clients waited meanwhile.
            assert load.outcomes["refused"] == 0
        upgrade = await found.upgrade()
        assert upgrade.number == 3
        await load.answered_by(3)


@pytest.mark.parametrize(
    ("when", "operation", "name"), [("before", "send", "OFFER"), ("after", "receive", "HELLO")]
)
async def test_upgrade_when_the_one_before_is_killed_at_once(
    tmp_path: Path, when: str, operation: str, name: str
) -> None:
    """A successor that was offered nothing becomes the first generation."""
    fault = [when, operation, getattr(of, name)]
    async with service(tmp_path, fault=fault) as found, clients(found) as load:
        with pytest.raises((EndOfStreamError, trio.BrokenResourceError)):
            await found.upgrade()
        await until_ready_twice(found)
        await load.answered(20)


async def until_ready_twice(found: Service) -> None:
    await until(lambda: found.notes().count("ready 1") == 2)


@pytest.mark.parametrize(
    ("when", "operation", "name"),
    [("after", "receive", "RELEASED"), ("before", "send", "MOVED"), ("after", "send", "MOVED")],
)
async def test_a_server_that_dies_after_the_handover_can_be_started_again(
    tmp_path: Path, when: str, operation: str, name: str
) -> None:
    """After RELEASED, the successor is the service; a process that is started next is the first."""
    successor = {"directory": str(tmp_path), "fault": [when, operation, getattr(of, name)]}
    async with service(tmp_path, successor=successor) as found:
        port = await found.port()
        assert (await found.upgrade()).number == 2
        await found.has_ended(2)
        # It does not wait for the generation that drains.
        found.start(Config(str(tmp_path), port=port))
        await until_ready_twice(found)
