"""What a rank's storage keeps of a buffer, and what it lets go with it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from rtp_sim.executor.storage import Storage  # noqa: E402
from rtp_sim.schedule.ir import Buffer, Program  # noqa: E402


def test_views_go_with_their_buffer() -> None:
    storage = Storage(Program("p", {"w": Buffer("w", "weights", "fp32", 6)}, ()))
    flat = storage.put("w", torch.arange(6.0))
    storage.views("w")[3] = {"weight": flat[:4].view(2, 2)}
    assert storage.views("w")[3]["weight"].tolist() == [[0, 1], [2, 3]]
    # Other content: a view of the old would show what is no longer there.
    storage.put("w", torch.ones(6))
    assert not storage.views("w")
    storage.views("w")[3] = {"weight": storage["w"][:4]}
    storage.drop("w")
    assert not storage.views("w")
