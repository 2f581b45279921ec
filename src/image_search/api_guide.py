"""Documentation page of the HTTP interface, generated from its OpenAPI description.

FastAPI's own page loads a script from another host, which this server's security policy forbids.
"""

from collections.abc import Mapping
from html import escape
from typing import Any


def guide(described: Mapping[str, Any]) -> str:
    """Return an HTML page that lists the fields of each route's request and response.

    Args:
        described: OpenAPI description of the application, as made by FastAPI.
    """
    parts = [f"<h1>{escape(described['info']['title'])}</h1>"]
    parts.append(f"<p>{escape(described['info']['description'])}</p>")
    parts.append('<p>For programs: <a href="openapi.json">openapi.json</a></p>')
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            parts.append(_table(_request_fields(operation)))
            response = operation["responses"]["200"].get("content", {}).get("application/json", {})
            name = response.get("schema", {}).get("$ref", "").rpartition("/")[2]
            if name:
                fields = described["components"]["schemas"][name]["properties"]
                parts.append(f"<p>Response (JSON):</p>{_table(fields)}")
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<link rel="stylesheet" href="page.css">
<title>{escape(described["info"]["title"])}: HTTP</title>
</head>
<body class="guide"><main>
{body}
</main></body>
</html>
"""


def _request_fields(operation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request by name, from its path, its query string and its form."""
    fields = {field["name"]: field["schema"] for field in operation.get("parameters", [])}
    form = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data", {})
    fields.update(form.get("schema", {}).get("properties", {}))
    return fields


def _table(fields: Mapping[str, Any]) -> str:
    """Return an HTML table of fields: name, type and description."""
    rows = []
    for name, field in fields.items():
        kinds = [kind.get("type", "") for kind in field.get("anyOf", [field])]
        kind = " or ".join(filter(None, kinds)) or "object"
        about = escape(field.get("description", ""))
        rows.append(f"<tr><th>{escape(name)}</th><td>{escape(kind)}</td><td>{about}</td></tr>")
    return f"<table>{''.join(rows)}</table>" if rows else ""
