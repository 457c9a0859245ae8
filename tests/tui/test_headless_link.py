"""The headless reporter says that its link is down, why, and that it is back."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from midwatch.transport.ssh_url import RemoteRun
from tui.headless import HeadlessReporter


@pytest.mark.parametrize("as_json", [False, True])
def test_a_link_that_is_down_is_told_with_its_reason_and_when_it_is_back(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = HeadlessReporter(RemoteRun("far", None, "run"), as_json, (), None)
    client: Any = SimpleNamespace(trouble="")

    def told() -> str:
        reporter._tell_link(client)
        return capsys.readouterr().out

    reporter._link(True)
    assert told() == ""
    reporter._link(False)
    assert told() == "", "the next controller may be on its way"
    assert reporter._lost_at is not None
    reporter._lost_at -= 60.0
    first = told()
    assert "connection to ssh://far/run has been lost" in first and "trying again" in first
    assert told() == "", "once"
    client.trouble = "far: ssh: connect to host far port 22: No route to host"
    assert "No route to host" in told()
    reporter._link(True)
    back = told()
    assert "is back" in back and told() == ""
    if as_json:
        assert [json.loads(line)["link"] for line in (first, back)] == ["lost", "back"]
