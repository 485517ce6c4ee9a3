"""Chat with a finished model, to see what a merge did to it.

Answers are greedy, so that two runs can be compared. They go to stdout; prompts and notices go to stderr. On a terminal
control characters in an answer are escaped; a pipe gets them unchanged. transformers is an optional dependency, and is
imported when it is needed. It pushes tokens into `Streamer` in the caller's own thread, so that Ctrl-C is an ordinary
``KeyboardInterrupt`` from ``generate``, and nothing is left running.
"""

from __future__ import annotations

from shardmerge.inference.chat.conversation import DEFAULT_MAX_NEW_TOKENS, loop, once
from shardmerge.inference.chat.model import Chat, load
from shardmerge.inference.hf import DEFAULT_TEMPLATE, Message

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "DEFAULT_TEMPLATE", "Chat", "Message", "load", "loop", "once"]
