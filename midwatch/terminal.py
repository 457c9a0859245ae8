"""What is printed, as `shards.common.terminal` has it, for the screen too, which imports nothing of the shards."""

from shards.common.terminal import OutputError as OutputError
from shards.common.terminal import discard_out as discard_out
from shards.common.terminal import flush_out as flush_out
from shards.common.terminal import indented as indented
from shards.common.terminal import make_console as make_console
from shards.common.terminal import reader_is_gone as reader_is_gone
from shards.common.terminal import safe as safe
from shards.common.terminal import write_error as write_error
from shards.common.terminal import write_json as write_json
from shards.common.terminal import write_out as write_out
