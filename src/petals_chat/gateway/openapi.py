"""Documentation of requests in the terms of OpenAPI, for endpoints that read their requests themselves.

FastAPI derives it from signatures; the v1 API takes one set of parameters in too many forms for that.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_BODY_TYPES = ("application/json", "application/x-www-form-urlencoded", "multipart/form-data")


def request_body(parameters: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """The ``requestBody`` of an operation that takes ``parameters`` as JSON or as either kind of form."""
    media_type = {"schema": parameters.model_json_schema(), "example": example}
    return {"requestBody": {"content": dict.fromkeys(_BODY_TYPES, media_type)}}


def query_parameters(parameters: type[BaseModel]) -> dict[str, Any]:
    """The ``parameters`` of an operation that takes them in its query string."""
    schema = parameters.model_json_schema()
    required = schema.get("required", ())
    return {
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": name in required,
                "description": description.pop("description", ""),
                "schema": description,
            }
            for name, description in schema["properties"].items()
        ]
    }
