"""What is printed, as `shards.terminal` has it, for the screen too, which imports nothing of the shards."""

from shards.terminal import OutputError as OutputError
from shards.terminal import discard_out as discard_out
from shards.terminal import flush_out as flush_out
from shards.terminal import indented as indented
from shards.terminal import make_console as make_console
from shards.terminal import reader_is_gone as reader_is_gone
from shards.terminal import safe as safe
from shards.terminal import write_error as write_error
from shards.terminal import write_json as write_json
from shards.terminal import write_out as write_out
