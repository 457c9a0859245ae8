"""What the ranks are sent for a command."""

from __future__ import annotations

from midwatch.commands.table import SPECS
from midwatch.protocol import Op

OPS: dict[str, Op] = {spec.verb: Op[spec.order] for spec in SPECS if spec.order}
"""The commands that ranks carry out at a boundary, by verb."""
