"""``python -m shardmerge``."""

from __future__ import annotations

from shardmerge.cli.entry import main

if __name__ == "__main__":
    main()
