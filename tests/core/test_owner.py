"""Objects that own file descriptors can be neither copied nor pickled."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
from typing import TYPE_CHECKING, Any

import pytest

import trio_unixconn
from tests._helpers.fds import some
from trio_unixconn import Message, UnixFDList, UnixFDMessage, connection_pair
from trio_unixconn._owner import DescriptorOwner

if TYPE_CHECKING:
    from collections.abc import Callable

# What an owner has, mostly.
CLOSING = {"close", "aclose", "detach", "__del__"}


def package_classes() -> set[type]:
    found: set[type] = set()
    for info in pkgutil.walk_packages(trio_unixconn.__path__, "trio_unixconn."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            found.update(
                each
                for _, each in inspect.getmembers(module, inspect.isclass)
                if each.__module__.partition(".")[0] == "trio_unixconn"
            )
    return found


def test_every_class_that_closes_something_is_a_descriptor_owner() -> None:
    """Each class of the package that closes something cannot be copied or pickled."""
    closing = {
        each
        for each in package_classes()
        if CLOSING & set(vars(each)) and not getattr(each, "_is_protocol", False)
    }
    assert UnixFDList in closing
    assert {each for each in closing if not issubclass(each, DescriptorOwner)} == set()


def test_no_descriptor_owner_has_another_way_to_be_copied() -> None:
    """No class overrides what makes copy and pickle raise TypeError."""
    owners = [each for each in package_classes() if issubclass(each, DescriptorOwner)]
    assert len(owners) > 20
    for each in owners:
        assert each.__reduce_ex__ is DescriptorOwner.__reduce_ex__
        assert not hasattr(each, "__copy__")
        assert not hasattr(each, "__deepcopy__")


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
async def test_copy_and_pickle_leave_descriptors_open(copying: Callable[[Any], Any]) -> None:
    """copy, deepcopy and pickle raise what they raise for a file, and close nothing.

    A refused copy leaves the owner and its descriptors as they were.
    """
    one, two = connection_pair()
    async with one, two:
        with one.get_peer_identity() as identity, some(2) as fds:
            message = Message(b"", fds, None)
            owners: list[object] = [one, one.fds(), identity, fds, message, UnixFDMessage(fds)]
            for owner in owners:
                with pytest.raises(
                    TypeError, match=f"^cannot pickle '{type(owner).__name__}' object$"
                ):
                    copying(owner)
            await one.send_fds(fds)
        with await two.receive_fds(2) as got:
            assert len(got) == 2
