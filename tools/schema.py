"""Write the schema of a config, which gives editors completion and checking: `shardmerge schema` prints it.

There is one copy of it, in the package, so that who has installed that has the schema of just that version.
"""

from __future__ import annotations

import json

from shardmerge.config.schema import MergeConfig
from shardmerge.reporting.starter import SCHEMA


def schema_text() -> str:
    """The JSON schema of a config, ending in a newline. An adapter may also be a bare string, and alone."""
    schema = MergeConfig.model_json_schema()
    short = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/AdapterConfig"}]}
    many = schema["properties"]["adapters"]
    many["items"] = short
    schema["properties"]["adapters"] = {"anyOf": [many, *short["anyOf"]]}
    for section, key in (("OutputConfig", "max_shard_size"), ("ComputeConfig", "max_memory")):
        schema["$defs"][section]["properties"][key]["anyOf"].append({"type": "string"})
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
