"""Talk to a finished model, to see with one's own eyes what a merge did to it.

Answers are greedy, so that two runs can be compared, and go to stdout; prompts and notices go to stderr. An answer
cannot give commands to a terminal; a pipe gets its characters as they are. `transformers` is an extra, imported when it
is needed; it pushes tokens into `Streamer` from the caller's own thread, so that Ctrl-C is an ordinary
``KeyboardInterrupt`` out of ``generate`` and nothing is left running.
"""

from __future__ import annotations

from shardmerge.inference.chat.conversation import DEFAULT_MAX_NEW_TOKENS, loop, once
from shardmerge.inference.chat.model import Chat, load
from shardmerge.inference.hf import DEFAULT_TEMPLATE, Message

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "DEFAULT_TEMPLATE", "Chat", "Message", "load", "loop", "once"]
