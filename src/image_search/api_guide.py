"""The page that explains the HTTP interface, written from its OpenAPI description.

FastAPI's own page loads its script from another host, which this server keeps browsers from.
"""

from collections.abc import Mapping
from html import escape
from typing import Any


def guide(described: Mapping[str, Any]) -> str:
    """An HTML page of what each address takes and answers.

    Args:
        described: OpenAPI, as FastAPI makes it.
    """
    parts = [f"<h1>{escape(described['info']['title'])}</h1>"]
    parts.append(f"<p>{escape(described['info']['description'])}</p>")
    parts.append('<p>For programs: <a href="openapi.json">openapi.json</a></p>')
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            parts.append(_table(_taken(operation)))
            answered = operation["responses"]["200"].get("content", {}).get("application/json", {})
            name = answered.get("schema", {}).get("$ref", "").rpartition("/")[2]
            if name:
                fields = described["components"]["schemas"][name]["properties"]
                parts.append(f"<p>It answers with JSON:</p>{_table(fields)}")
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


def _taken(operation: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that an operation takes, by name, from its address and its form."""
    fields = {field["name"]: field["schema"] for field in operation.get("parameters", [])}
    form = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data", {})
    fields.update(form.get("schema", {}).get("properties", {}))
    return fields


def _table(fields: Mapping[str, Any]) -> str:
    """Fields with their types and what they are."""
    rows = []
    for name, field in fields.items():
        kinds = [kind.get("type", "") for kind in field.get("anyOf", [field])]
        kind = " or ".join(filter(None, kinds)) or "object"
        about = escape(field.get("description", ""))
        rows.append(f"<tr><th>{escape(name)}</th><td>{escape(kind)}</td><td>{about}</td></tr>")
    return f"<table>{''.join(rows)}</table>" if rows else ""
